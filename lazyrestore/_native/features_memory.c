/* Trying userfaultfd, by doing what the pager does: see features.h.
 *
 * Facts. A feature bit says that the kernel was built with it, not that a fault of this process arrives. A fault taken
 * inside a system call reaches the userfaultfd only if it was opened without UFFD_USER_MODE_ONLY. Closing a userfaultfd
 * wakes whoever waits for it, but only once every copy of the descriptor is closed: also the one in a child that
 * another thread is just forking. munmap, mremap and madvise wait until their event was read.
 * Consequence. A thread of ours touches the mapping, the caller answers as the pager would, and the bytes are compared.
 * Choice. The toucher says by an eventfd that it is done; the caller polls for that and for events, so that no time-out
 * is needed: either an event comes or the toucher got through without. After a failure the range is unregistered, which
 * wakes the toucher, and events are still read until it is done; closing is not relied on. fork() is tried elsewhere
 * (features_process.c): with EVENT_FORK in this process, every thread's fork would wait for us.
 * What was moved or unmapped may be another thread's memory by the next instruction: `gone` keeps our hands off it.
 * Cost. A thread per attempt.
 */
#define _GNU_SOURCE
#include "features.h"

#include "abi.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 4, PATTERN = 0xa5, RANGES = 2 };

/* A failed call: its name goes to *step, its errno is the value. */
#define FAILED(name) (*step = (name), errno)
#define SURPRISE(name) (*step = (name), EPROTO)

static int uffd_open(int source, uint64_t features, const char **step, int *result)
{
	int fd;

	if (source == LR_UFFD_DEVICE) {
		int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

		if (device < 0)
			return FAILED("open /dev/userfaultfd");
		fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
		int error = fd < 0 ? FAILED("USERFAULTFD_IOC_NEW") : 0;
		close(device);
		if (error)
			return error;
	} else {
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
		if (fd < 0)
			return FAILED("userfaultfd");
	}
	struct uffdio_api api = {.api = UFFD_API, .features = features};

	if (ioctl(fd, UFFDIO_API, &api)) {
		int error = FAILED("UFFDIO_API");

		close(fd);
		return error;
	}
	*result = fd;
	return 0;
}

int lr_try_userfaultfd(int source, uint64_t features, const char **step)
{
	int fd = -1;
	int error = uffd_open(source, features, step, &fd);

	if (fd >= 0)
		close(fd);
	return error;
}

uint64_t lr_uffd_feature(const char *name)
{
	static const struct {
		const char *name;
		uint64_t bit;
	} known[] = {
		{"EVENT_FORK", UFFD_FEATURE_EVENT_FORK},
		{"EVENT_REMAP", UFFD_FEATURE_EVENT_REMAP},
		{"EVENT_REMOVE", UFFD_FEATURE_EVENT_REMOVE},
		{"EVENT_UNMAP", UFFD_FEATURE_EVENT_UNMAP},
		{"MISSING_SHMEM", UFFD_FEATURE_MISSING_SHMEM},
		{"MISSING_HUGETLBFS", UFFD_FEATURE_MISSING_HUGETLBFS},
		{"MINOR_SHMEM", UFFD_FEATURE_MINOR_SHMEM},
		{"MINOR_HUGETLBFS", UFFD_FEATURE_MINOR_HUGETLBFS},
		{"POISON", UFFD_FEATURE_POISON},
	};

	for (size_t i = 0; i < sizeof known / sizeof *known; i++)
		if (!strcmp(known[i].name, name))
			return known[i].bit;
	return 0;
}

/* One attempt: page 0 of the file is filled, the others are holes. */
struct lazy {
	int action;
	size_t page;   /* bytes */
	size_t length; /* bytes of file, alias, clone and elsewhere */
	int file, uffd, done, pipe[2];
	uint8_t *alias, *clone, *elsewhere;
	_Atomic size_t gone; /* bytes at the start of clone that the toucher gives up, from before the call */
	unsigned events; /* 1 << event number - UFFD_EVENT_PAGEFAULT, for each that came */
	uint8_t seen;    /* what the toucher read */
	int error;       /* the toucher's */
	const char *step;
};

/* What may be registered and is still ours; returns how many ranges. */
static size_t lazy_registered(const struct lazy *lazy, struct uffdio_range ranges[RANGES])
{
	size_t gone = lazy->gone, count = 0;

	if (lazy->elsewhere)
		ranges[count++] = (struct uffdio_range){(uintptr_t)lazy->elsewhere, lazy->length};
	if (lazy->clone)
		ranges[count++] = (struct uffdio_range){(uintptr_t)lazy->clone + gone, lazy->length - gone};
	return count;
}

static void lazy_deinit(struct lazy *lazy)
{
	int descriptors[] = {lazy->file, lazy->done, lazy->pipe[0], lazy->pipe[1]};

	for (size_t i = 0; i < sizeof descriptors / sizeof *descriptors; i++)
		if (descriptors[i] >= 0)
			close(descriptors[i]);
	if (lazy->uffd >= 0)
		close(lazy->uffd);
	struct uffdio_range ranges[RANGES];
	size_t count = lazy_registered(lazy, ranges);

	for (size_t i = 0; i < count; i++)
		munmap((void *)(uintptr_t)ranges[i].start, ranges[i].len);
	if (lazy->alias)
		munmap(lazy->alias, lazy->length);
}

