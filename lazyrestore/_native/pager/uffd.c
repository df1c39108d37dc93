#include "uffd.h"

#include "../abi.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

struct lr_error uffd_api(int uffd, bool *poison, bool *hugetlb) {
	const uint64_t needed = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |
				UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_THREAD_ID;
	const uint64_t huge = UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS;
	const uint64_t choices[] = {huge | UFFD_FEATURE_POISON, huge, UFFD_FEATURE_POISON, 0};
	int flags = fcntl(uffd, F_GETFL);
	if (flags < 0 || fcntl(uffd, F_SETFL, flags | O_NONBLOCK) < 0)
		return lr_fail("userfaultfd: O_NONBLOCK", errno, 0);
	/* A refused UFFDIO_API leaves the descriptor as it was, so asking for less is possible. */
	for (unsigned i = 0; i < sizeof choices / sizeof *choices; i++) {
		struct uffdio_api api = {.api = UFFD_API, .features = needed | choices[i]};
		if (!ioctl(uffd, UFFDIO_API, &api)) {
			*poison = choices[i] & UFFD_FEATURE_POISON;
			*hugetlb = choices[i] & huge;
			return LR_OK;
		}
		if (errno != EINVAL)
			break;
	}
	return lr_fail("UFFDIO_API", errno, 0);
}

struct lr_error uffd_register(int uffd, uint64_t start, uint64_t end) {
	const uint64_t needed = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR;
	struct uffdio_register range = {.range = {.start = start, .len = end - start}, .mode = needed | UFFDIO_REGISTER_MODE_WP};
	int result = ioctl(uffd, UFFDIO_REGISTER, &range);
	if (result && errno == EINVAL) { /* before Linux 5.19, or not built in */
		range.mode = needed;
		result = ioctl(uffd, UFFDIO_REGISTER, &range);
	}
	return result ? lr_fail("UFFDIO_REGISTER", errno, start) : LR_OK;
}

struct lr_error uffd_unregister(int uffd, uint64_t start, uint64_t end) {
	struct uffdio_range range = {.start = start, .len = end - start};
	return ioctl(uffd, UFFDIO_UNREGISTER, &range) ? lr_fail("UFFDIO_UNREGISTER", errno, start) : LR_OK;
}

static struct uffd_result outcome(int returned, int64_t done) {
	return (struct uffd_result){.done = done > 0 ? (uint64_t)done : 0, .code = returned ? errno : 0};
}

struct uffd_result uffd_continue(int uffd, uint64_t start, uint64_t end) {
	struct uffdio_continue range = {.range = {.start = start, .len = end - start}};
	int returned = ioctl(uffd, UFFDIO_CONTINUE, &range);
	return outcome(returned, range.mapped);
}

struct uffd_result uffd_zero(int uffd, uint64_t start, uint64_t end) {
	struct uffdio_zeropage range = {.range = {.start = start, .len = end - start}};
	int returned = ioctl(uffd, UFFDIO_ZEROPAGE, &range);
	return outcome(returned, range.zeropage);
}

struct uffd_result uffd_copy(int uffd, uint64_t start, uint64_t end, const void *source) {
	struct uffdio_copy range = {.dst = start, .src = (uint64_t)(uintptr_t)source, .len = end - start};
	int returned = ioctl(uffd, UFFDIO_COPY, &range);
	return outcome(returned, range.copy);
}

struct uffd_result uffd_poison(int uffd, uint64_t start, uint64_t end) {
	struct uffdio_poison range = {.range = {.start = start, .len = end - start}};
	int returned = ioctl(uffd, UFFDIO_POISON, &range);
	return outcome(returned, range.updated);
}

void uffd_wake(int uffd, uint64_t start, uint64_t end) {
	struct uffdio_range range = {.start = start, .len = end - start};
	ioctl(uffd, UFFDIO_WAKE, &range);
}

/* A page that cannot be read: the source of copies that must fail, which they do at its first byte, however long they are.
 * Low, since source + length must be an address. 0: there is no memory for it. */
static uint64_t unreadable(void) {
	static _Atomic uint64_t reserved;
	if (!reserved) {
		void *at = mmap((void *)(1ull << 42), LR_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (at != MAP_FAILED)
			reserved = (uint64_t)(uintptr_t)at; /* two threads at once waste one page */
	}
	return reserved;
}

enum probe uffd_probe(int uffd, uint64_t start, uint64_t end) {
	uint64_t source = unreadable();
	if (!source)
		return PROBE_BUSY; /* nothing is known; asked again later */
	if (end - start > LR_ADDRESS_END - LR_PAGE - source)
		return PROBE_NOT_ONE; /* asked in parts */
	struct uffdio_copy range = {.dst = start, .src = source, .len = end - start, .mode = UFFDIO_COPY_MODE_DONTWAKE};
	if (!ioctl(uffd, UFFDIO_COPY, &range))
		return PROBE_REGISTERED; /* cannot be: the source is unreadable */
	switch (errno) {
	case ENOENT:
		return PROBE_NOT_ONE;
	case EAGAIN:
		return PROBE_BUSY;
	case ESRCH:
		return PROBE_GONE;
	default:
		return PROBE_REGISTERED;
	}
}

/* The kernel looks for calls under way (EAGAIN), then for the address space (ESRCH), before it looks for the page, which is in no
 * registered range: the last page below 2^47 is never mapped. */
static int errno_of_nowhere(int uffd) {
	const uint64_t nowhere = LR_ADDRESS_END - 2 * LR_PAGE;
	return uffd_continue(uffd, nowhere, nowhere + LR_PAGE).code;
}

bool uffd_changing(int uffd) {
	return errno_of_nowhere(uffd) == EAGAIN;
}

bool uffd_alive(int uffd) {
	return errno_of_nowhere(uffd) != ESRCH;
}
