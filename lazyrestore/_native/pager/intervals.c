#define _GNU_SOURCE
#include "intervals.h"

#include "space.h"
#include <errno.h>
#include <sys/mman.h>

struct list {
	struct lr_range *ranges;
	size_t n, capacity;
};

static int append(struct list *list, struct lr_range range) {
	if (list->n == list->capacity) {
		size_t capacity = list->capacity ? list->capacity * 2 : 256;
		struct lr_range *ranges = realloc(list->ranges, capacity * sizeof *ranges);
		if (!ranges)
			return ENOMEM;
		list->ranges = ranges;
		list->capacity = capacity;
	}
	list->ranges[list->n++] = range;
	return 0;
}

/* The parts of a shared interval that lie in chunks nobody has touched. */
static int append_untouched(struct list *list, struct space *space, const struct interval *interval) {
	const struct image *image = &space->pager->image;
	const struct backing *backing = space_backing(space, interval->backing);
	uint64_t end = interval->image + (interval->end - interval->start);
	int error = 0;
	for (uint64_t at = interval->image; !error && at < end;) {
		struct image_place place = image_find(image, at);
		uint64_t stop = place.end < end ? place.end : end;
		if (!place.hole && backing_is_untouched(backing, place.chunk)) {
			uint64_t start = interval->start + (at - interval->image);
			error = append(list, (struct lr_range){.start = start,
							       .end = start + (stop - at),
							       .image = at,
							       .backing = interval->backing});
		}
		at = stop;
	}
	return error;
}

static int append_interval(struct list *list, struct space *space, const struct interval *interval) {
	if (interval->backing >= LR_BACKING_SHARED)
		return append_untouched(list, space, interval);
	return append(list, (struct lr_range){.start = interval->start,
					      .end = interval->end,
					      .image = interval->image,
					      .backing = interval->backing,
					      .flags = interval->flags & INTERVAL_ZERO ? LR_RANGE_ZERO : 0});
}

static struct lr_error write_whole(int fd, const void *data, size_t length) {
	for (size_t done = 0; done < length;) {
		ssize_t n = write(fd, (const char *)data + done, length - done);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return lr_fail("write of the intervals", n < 0 ? errno : EIO, 0);
		done += (size_t)n;
	}
	return LR_OK;
}

static struct lr_error list_all(struct space *space, const struct interval_map *map, int fd) {
	struct list list = {0};
	struct interval found;
	int failed = 0;
	for (uint64_t at = 0; !failed && interval_map_next(map, at, &found); at = found.end)
		failed = append_interval(&list, space, &found);
	struct lr_error error = failed ? lr_fail("list of the intervals", failed, 0)
				       : write_whole(fd, list.ranges, list.n * sizeof *list.ranges);
	free(list.ranges);
	return error;
}

struct lr_error intervals_of(struct pager *pager, int pidfd, int *memfd) {
	__attribute__((cleanup(interval_map_deinit))) struct interval_map map;
	struct space *space;
	interval_map_init(&map);
	scoped_fd made = memfd_create("lazyrestore-intervals", MFD_CLOEXEC);
	if (made < 0)
		return lr_fail("memfd_create", errno, 0);
	struct lr_error error = space_visit(pager, pidfd, &space, &map);
	/* Who asks is about to read its memory. A forked child is not found. */
	if ((error.code || space->records) && working_set_end_early(&pager->working_set, error.code ? 0 : space->records))
		pager_wake(pager);
	if (error.code)
		return error;
	error = list_all(space, &map, made);
	space_leave(space);
	if (!error.code)
		*memfd = fd_release(&made);
	return error;
}
