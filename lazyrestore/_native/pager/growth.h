/* Locked memory (mlock) that mremap moves and lets grow.
 *
 * Facts (mm/mremap.c, up to Linux 6.18; tried): mremap counts itself in mmap_changing, moves the mapping, and brings the pages by which locked
 * memory grew before it queues its event. These faults are told; but while mmap_changing is not zero every install answers EAGAIN,
 * and it falls only once the event was read: the caller, which no signal but SIGKILL reaches, would wait for ever. UFFDIO_REGISTER and
 * UFFDIO_UNREGISTER do not look at mmap_changing.
 * Choice: what the mapping grew by is unregistered, brought through /proc/PID/mem (private memory: as zeros, shared memory: as its file,
 * filled before), and registered again. No other thread can know its address yet. Which process a forked child is, the fault tells: its
 * thread sleeps in mremap, which brings its own memory only.
 * Cost: a look at all threads after every millisecond in which faults are refused and no event comes.
 * What remains: a forked child whose thread nobody can translate (forked.h: a PID namespace of its own before Linux 6.11) waits for ever. */
#pragma once
#include <stdbool.h>

struct space;

/* Helps the mremap that waits for one of the faults not yet served, if one does. */
void growth_bring(struct space *space);
