/* The stored image as the pager sees it: the chunk index, the packs, and how to get a chunk's raw bytes.
 *
 * Facts: the numbers come from a file that may be damaged; a read beyond the end of a mapped file, or of a bad disk
 * block, is SIGBUS, while pread(2) says so. Opening must cost O(packs). Choice: the index is mapped (its range checked
 * against the file's size once), each entry is checked when it is used, and its block's checksum before the first such
 * use; from then on a copy of the block is used, since a page of a mapped file may be read anew, and be another then, at any
 * time. Packs are read with pread. Cost: one copy of the compressed bytes, 2 us per chunk; 2 us and 3 KB per 128 chunks for
 * the checksum and the copy; a disk error under the index ends the pager, and the keeper its processes.
 *
 * A search may look at damaged entries, but ends between two neighbours, and there is only one such place for an address
 * in a sorted index: if the blocks of both are sound, so is the answer. Stores before November 2026 have no checksums. */
#pragma once
#include "protocol.h"
#include "result.h"
#include <stdatomic.h>
#include <stdbool.h>

/* One frame of the working set's pack: entries [first, first + n) of the working set. */
struct frame {
	uint64_t offset; /* bytes into the data file */
	uint32_t stored;
	uint32_t first;
	uint32_t n;
	uint32_t tag; /* as in struct lr_frame */
};

struct image {
	int data_fd; /* owned */
	uint64_t data_size;
	void *map; /* the pages that hold the index */
	size_t map_length;
	const struct lr_chunk *stored; /* the index, in the map */
	struct lr_chunk *chunks;       /* the blocks of it that were found to be sound, zeros else; without checksums: `stored` */
	uint64_t n_chunks;
	const uint32_t *sums;      /* in the map, one per block; NULL: the image has none */
	_Atomic uint8_t *verdicts; /* enum index_verdict of each block */
	struct lr_pack *packs;
	uint32_t n_packs;
	struct lr_touched *working_set; /* not checked */
	uint32_t n_working_set;
	struct frame *frames; /* the working set's pack; checked against the file's size and the list's length */
	uint32_t n_frames;
	bool hugetlb;
	char name[96];
};

enum { ALL_PAGES = 0 }; /* of a chunk: of lr_touched.pages, and wherever pages are told by such bits */

/* Whether page `page` of a chunk is among the pages that these bits stand for. */
static inline bool image_has_page(uint32_t pages, uint32_t page) {
	return pages == ALL_PAGES || (page < 16 && pages >> page & 1);
}

/* The next run [*page, end) of a chunk's pages that are among `pages`, from *page on; 0: there is none. Returns end. */
static inline uint32_t image_next_run(uint32_t pages, uint32_t n, uint32_t *page) {
	while (*page < n && !image_has_page(pages, *page))
		(*page)++;
	uint32_t end = *page;
	while (end < n && image_has_page(pages, end))
		end++;
	return end > *page ? end : 0;
}

/* Takes `data_fd` over when it succeeds; `image_fd` stays the caller's. */
struct lr_error image_init(int image_fd, int data_fd, struct image *image);
void image_deinit(struct image *image);

/* Where an image address lies: in chunk `chunk`, in a hole, or where the index is damaged, so that nobody knows; [start, end)
 * is the chunk's or the hole's, and contains the address. */
struct image_place {
	bool hole;
	bool damaged;
	uint64_t chunk;
	uint64_t start;
	uint64_t end;
};
struct image_place image_find(const struct image *image, uint64_t address);

/* Entry `chunk` of the index, below n_chunks; zeros if it is damaged. */
const struct lr_chunk *image_chunk(const struct image *image, uint64_t chunk);

/* The first chunk that begins at or after `address`; n_chunks if there is none. Next to damaged blocks, one of theirs. */
uint64_t image_first_at(const struct image *image, uint64_t address);

/* One thread's buffers and zstd context. */
struct unpacker {
	void *context;
	void *stored;
	void *raw;
	void *planes;
	uint64_t held; /* 1 + the chunk whose bytes are in `raw`; 0: of a frame, or nothing */
};
struct lr_error unpacker_init(struct unpacker *unpacker);
void unpacker_deinit(struct unpacker *unpacker);

/* Leaves the chunk's raw bytes, checked against its checksum, in unpacker->raw. */
struct lr_error image_unpack(const struct image *image, uint64_t chunk, struct unpacker *unpacker);

/* Bytes of an entry's pages. Its chunk is in the index. */
uint64_t image_touched_bytes(const struct image *image, const struct lr_touched *touched);

/* Leaves the raw bytes of a frame's pages, one behind the other, in unpacker->raw. The frame may have been overwritten since
 * the pager started, when another working set was recorded, by one as sound and as long: its tag tells, and also whether the
 * list of the working set is the one that the frame was made for. */
struct lr_error image_unpack_frame(const struct image *image, const struct frame *frame, struct unpacker *unpacker);
