/* What the pager's threads share: the image, the backings, the list of address spaces. */
#pragma once
#include "backing.h"
#include "keeper.h"
#include "keepers.h"
#include "latency.h"
#include "stats.h"
#include "working_set.h"
#include <pthread.h>

struct space;

struct pager {
	struct image image;
	_Atomic uint32_t next_frame; /* of the working set's pack */
	struct own_pages own; /* of private memory: what its processes get as copies */
	struct backing template;
	struct backing huge; /* only if image.hugetlb */
	struct working_set working_set;
	char **recorder; /* argv of what keeps a recorded working set, NULL-terminated; NULL: nobody */
	_Atomic bool filling_all, all_filled; /* LR_ATTACH_FILL_IDLE: begun; done */
	int recorder_pidfd; /* while it runs; -1: it does not */
	struct keeper keeper;
	struct latency latency;
	_Atomic bool orphans; /* there may be children that wait for good (space_orphan) */
	uint64_t started_ns;
	int wake_fd; /* eventfd: the main thread should look again */

	pthread_mutex_t keepers_lock; /* guards these three; before `lock` */
	struct cgroup_keeper *keepers; /* chained: the further ones */
	int keepers_watch; /* epoll: one of them has ended */
	bool keepers_refused; /* it was said that there can be none */

	pthread_mutex_t lock; /* guards what follows */
	struct backing *shared; /* chained, one per memory file alive */
	struct space *spaces;   /* chained */
	uint32_t n_spaces;
	uint32_t n_clients; /* connections */
	bool used;          /* since it was last idle: a connection that asked nothing, as another pager's sweep, is no use */
	uint64_t next_id;
	uint32_t spaces_ended;
	struct stats ended; /* sums of the spaces that ended */
	bool stopping;
};

static inline void scoped_unlock(pthread_mutex_t **lock) {
	pthread_mutex_unlock(*lock);
}
#define SCOPED_LOCK(mutex)                                                                                             \
	__attribute__((cleanup(scoped_unlock), unused)) pthread_mutex_t *scoped_lock =                                 \
		(pthread_mutex_lock(mutex), (mutex))

void pager_wake(struct pager *pager);

/* The backing of shared object `kind` - LR_BACKING_SHARED in memory file `fd`, made if it is new, with one reference
 * more. Takes `fd` over in any case. */
struct lr_error pager_shared_get(struct pager *pager, uint32_t kind, int fd, struct backing **backing);

/* Drops one reference. Under the pager's lock. */
void pager_shared_put(struct pager *pager, struct backing *backing);

/* Starts a detached thread with a small stack. */
struct lr_error pager_thread(void *(*run)(void *), void *argument);

/* server.c: serves one connection, which it takes over, in a thread of its own. Called with n_clients raised. */
struct lr_error server_start(struct pager *pager, int connection);