static int lazy_map(struct lazy *lazy, int flags, int fd, uint8_t **result, const char **step)
{
	void *address = mmap(NULL, lazy->length, PROT_READ | PROT_WRITE, flags, fd, 0);

	if (address == MAP_FAILED)
		return FAILED("mmap");
	*result = address;
	return 0;
}

static uint64_t lazy_features(const struct lazy *lazy)
{
	static const uint64_t extra[] = {
		[LR_LAZY_REMOVE] = UFFD_FEATURE_EVENT_REMOVE, [LR_LAZY_REMAP] = UFFD_FEATURE_EVENT_REMAP,
		[LR_LAZY_UNMAP] = UFFD_FEATURE_EVENT_UNMAP,   [LR_LAZY_POISON] = UFFD_FEATURE_POISON,
	};
	if (lazy->page != PAGE)
		return UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS;
	return UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | extra[lazy->action];
}

static int lazy_init(struct lazy *lazy, int action, size_t page, const char **step)
{
	bool huge = page != PAGE;
	unsigned flags = MFD_CLOEXEC;

	*lazy = (struct lazy){.action = action, .page = page, .length = huge ? page : PAGES * page,
	                      .file = -1, .uffd = -1, .done = -1, .pipe = {-1, -1}};
	if (huge)
		flags |= MFD_HUGETLB | (unsigned)__builtin_ctzll(page) << MFD_HUGE_SHIFT;
	int error = uffd_open(LR_UFFD_CALL, lazy_features(lazy), step, &lazy->uffd);

	if (error)
		return error;
	if ((lazy->file = memfd_create("lazyrestore-doctor", flags)) < 0)
		return FAILED("memfd_create");
	if (ftruncate(lazy->file, (off_t)lazy->length))
		return FAILED("ftruncate");
	if ((lazy->done = eventfd(0, EFD_CLOEXEC)) < 0)
		return FAILED("eventfd");
	if (pipe2(lazy->pipe, O_CLOEXEC))
		return FAILED("pipe2");
	if ((error = lazy_map(lazy, MAP_SHARED, lazy->file, &lazy->alias, step)))
		return error;
	if ((error = lazy_map(lazy, MAP_PRIVATE, lazy->file, &lazy->clone, step)))
		return error;
	if ((error = lazy_map(lazy, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, &lazy->elsewhere, step)))
		return error;
	/* Small pages only: a large folio would fill the holes. */
	madvise(lazy->alias, lazy->length, MADV_NOHUGEPAGE);
	memset(lazy->alias, PATTERN, page);
	struct uffdio_register reg = {.range = {(uintptr_t)lazy->clone, lazy->length},
	                              .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR};

	if (ioctl(lazy->uffd, UFFDIO_REGISTER, &reg))
		return FAILED("UFFDIO_REGISTER");
	return reg.ioctls & (1ull << _UFFDIO_CONTINUE) ? 0 : SURPRISE("UFFDIO_REGISTER without CONTINUE");
}

static uint8_t read_byte(const uint8_t *address)
{
	return *(const volatile uint8_t *)address;
}

static int toucher_act(struct lazy *lazy, const char **step)
{
	uint8_t *filled = lazy->clone, *hole = lazy->clone + lazy->page;

	switch (lazy->action) {
	case LR_LAZY_SYSTEM:
		if (write(lazy->pipe[1], filled, 1) != 1)
			return FAILED("write from a lazy page");
		return read(lazy->pipe[0], &lazy->seen, 1) == 1 ? 0 : FAILED("read");
	case LR_LAZY_WRITE:
		*(volatile uint8_t *)filled = 1;
		lazy->seen = read_byte(lazy->alias);
		return 0;
	case LR_LAZY_ZERO:
		lazy->seen = read_byte(hole);
		return 0;
	case LR_LAZY_REMOVE:
		if (madvise(filled, lazy->page, MADV_DONTNEED))
			return FAILED("madvise");
		lazy->seen = read_byte(filled);
		return 0;
	case LR_LAZY_REMAP:
		if (mremap(filled, lazy->page, lazy->page, MREMAP_MAYMOVE | MREMAP_FIXED, lazy->elsewhere) == MAP_FAILED)
			return FAILED("mremap");
		lazy->seen = read_byte(lazy->elsewhere);
		return 0;
	case LR_LAZY_UNMAP:
		return munmap(filled, lazy->page) ? FAILED("munmap") : 0;
	case LR_LAZY_POISON:
		if (write(lazy->pipe[1], hole, 1) == 1)
			return SURPRISE("a poisoned page was readable");
		return errno == EFAULT ? 0 : FAILED("write from a poisoned page");
	default:
		lazy->seen = read_byte(filled);
		return 0;
	}
}

