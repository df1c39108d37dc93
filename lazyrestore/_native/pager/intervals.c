#include "intervals.h"

#include "array.h"
#include "space.h"
#include <errno.h>

struct list {
	struct lr_range *ranges;
	uint32_t n, capacity;
};

static int append(struct list *list, struct lr_range range) {
	struct lr_range *ranges = array_room(list->ranges, list->n, &list->capacity, sizeof range);
	if (!ranges)
		return ENOMEM;
	list->ranges = ranges;
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

struct lr_error intervals_of(struct pager *pager, int pidfd, struct lr_range **ranges, uint32_t *n) {
	__attribute__((cleanup(interval_map_deinit))) struct interval_map map;
	struct space *space;
	struct list list = {0};
	struct interval found;
	int failed = 0;
	interval_map_init(&map);
	struct lr_error error = space_visit(pager, pidfd, &space, &map);
	/* Who asks is about to read its memory. A forked child is not found. */
	uint32_t recording = error.code ? 0 : space->records; /* 0: of whoever records */
	if ((error.code || recording) && working_set_end_early(&pager->working_set, recording))
		pager_wake(pager);
	if (error.code)
		return error;
	for (uint64_t at = 0; !failed && interval_map_next(&map, at, &found); at = found.end)
		failed = append_interval(&list, space, &found);
	space_leave(space);
	if (failed) {
		free(list.ranges);
		return lr_fail("list of the intervals", failed, 0);
	}
	*ranges = list.ranges;
	*n = list.n;
	return LR_OK;
}
