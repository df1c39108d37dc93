/* Facts. process_vm_readv takes up to IOV_MAX ranges a call, stops at the first page it cannot read, and then returns
 * the bytes before it. It follows the target's page tables: absent anonymous pages read as zeros without being
 * allocated in the target. */
#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#include "abi.h"

enum { BATCH = 64, PIECE = 1 << 20 };

struct copy {
	int32_t pid;
	const struct lr_run *runs;
	size_t count;
	char *buffer;
	_Atomic size_t next_run;
	_Atomic int error;
	_Atomic uint64_t failed;
};

static int
copy_range(struct copy *copy, uint64_t address, uint64_t offset, uint64_t length)
{
	while (length) {
		uint64_t part = length < PIECE ? length : PIECE;
		struct iovec local = {copy->buffer + offset, part}, remote = {(void *)(uintptr_t)address, part};
		ssize_t got = process_vm_readv(copy->pid, &local, 1, &remote, 1, 0);
		if (got <= 0) {
			atomic_store(&copy->failed, address);
			return got < 0 ? errno : EFAULT;
		}
		address += (uint64_t)got;
		offset += (uint64_t)got;
		length -= (uint64_t)got;
	}
	return 0;
}

/* Small runs go many to a call: process_vm_readv costs more than a page's copy does. */
static int
copy_batch(struct copy *copy, const struct lr_run *runs, size_t count)
{
	struct iovec local[BATCH] = {{0}}, remote[BATCH] = {{0}};
	uint64_t total = 0;
	for (size_t i = 0; i < count; i++) {
		local[i] = (struct iovec){copy->buffer + runs[i].offset, runs[i].length};
		remote[i] = (struct iovec){(void *)(uintptr_t)runs[i].address, runs[i].length};
		total += runs[i].length;
	}
	ssize_t got = process_vm_readv(copy->pid, local, count, remote, count, 0);
	if (got == (ssize_t)total)
		return 0;
	for (size_t i = 0; i < count; i++) {
		int error = copy_range(copy, runs[i].address, runs[i].offset, runs[i].length);
		if (error)
			return error;
	}
	return 0;
}

static void *
copy_worker(void *argument)
{
	struct copy *copy = argument;
	for (;;) {
		size_t first = atomic_fetch_add(&copy->next_run, BATCH);
		if (first >= copy->count || atomic_load(&copy->error))
			return NULL;
		size_t end = first + BATCH < copy->count ? first + BATCH : copy->count;
		int error = copy_batch(copy, copy->runs + first, end - first);
		if (error) {
			int none = 0;
			atomic_compare_exchange_strong(&copy->error, &none, error);
			return NULL;
		}
	}
}

int
lr_copy_runs(int32_t pid, const struct lr_run *runs, size_t count, void *buffer, int32_t threads, uint64_t *failed)
{
	struct copy copy = {.pid = pid, .runs = runs, .count = count, .buffer = buffer};
	pthread_t helpers[64];
	int started = 0;
	while (started < threads - 1 && started < 64 && pthread_create(&helpers[started], NULL, copy_worker, &copy) == 0)
		started++;
	copy_worker(&copy);
	for (int i = 0; i < started; i++)
		pthread_join(helpers[i], NULL);
	*failed = atomic_load(&copy.failed);
	return -atomic_load(&copy.error);
}

int64_t
lr_scan_pages(int32_t pagemap, uint64_t start, uint64_t end, int32_t kind, uint64_t *ranges, size_t room, uint64_t *next)
{
	static const struct {
		uint64_t absent, required; /* categories */
	} kinds[] = {
		[LR_PAGES_WITH_CONTENT] = {.absent = PAGE_IS_PFNZERO},
		[LR_PAGES_OWN] = {.absent = PAGE_IS_PFNZERO | PAGE_IS_FILE},
		[LR_PAGES_ZERO] = {.required = PAGE_IS_PFNZERO},
		[LR_PAGES_OF_FILE] = {.required = PAGE_IS_FILE},
		[LR_PAGES_GUARD] = {.required = PAGE_IS_GUARD},
	};
	static _Atomic bool no_guards; /* before Linux 6.15 */
	struct page_region regions[256];
	size_t written = 0;
	while (start < end && !(kind == LR_PAGES_GUARD && no_guards)) {
		struct pm_scan_arg scan = {
			.size = sizeof scan,
			.start = start,
			.end = end,
			.vec = (uint64_t)(uintptr_t)regions,
			.vec_len = 256,
			.category_inverted = kinds[kind].absent,
			.category_mask = kinds[kind].absent | kinds[kind].required,
			.category_anyof_mask = kind == LR_PAGES_GUARD ? 0 : PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
			.return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		};
		bool guards = kind == LR_PAGES_WITH_CONTENT && !no_guards;
		if (guards)
			scan.return_mask |= PAGE_IS_GUARD;
		long count = ioctl(pagemap, PAGEMAP_SCAN, &scan);
		if (count < 0 && errno == EINVAL && (guards || kind == LR_PAGES_GUARD)) {
			no_guards = true;
			continue;
		}
		if (count < 0)
			return -errno;
		for (long i = 0; i < count; i++) {
			bool guard = regions[i].categories & PAGE_IS_GUARD;
			if (written && ranges[2 * written - 1] == (regions[i].start | guard)) {
				ranges[2 * written - 1] = regions[i].end | guard;
				continue;
			}
			if (written == room) {
				*next = regions[i].start;
				return (int64_t)written;
			}
			ranges[2 * written] = regions[i].start;
			ranges[2 * written + 1] = regions[i].end | guard;
			written++;
		}
		start = scan.walk_end;
	}
	*next = end;
	return (int64_t)written;
}

uint64_t
lr_auxiliary_value(int32_t pid, uint64_t stack, uint64_t type)
{
	uint64_t words[128] = {0}; /* argc, argv, NULL, envp, NULL, and pairs of type and value up to AT_NULL */
	struct iovec local = {words, sizeof words}, remote = {(void *)(uintptr_t)stack, sizeof words};
	ssize_t got = process_vm_readv(pid, &local, 1, &remote, 1, 0);
	size_t count = got > 0 ? (size_t)got / sizeof *words : 0, at = 1;
	for (int ends = 0; ends < 2 && at < count; at++)
		ends += !words[at];
	for (; at + 1 < count && words[at]; at += 2)
		if (words[at] == type)
			return words[at + 1];
	return 0;
}
