#include "pager.h"

#include <errno.h>
#include <sys/eventfd.h>

void pager_wake(struct pager *pager) {
	uint64_t one = 1;
	if (write(pager->wake_fd, &one, sizeof one) < 0)
		return; /* EAGAIN: it is raised already */
}

static struct lr_error make_shared(struct pager *pager, uint32_t kind, int fd, struct backing **made) {
	scoped_free struct backing *backing = malloc(sizeof *backing);
	if (!backing)
		return lr_fail("malloc", ENOMEM, 0);
	struct lr_error error = backing_init(&pager->image, kind, fd, backing);
	if (error.code)
		return error;
	error = keeper_add(&pager->keeper, backing->device, backing->inode, &backing->keeper_slot);
	if (error.code) {
		backing->fd = -1; /* the caller's */
		backing_deinit(backing);
		return error;
	}
	backing->next = pager->shared;
	pager->shared = *made = backing;
	backing = NULL;
	return LR_OK;
}

struct lr_error pager_shared_get(struct pager *pager, uint32_t kind, int fd, struct backing **found) {
	scoped_fd owned = fd;
	struct stat about;
	if (fstat(fd, &about))
		return lr_fail("fstat of a shared memory file", errno, 0);
	SCOPED_LOCK(&pager->lock);
	for (struct backing *known = pager->shared; known; known = known->next)
		if (known->kind == kind && known->device == about.st_dev && known->inode == about.st_ino) {
			known->references++;
			*found = known;
			return LR_OK;
		}
	struct lr_error error = make_shared(pager, kind, fd, found);
	if (!error.code)
		fd_release(&owned);
	return error;
}

void pager_shared_put(struct pager *pager, struct backing *backing) {
	if (--backing->references)
		return;
	for (struct backing **link = &pager->shared; *link; link = &(*link)->next)
		if (*link == backing) {
			*link = backing->next;
			break;
		}
	keeper_remove(&pager->keeper, backing->keeper_slot);
	backing_deinit(backing);
	free(backing);
}

struct lr_error pager_thread(void *(*run)(void *), void *argument) {
	enum { STACK = 256 * 1024 };
	pthread_attr_t attributes;
	pthread_t thread;
	int error = pthread_attr_init(&attributes);
	if (error)
		return lr_fail("pthread_attr_init", error, 0);
	pthread_attr_setstacksize(&attributes, STACK);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	error = pthread_create(&thread, &attributes, run, argument);
	pthread_attr_destroy(&attributes);
	return error ? lr_fail("pthread_create", error, 0) : LR_OK;
}
