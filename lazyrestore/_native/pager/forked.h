/* Which process a forked child is. The event of a fork brings its userfaultfd, and no pid.
 *
 * Facts: with UFFD_FEATURE_THREAD_ID a fault tells the thread that runs into it, by its number in its own PID namespace, which
 * NS_GET_PID_FROM_PIDNS (Linux 6.11) translates. That thread may be another process's: process_vm_readv(2) of a page makes a fault too. But one
 * that came from user mode is of the thread's own memory, and /proc/TID/syscall shows "-1" as long as it sleeps there. Its
 * process may share the memory with the one that was forked (vfork, CLONE_VM): kcmp(2) tells.
 * Choice: what is seen of the thread while it sleeps is held by a pidfd, and looked at again then, since a number may be given anew; it counts
 * once the page is in that process's page tables that was not there before, when the fault has been served. In doubt: unknown, until
 * another fault; after LOOKS_MAX for good.
 * Cost: a dozen short system calls while the child's first fault waits, and an own fault for each page until then. Nothing hangs on it but what `stats` shows, and guards.h. */
#pragma once
#include "space.h"

struct forked_look {
	int pidfd, pagemap; /* owned; -1: nothing was seen */
	uint64_t address;
};

/* Tells a child how to find itself, when a fork event of its parent was read. */
void forked_begin(struct space *parent, struct space *child);

/* The pager's number of the thread that told a fault of a child; at most 0: there is none, or nobody tells. */
int32_t forked_thread(const struct space *space, const struct fault *fault);

/* The pid of a thread's process, which may be the thread itself; 0: it is gone. */
int32_t forked_process(int32_t thread);

/* A child that may still be found: until then it gets single pages, since nobody can ask where its guard pages are. */
bool forked_sought(const struct space *space);

/* Before a fault of a child is served that nobody knows yet. */
struct forked_look forked_look(struct space *space, const struct fault *fault);

/* After that. Closes the look. */
void forked_confirm(struct space *space, struct forked_look *look);
