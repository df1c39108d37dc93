/* The pages of the working set's pack that processes write: each process gets its own copy of them at once, from here.
 *
 * Facts, of a numpy worker: 450 of the 960 pages in its pack are such. In the template they would cost 2 us each before
 * the first of them can be mapped, then a pread and a UFFDIO_COPY for each process. Choice: they stay in the pager's memory, as
 * they came out of their frame, whose checksum held, and UFFDIO_COPY takes them from there. The template lacks them, so who
 * needs them in it reads their chunk as ever: a process that faults, or whose program makes the copies. Cost: as much memory
 * as the template saves. */
#pragma once
#include "image.h"

/* Those of one chunk. */
struct own_entry {
	uint32_t chunk;
	uint16_t pages;     /* bits; never ALL_PAGES */
	uint32_t first;     /* number of its first page in `raw` */
	_Atomic bool there; /* its bytes are in `raw`, for good */
};

struct own_pages {
	struct own_entry *entries; /* sorted by chunk */
	uint32_t n;
	char *raw;
	size_t length;
};

/* Room for what the frames of the image will bring; none if there are none, or no memory. */
void own_pages_init(struct own_pages *own, const struct image *image);

/* Those of a chunk; NULL: it has none. */
struct own_entry *own_pages_find(const struct own_pages *own, uint32_t chunk);

/* Takes them from the bytes of all pages of an entry of the image's working set, which stand one behind the other. Only by
 * who has taken the entry's frame. */
void own_pages_keep(const struct own_pages *own, struct own_entry *entry, uint32_t pages, const char *raw);

/* The bytes of page `page`, and behind them of those that follow it without a gap; NULL: they are not here. `entry` may be NULL. */
const char *own_pages_bytes(const struct own_pages *own, const struct own_entry *entry, uint32_t page);
