#define _GNU_SOURCE
#include "guards.h"

#include "../abi.h"
#include "pieces.h"
#include "proc.h"
#include "uffd.h"
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>

void guards_begin(struct space *space) {
	space->pagemap = proc_open(space, "pagemap", O_RDONLY);
}

/* The first run of guard pages in [start, end). False: there is none, or the kernel does not tell. */
static bool find(struct space *space, uint64_t start, uint64_t end, struct page_region *found) {
	struct pm_scan_arg scan = {
		.size = sizeof scan,
		.start = start,
		.end = end,
		.vec = (uint64_t)(uintptr_t)found,
		.vec_len = 1,
		.category_mask = PAGE_IS_GUARD,
		.return_mask = PAGE_IS_GUARD,
	};
	if (space->pagemap < 0)
		return false;
	int n = ioctl(space->pagemap, PAGEMAP_SCAN, &scan);
	if (n < 0) { /* before Linux 6.15, when there were none in mappings of files */
		close(space->pagemap);
		space->pagemap = -1;
	}
	return n > 0;
}

/* What is under them is dropped. Not while a call is under way: the map might say of other memory that it is there. */
static bool note(struct space *space, const struct page_region *guards) {
	if (uffd_changing(space->uffd))
		return false;
	SCOPED_LOCK(&space->map_lock);
	int error = piece_empty(&space->map, &space->map, guards->start, guards->end, 0);
	if (error)
		space_kill(space, strerror(error));
	return true;
}

enum guards guards_avoid(struct space *space, uint64_t at, uint64_t *start, uint64_t *end) {
	struct page_region guards;
	for (uint64_t from = *start; from < *end && find(space, from, *end, &guards); from = guards.end) {
		if (!note(space, &guards))
			return GUARDS_BUSY;
		if (guards.start > at) {
			*end = guards.start;
			return GUARDS_AVOIDED;
		}
		if (guards.end > at) {
			*start = at;
			*end = guards.end;
			return GUARDS_AT;
		}
		*start = guards.end;
	}
	return GUARDS_AVOIDED;
}
