#define _GNU_SOURCE
#include "hold.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

void hold_init(struct hold *hold, int fd) {
	*hold = (struct hold){.fd = fd, .uffd = -1};
	pthread_mutex_init(&hold->lock, NULL);
}

static void *write_when_wanted(void *argument) {
	struct hold *hold = argument;
	prctl(PR_SET_NAME, "lr-hold");
	for (;;) {
		while (sem_wait(&hold->wanted))
			;
		if (hold->ending)
			return NULL;
		mprotect(hold->trap, LR_PAGE, PROT_READ);
		if (pwrite(hold->fd, hold->trap, 1, 0) != -1 || errno != EFAULT)
			abort(); /* it cannot have read anything */
	}
}

static struct lr_error make_trap(struct hold *hold) {
	struct uffdio_api api = {.api = UFFD_API};
	scoped_fd uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		return lr_fail("userfaultfd", errno, 0);
	void *trap = mmap(NULL, LR_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (trap == MAP_FAILED)
		return lr_fail("mmap", errno, 0);
	struct uffdio_register range = {
		.range = {.start = (uint64_t)(uintptr_t)trap, .len = LR_PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	if (ioctl(uffd, UFFDIO_REGISTER, &range)) {
		int error = errno;
		munmap(trap, LR_PAGE);
		return lr_fail("UFFDIO_REGISTER", error, 0);
	}
	hold->trap = trap;
	hold->uffd = fd_release(&uffd);
	return LR_OK;
}

static void drop_trap(struct hold *hold) {
	munmap(hold->trap, LR_PAGE);
	close(hold->uffd);
}

static struct lr_error begin(struct hold *hold) {
	enum { STACK = 64 * 1024 };
	pthread_attr_t attributes;
	struct lr_error error = make_trap(hold);
	if (error.code)
		return error;
	sem_init(&hold->wanted, 0, 0);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	int code = pthread_create(&hold->writer, &attributes, write_when_wanted, hold);
	pthread_attr_destroy(&attributes);
	if (code) {
		drop_trap(hold);
		return lr_fail("pthread_create", code, 0);
	}
	hold->begun = true;
	return LR_OK;
}

struct lr_error hold_take(struct hold *hold) {
	struct uffd_msg message;
	struct lr_error error = LR_OK;
	pthread_mutex_lock(&hold->lock);
	if (!hold->begun)
		error = begin(hold);
	if (!error.code) {
		sem_post(&hold->wanted);
		while (read(hold->uffd, &message, sizeof message) < 0 && errno == EINTR)
			;
		return LR_OK;
	}
	pthread_mutex_unlock(&hold->lock);
	return error;
}

void hold_release(struct hold *hold) {
	struct uffdio_range range = {.start = (uint64_t)(uintptr_t)hold->trap, .len = LR_PAGE};
	mprotect(hold->trap, LR_PAGE, PROT_NONE);
	ioctl(hold->uffd, UFFDIO_WAKE, &range);
	pthread_mutex_unlock(&hold->lock);
}

void hold_deinit(struct hold *hold) {
	if (hold->begun) {
		hold->ending = true;
		sem_post(&hold->wanted);
		pthread_join(hold->writer, NULL);
		sem_destroy(&hold->wanted);
		drop_trap(hold);
	}
	pthread_mutex_destroy(&hold->lock);
}
