/* A memory file that holds image contents, and which of its chunks are in it.
 *
 * Facts: whether a fault is called MISSING or MINOR says nothing dependable about contents (large folios, races between
 * clones). A page of the file that exists but is not wholly written must never be mapped into a process. Consequence: a
 * state per chunk is the only truth; a page is written into the file once, by the one thread that has claimed its chunk, after its
 * checksum held, and is mapped by nobody before its chunk is FILLED or the page is among those that are present. A working set's pack
 * brings single pages of a chunk, which is then PARTLY filled. Choice: decompress into a buffer, then pwrite(2): measured here for 64 KiB it
 * costs 22 us on top of zstd, decompressing into a mapping of the file 40 us (a page fault and a cleared page each);
 * the file's pages are then in no page table but the processes' own, and a full disk or huge page pool is an errno, not
 * a SIGBUS. hugetlbfs has no write, and pwrite to a shared file would wait for whoever holds its lock (hold.h): there each chunk is
 * mapped for the moment. */
#pragma once
#include "hold.h"
#include "image.h"
#include "own_pages.h"
#include <stdatomic.h>
#include <sys/stat.h>

enum chunk_state { CHUNK_EMPTY, CHUNK_FILLING, CHUNK_AWAITED, CHUNK_PARTLY, CHUNK_FILLED, CHUNK_BAD };

struct backing {
	int fd; /* owned */
	uint32_t kind;      /* as in lr_range.backing */
	uint32_t page;      /* bytes: 4096, or 2 MiB for hugetlb */
	uint64_t image;     /* image address of file offset 0 */
	dev_t device;       /* device and inode: what it is in /proc/PID/maps */
	ino_t inode;
	uint64_t first;     /* its chunks are [first, first + n) of the image's index */
	uint64_t n;
	_Atomic uint8_t *states;
	size_t states_length;
	_Atomic uint16_t *present; /* pages of each chunk that is not FILLED, whatever its state; changed by who has claimed it */
	size_t present_length;
	_Atomic uint64_t n_filled;
	struct hold hold; /* of shared memory */
	uint32_t references; /* guarded by the pager's lock */
	uint32_t keeper_slot;
	struct backing *next;
};

/* Sums over all backings, relaxed. */
struct fill_stats {
	_Atomic uint64_t chunks_filled, chunks_bad, bytes_filled, bytes_read;
};
extern struct fill_stats fill_stats;

/* Takes `fd` over when it succeeds. */
struct lr_error backing_init(const struct image *image, uint32_t kind, int fd, struct backing *backing);
void backing_deinit(struct backing *backing);

/* A sparse template, made 2^47 bytes long: file offset == image address. Takes the empty memory file `fd` over when it
 * succeeds. */
struct lr_error backing_take_template(const struct image *image, int fd, struct backing *backing);
/* The same of a memory file of its own, in huge pages. */
struct lr_error backing_create_huge_template(const struct image *image, struct backing *backing);

/* CHUNK_FILLED or CHUNK_BAD, after filling it or waiting for the thread that does. */
enum chunk_state backing_fill(struct backing *backing, const struct image *image, uint64_t chunk,
			      struct unpacker *unpacker);

/* True: one page of a chunk of at most 16 is there, after reading the chunk or waiting for the thread that does. For who waits for just
 * this page: the rest of the chunk, if it was read now, is written by backing_finish(), which is to be called once that one goes on. */
bool backing_bring_page(struct backing *backing, const struct image *image, uint64_t chunk, uint32_t page, struct unpacker *unpacker);
void backing_finish(struct backing *backing, const struct image *image, uint64_t chunk, struct unpacker *unpacker);

/* For a thread that may be kept from running: it claims the chunk only once it has its bytes, so that who needs it waits for
 * little. A chunk that cannot be read is left to who needs it. */
void backing_fill_at_leisure(struct backing *backing, const struct image *image, uint64_t chunk, struct unpacker *unpacker);

/* The pages of one frame of the working set's pack, as far as they are missing and not `own`, which get theirs; each chunk by itself if
 * the frame is damaged. */
void backing_fill_frame(struct backing *backing, const struct image *image, const struct frame *frame, struct own_pages *own,
			struct unpacker *unpacker);

/* Own pages of a chunk, if they are known: for who wants them in the file nevertheless. */
void backing_fill_own(struct backing *backing, const struct image *image, const struct own_pages *own, uint32_t chunk);

/* Whether these pages of a chunk are in the file, by lr_touched.pages; without waiting. `chunk` may be any number. */
bool backing_has(const struct backing *backing, uint64_t chunk, uint32_t pages);

/* The same of one page of it. */
bool backing_has_page(const struct backing *backing, uint64_t chunk, uint32_t page);

/* The same of several, after filling the whole chunk or waiting for the thread that does, if they are not there. */
bool backing_bring(struct backing *backing, const struct image *image, uint64_t chunk, uint32_t pages, struct unpacker *unpacker);

/* Has it all of its contents? Once it has, it always has. */
bool backing_is_complete(const struct backing *backing);

/* Nobody can have touched a page of it: who reads one now gets the stored bytes, or SIGBUS where they are damaged. */
bool backing_is_untouched(const struct backing *backing, uint64_t chunk);

/* The chunks that overlap image addresses [from, to), and perhaps one beside them: filled, as far as they are sound; or, where they
 * are still empty, declared bad. */
void backing_fill_range(struct backing *backing, const struct image *image, uint64_t from, uint64_t to, struct unpacker *unpacker);
void backing_spoil_range(struct backing *backing, const struct image *image, uint64_t from, uint64_t to);

/* Every chunk of it; the first bad one is the error. */
struct lr_error backing_fill_all(struct backing *backing, const struct image *image, struct unpacker *unpacker);
