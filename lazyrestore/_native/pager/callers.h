/* Which thread made the call that an event tells of.
 *
 * Facts (fs/userfaultfd.c, lib/syscall.c, Linux 6.18): a message names no thread. But whose event is queued is asleep in its system call, and
 * /proc/PID/task/TID/syscall shows the call and its arguments until the event is read; of a thread that runs, also in the kernel, it
 * says "running". Events are read in the order in which they were queued, page faults before them: if the descriptor is readable, and
 * the next message is an event, it was queued before the look. But each event that is read wakes all threads that wait for theirs
 * to be read (one wait queue); they go to sleep again, and seem to run until then. It needs what ptrace needs (PTRACE_MODE_ATTACH).
 * Consequence: what one thread did is in the order of its events; what another did to the same place need not be.
 * Choice: a look before each message, but only for a second after a REMAP of a process with several threads: nothing else
 * needs it (apply.h). A thread that seems to run, and was seen in a call whose events were not all read, is in it still. If no call that was
 * seen fits an event, it is of the thread that seems to run, if that is only one. Else it stays unknown, as do events before which
 * nobody looked: the first of such REMAPs.
 * Cost: 8 us per thread of the process, of which the caller waits for all. */
#pragma once
#include "proc.h"
#include "window.h"

struct call {
	struct proc_task task;
	struct origin left; /* MREMAP_DONTUNMAP: what is mapped at the source, and stays */
};

/* To be called before messages are read. LOOKED: one may be read, of whose callers those are known that the kernel could tell. */
enum look { LOOK_NOT_NEEDED, LOOKED, LOOKED_IN_VAIN /* there is no message */ };
enum look callers_look(struct space *space);

/* Is one call all that is under way, does its thread sleep before its last event, which is `last` then, and does no other thread run? What
 * the kernel shows until that event is read is what it shows when all of the calls are over. Not for a munmap, which may wait for a lock. */
bool callers_last(const struct window *window, struct event *last);

/* Looks once more: has nothing changed? */
bool callers_still(struct space *space);

/* When no call can be under way. */
void callers_forget(struct window *window);

/* The thread that made the call; 0: unknown. `moves`: it may be a mremap. `left`: see above, of an unknown call or another flag not known.
 * `unmaps`: an UNMAP of the source is sure to follow. */
int32_t callers_of_unmap(struct window *window, uint64_t start, uint64_t end, bool *moves);
int32_t callers_of_remove(struct window *window, uint64_t start);
int32_t callers_of_remap(struct window *window, uint64_t from, uint64_t to, struct origin *left, bool *unmaps);
