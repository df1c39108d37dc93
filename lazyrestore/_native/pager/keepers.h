/* Further keepers: no copy may outlive all who hold its userfaultfd, not by an instant.
 *
 * Facts: pager and keeper are in the cgroup P of whoever restored first, and its cgroup.kill ends both at once. What others
 * restored from a cgroup C would go on, on zeros. What a kill reaches is in the killed cgroup or below it.
 * Consequence: a process in C is safe if one of those who hold the userfaultfds is in C, or in a cgroup above C: what
 * reaches that one reaches all below it, so C too. It does not matter that other holders are elsewhere.
 * Choice: if P is neither C nor above C, the pager clones a keeper and moves it to C before it takes an address space over
 * from there; where the kernel does not allow that (C is threaded, or gone), to the next cgroup above C. It shares the file
 * table like the first one, so a forked child's userfaultfd, which exists from the read of its event on, is held by it too.
 * It stays as long as a connection or an address space from there; if it is killed, the pager starts another one.
 * If none can be started, nothing is taken over from there: an error, not a risk of wrong bytes. If no cgroups are
 * mounted, that is said in the log, and no more.
 * Rejected: the keeper in the root cgroup, which would be enough for all. It would be a process outside the unit, or
 * container, that it belongs to, and who may not leave its part of the tree could not have it.
 * CLONE_INTO_CGROUP, which takes 0.2 ms: since Linux 6.14 the kernel kills the child at once if the two cgroups were not
 * killed equally often before (cgroup_css_set_fork() looks at the wrong one).
 * Cost: a sleeping process per cgroup, some 10 ms at its start, for the move. Where a restorer is, is looked up once per
 * connection: one that is moved to another cgroup later, or whose copy is, is not followed. */
#pragma once
#include <stdbool.h>
#include <stdint.h>
#include "result.h"
#include <sys/types.h>

struct pager;

struct cgroup_keeper {
	struct cgroup_keeper *next;
	char *cgroup; /* in which it is */
	pid_t pid;    /* 0: it does not run */
	int pidfd;
	uint32_t references; /* guarded by the pager's lock, all else by keepers_lock */
};

/* The cgroup of process `pid`, to be freed, if its copies need a further keeper there. NULL: they cannot outlive the first. */
char *keepers_needed_in(pid_t pid);

/* One reference more to the keeper that covers `cgroup`, which is started if it does not run. NULL: no cgroups are mounted. */
struct lr_error keepers_get(struct pager *pager, const char *cgroup, struct cgroup_keeper **keeper);

/* One reference more, or fewer; NULL is fine. Under the pager's lock. */
struct cgroup_keeper *keepers_share(struct cgroup_keeper *keeper);
void keepers_put(struct pager *pager, struct cgroup_keeper *keeper);

/* The main thread's: ends those that nobody needs, starts those again that were killed. False: to be tried again. */
bool keepers_settle(struct pager *pager);

/* Ends all: only when no address space is left. */
void keepers_deinit(struct pager *pager);
