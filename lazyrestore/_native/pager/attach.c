#include "attach.h"

#include "proc.h"
#include "replay.h"
#include "space.h"
#include "uffd.h"
#include <errno.h>
#include <string.h>

enum { FD_UFFD, FD_PIDFD, FD_RANGES, FD_SHARED, MAX_RANGES = 1 << 20 };

static void scoped_space(struct space **space) {
	if (*space)
		space_free(*space);
}

static struct lr_error read_ranges(int fd, uint32_t n, struct lr_range **ranges) {
	struct stat about;
	size_t bytes = n * sizeof **ranges;
	if (!n || n > MAX_RANGES)
		return lr_fail("attach: number of ranges", EINVAL, n);
	if (fstat(fd, &about) || (uint64_t)about.st_size != bytes)
		return lr_fail("attach: size of the ranges", EINVAL, (uint64_t)about.st_size);
	*ranges = malloc(bytes);
	if (!*ranges)
		return lr_fail("malloc", ENOMEM, 0);
	if (pread(fd, *ranges, bytes, 0) != (ssize_t)bytes)
		return lr_fail("pread of the ranges", errno ? errno : EIO, 0);
	return LR_OK;
}

static struct lr_error check_range(struct space *space, const struct lr_range *range, uint64_t floor) {
	bool known = range->backing != LR_BACKING_HUGETLB || space->pager->image.hugetlb;
	struct backing *backing = known ? space_backing(space, range->backing) : NULL;
	if (!backing)
		return lr_fail("attach: range of an unknown backing", EINVAL, range->start);
	if (range->start < floor || range->start >= range->end || range->end > LR_ADDRESS_END)
		return lr_fail("attach: range not sorted, empty or too high", EINVAL, range->start);
	if ((range->start | range->end | range->image) % backing->page)
		return lr_fail("attach: range not aligned", EINVAL, range->start);
	if (range->image < backing->image || range->image - backing->image > LR_ADDRESS_END - (range->end - range->start))
		return lr_fail("attach: range beyond its backing", EINVAL, range->start);
	return LR_OK;
}

static struct lr_error get_shared(struct space *space, const struct lr_request *request, int *fds) {
	space->shared = calloc(request->n_shared ? request->n_shared : 1, sizeof *space->shared);
	if (!space->shared)
		return lr_fail("calloc", ENOMEM, 0);
	for (uint32_t i = 0; i < request->n_shared; i++) {
		if (request->shared[i] >= UINT16_MAX)
			return lr_fail("attach: number of a shared object", EINVAL, request->shared[i]);
		uint32_t kind = LR_BACKING_SHARED + request->shared[i];
		struct lr_error error =
			pager_shared_get(space->pager, kind, fd_release(&fds[i]), &space->shared[space->n_shared]);
		if (error.code)
			return error;
		space->n_shared++;
	}
	return LR_OK;
}

/* What the process asked for before it runs; a damaged chunk is an error, or left for the fault that finds it. */
static struct lr_error fill_shared(struct space *space, uint32_t flags) {
	for (uint32_t i = 0; flags & (LR_ATTACH_EAGER | LR_ATTACH_FILL_NOW) && i < space->n_shared; i++) {
		struct lr_error error = backing_fill_all(space->shared[i], &space->pager->image, &space->unpacker);
		if (error.code && flags & LR_ATTACH_EAGER)
			return error;
	}
	return LR_OK;
}

/* Shared memory whose file is complete is what its file is, whatever happens to the mapping: nothing is left to serve. It is not
 * registered, so that its calls and faults cost what they always cost. (Only now, while the process does not run: later
 * UFFDIO_UNREGISTER, which does not look at mmap_changing, could hit private memory that was moved there. Private memory never:
 * after MADV_DONTNEED it would show the template again.) */
static bool needs_service(struct space *space, uint32_t kind) {
	return kind < LR_BACKING_SHARED || !backing_is_complete(space_backing(space, kind));
}