static void *toucher(void *argument)
{
	struct lazy *lazy = argument;

	if (lazy->action == LR_LAZY_REMAP || lazy->action == LR_LAZY_UNMAP)
		lazy->gone = lazy->page;
	lazy->error = toucher_act(lazy, &lazy->step);
	if (lazy->error)
		lazy->gone = 0;
	eventfd_write(lazy->done, 1);
	return NULL;
}

/* Answers a fault as the pager would: what the image holds by CONTINUE, the rest zero. */
static int lazy_resolve(struct lazy *lazy, uint64_t address, const char **step)
{
	uint64_t start = address & ~(uint64_t)(lazy->page - 1);
	bool moved = start == (uintptr_t)lazy->elsewhere;
	bool filled = moved || (start == (uintptr_t)lazy->clone && lazy->action != LR_LAZY_REMOVE);

	if (filled) {
		struct uffdio_continue one = {.range = {start, lazy->page}};

		return ioctl(lazy->uffd, UFFDIO_CONTINUE, &one) ? FAILED("UFFDIO_CONTINUE") : 0;
	}
	struct uffdio_zeropage zero = {.range = {start, lazy->page}};

	return ioctl(lazy->uffd, UFFDIO_ZEROPAGE, &zero) ? FAILED("UFFDIO_ZEROPAGE") : 0;
}

static int lazy_event(struct lazy *lazy, const char **step)
{
	struct uffd_msg message;

	if (read(lazy->uffd, &message, sizeof message) != sizeof message)
		return errno == EAGAIN ? 0 : FAILED("read event");
	lazy->events |= 1u << (message.event - UFFD_EVENT_PAGEFAULT);
	return message.event == UFFD_EVENT_PAGEFAULT ? lazy_resolve(lazy, message.arg.pagefault.address, step) : 0;
}

static int lazy_serve(struct lazy *lazy, const char **step)
{
	struct pollfd polled[] = {{.fd = lazy->uffd, .events = POLLIN}, {.fd = lazy->done, .events = POLLIN}};
	struct uffdio_range ranges[RANGES];
	int first = 0;

	while (!polled[1].revents) {
		int error = 0;

		if (poll(polled, 2, -1) < 0)
			error = errno == EINTR ? 0 : FAILED("poll");
		else if (polled[0].revents)
			error = lazy_event(lazy, step);
		if (error && !first) {
			first = error;
			for (size_t i = lazy_registered(lazy, ranges); i--;)
				ioctl(lazy->uffd, UFFDIO_UNREGISTER, &ranges[i]);
		}
	}
	return first;
}

static int lazy_judge(const struct lazy *lazy, const char **step)
{
	static const struct {
		unsigned event;
		uint8_t seen;
		const char *what;
	} expected[] = {
		[LR_LAZY_READ] = {UFFD_EVENT_PAGEFAULT, PATTERN, "a read of a filled page"},
		[LR_LAZY_SYSTEM] = {UFFD_EVENT_PAGEFAULT, PATTERN, "a fault inside a system call"},
		[LR_LAZY_WRITE] = {UFFD_EVENT_PAGEFAULT, PATTERN, "a write to a filled page"},
		[LR_LAZY_ZERO] = {UFFD_EVENT_PAGEFAULT, 0, "a read of a hole"},
		[LR_LAZY_REMOVE] = {UFFD_EVENT_REMOVE, 0, "EVENT_REMOVE"},
		[LR_LAZY_REMAP] = {UFFD_EVENT_REMAP, PATTERN, "EVENT_REMAP"},
		[LR_LAZY_UNMAP] = {UFFD_EVENT_UNMAP, 0, "EVENT_UNMAP"},
		[LR_LAZY_POISON] = {0, 0, "POISON"},
	};
	unsigned event = expected[lazy->action].event;

	if (lazy->error)
		return *step = lazy->step, lazy->error;
	if (event && !(lazy->events & 1u << (event - UFFD_EVENT_PAGEFAULT)))
		return SURPRISE(expected[lazy->action].what);
	return lazy->seen == expected[lazy->action].seen ? 0 : SURPRISE(expected[lazy->action].what);
}

static int lazy_poison(struct lazy *lazy, const char **step)
{
	struct uffdio_poison poison = {.range = {(uintptr_t)lazy->clone + lazy->page, lazy->page}};

	return ioctl(lazy->uffd, UFFDIO_POISON, &poison) ? FAILED("UFFDIO_POISON") : 0;
}

int lr_try_lazy(int action, uint64_t page_size, const char **step)
{
	struct lazy lazy __attribute__((cleanup(lazy_deinit)));
	pthread_t thread;
	int error = lazy_init(&lazy, action, page_size, step);

	if (!error && action == LR_LAZY_POISON)
		error = lazy_poison(&lazy, step);
	if (error)
		return error;
	if ((error = pthread_create(&thread, NULL, toucher, &lazy)))
		return *step = "pthread_create", error;
	error = lazy_serve(&lazy, step);
	pthread_join(thread, NULL);
	return error ? error : lazy_judge(&lazy, step);
}