/* Checks all ranges and puts them into the map before the first is registered. Keeps the *n that are to be. */
static struct lr_error map_ranges(struct space *space, struct lr_range *ranges, uint32_t *n) {
	uint32_t kept = 0;
	uint64_t floor = LR_PAGE;
	for (uint32_t i = 0; i < *n; i++) {
		const struct lr_range range = ranges[i];
		struct lr_error error = check_range(space, &range, floor);
		if (error.code)
			return error;
		floor = range.end;
		if (!needs_service(space, range.backing))
			continue;
		ranges[kept++] = range;
		struct interval interval = {
			.start = range.start, .end = range.end, .image = range.image, .backing = range.backing};
		if (interval_map_insert(&space->map, interval))
			return lr_fail("interval map", ENOMEM, interval.start);
		space->bytes_registered += interval.end - interval.start;
	}
	*n = kept;
	return LR_OK;
}

/* One system call per run of adjacent ranges of one backing. */
static struct lr_error register_ranges(int uffd, const struct lr_range *ranges, uint32_t n) {
	for (uint32_t i = 0; i < n;) {
		uint32_t last = i;
		while (last + 1 < n && ranges[last + 1].start == ranges[last].end &&
		       ranges[last + 1].backing == ranges[i].backing)
			last++;
		struct lr_error error = uffd_register(uffd, ranges[i].start, ranges[last].end);
		if (error.code)
			return error;
		i = last + 1;
	}
	return LR_OK;
}

static struct lr_error attach_owned(struct pager *pager, const struct lr_request *request, int *fds, unsigned n_fds,
				    struct cgroup_keeper *keeper) {
	if (request->n_shared > LR_MAX_SHARED || n_fds != FD_SHARED + request->n_shared)
		return lr_fail("attach: number of descriptors", EINVAL, n_fds);
	__attribute__((cleanup(scoped_space))) struct space *space = space_new(pager);
	scoped_free struct lr_range *ranges = NULL;
	if (!space)
		return lr_fail("calloc", ENOMEM, 0);
	pthread_mutex_lock(&pager->lock);
	space->keeper = keepers_share(keeper);
	pthread_mutex_unlock(&pager->lock);
	space->uffd = fd_release(&fds[FD_UFFD]);
	space->pidfd = fd_release(&fds[FD_PIDFD]);
	space->pid = pid_behind(space->pidfd);
	bool hugetlb;
	uint32_t n_ranges = request->n_ranges;
	struct lr_error error = read_ranges(fds[FD_RANGES], request->n_ranges, &ranges);
	if (!error.code)
		error = unpacker_init(&space->unpacker);
	if (!error.code)
		error = get_shared(space, request, fds + FD_SHARED);
	if (!error.code)
		error = fill_shared(space, request->flags);
	if (!error.code)
		error = map_ranges(space, ranges, &n_ranges);
	if (!error.code)
		error = uffd_api(space->uffd, &space->poison, &hugetlb);
	if (!error.code && pager->image.hugetlb && !hugetlb)
		error = lr_fail("UFFDIO_API: hugetlb faults", EOPNOTSUPP, 0);
	if (!error.code)
		error = register_ranges(space->uffd, ranges, n_ranges);
	if (error.code)
		return error;
	space->fill_now = request->flags & LR_ATTACH_FILL_NOW;
	space->fill_idle = request->flags & LR_ATTACH_FILL_IDLE;
	space->replays = !(request->flags & LR_ATTACH_NO_REPLAY);
	space->has_own_pages = request->flags & LR_ATTACH_OWN_PAGES;
	if (!(request->flags & LR_ATTACH_NO_RECORD))
		space->records =
		    working_set_claim(&pager->working_set, space->pid, request->flags & LR_ATTACH_RECORD_AGAIN);
	if (space->replays && space->has_own_pages) {
		/* To be parked: its tracer waits for this. So there is nothing to look for meanwhile, neither events nor guard
		 * pages (guards.h), and it competes with nobody for the CPU once it is handed out. */
		space->replays = false;
		if (!replay(space))
			error = lr_fail("attach: working set", ESRCH, 0);
	}
	if (!error.code)
		error = space_start(space);
	if (error.code && space->records)
		working_set_end_of_process(&pager->working_set, space->records);
	if (!error.code)
		space = NULL; /* its thread owns it */
	return error;
}

struct lr_error attach(struct pager *pager, const struct lr_request *request, int *fds, unsigned n_fds,
		       struct cgroup_keeper *keeper) {
	struct lr_error error = attach_owned(pager, request, fds, n_fds, keeper);
	for (unsigned i = 0; i < n_fds; i++)
		scoped_close(&fds[i]);
	return error;
}
