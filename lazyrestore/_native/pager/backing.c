#define _GNU_SOURCE
#include "backing.h"

#include "log.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/memfd.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

struct fill_stats fill_stats;

struct lr_error backing_init(const struct image *image, uint32_t kind, int fd, struct backing *backing) {
	struct stat about;
	if (fstat(fd, &about))
		return lr_fail("fstat of a memory file", errno, 0);
	struct backing made = {
		.kind = kind,
		.page = kind == LR_BACKING_HUGETLB ? LR_HUGE : LR_PAGE,
		.image = kind < LR_BACKING_SHARED ? 0 : (kind - LR_BACKING_SHARED + 1ull) << 47,
		.device = about.st_dev,
		.inode = about.st_ino,
		.references = 1,
	};
	made.first = image_first_at(image, made.image);
	made.n = image_first_at(image, made.image + LR_ADDRESS_END) - made.first;
	/* The futex word of a state is the aligned four bytes around it. */
	made.states_length = (made.n + LR_PAGE) & ~(size_t)(LR_PAGE - 1);
	made.states = mmap(NULL, made.states_length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (made.states == MAP_FAILED)
		return lr_fail("mmap of chunk states", errno, 0);
	made.fd = fd;
	*backing = made;
	hold_init(&backing->hold, fd);
	return LR_OK;
}

void backing_deinit(struct backing *backing) {
	hold_deinit(&backing->hold);
	munmap((void *)backing->states, backing->states_length);
	close(backing->fd);
}

struct lr_error backing_create_template(const struct image *image, bool hugetlb, struct backing *backing) {
	unsigned flags = MFD_CLOEXEC | (hugetlb ? MFD_HUGETLB | MFD_HUGE_2MB : 0);
	scoped_fd fd = memfd_create(hugetlb ? "lazyrestore-huge" : "lazyrestore", flags);
	if (fd < 0)
		return lr_fail("memfd_create", errno, 0);
	if (ftruncate(fd, (off_t)LR_ADDRESS_END))
		return lr_fail("ftruncate of the template", errno, LR_ADDRESS_END);
	struct lr_error error = backing_init(image, hugetlb ? LR_BACKING_HUGETLB : LR_BACKING_TEMPLATE, fd, backing);
	if (!error.code)
		fd_release(&fd);
	return error;
}

static struct lr_error store_mapped(const struct backing *backing, off_t offset, uint64_t address, const void *raw, size_t length) {
	void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, backing->fd, offset);
	if (at == MAP_FAILED)
		return lr_fail("mmap of a memory file", errno, address);
	int error = backing->page == LR_PAGE && madvise(at, length, MADV_POPULATE_WRITE) ? errno : 0; /* here, or SIGBUS below */
	if (!error)
		memcpy(at, raw, length);
	munmap(at, length);
	return error ? lr_fail("MADV_POPULATE_WRITE", error, address) : LR_OK;
}

static struct lr_error store(const struct backing *backing, uint64_t address, const void *raw, size_t length) {
	off_t offset = (off_t)(address - backing->image);
	if (backing->kind >= LR_BACKING_SHARED)
		return store_mapped(backing, offset, address, raw, length);
	if (backing->kind != LR_BACKING_HUGETLB) {
		for (size_t done = 0; done < length;) {
			ssize_t n = pwrite(backing->fd, (const char *)raw + done, length - done, offset + (off_t)done);
			if (n < 0 && errno == EINTR)
				continue;
			if (n <= 0)
				return lr_fail("pwrite into a memory file", n < 0 ? errno : EIO, address);
			done += (size_t)n;
		}
		return LR_OK;
	}
	if (length != LR_HUGE || address % LR_HUGE)
		return lr_fail("chunk: not a huge page", EBADMSG, address);
	if (fallocate(backing->fd, 0, offset, LR_HUGE)) /* ENOSPC here, or SIGBUS below */
		return lr_fail("fallocate of a huge page", errno, address);
	return store_mapped(backing, offset, address, raw, LR_HUGE);
}

static uint32_t *futex_word(struct backing *backing, uint64_t slot) {
	return (uint32_t *)(void *)(backing->states + (slot & ~3ull));
}

static void await(struct backing *backing, uint64_t slot) {
	_Atomic uint8_t *state = &backing->states[slot];
	for (;;) {
		uint32_t *word = futex_word(backing, slot);
		uint32_t seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
		uint8_t value = (uint8_t)(seen >> (slot & 3) * 8);
		if (value == CHUNK_FILLING) {
			atomic_compare_exchange_strong(state, &value, CHUNK_AWAITED);
			continue;
		}
		if (value != CHUNK_AWAITED)
			return;
		syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
	}
}

static void count(const struct image *image, uint64_t chunk, bool good) {
	if (!good) {
		atomic_fetch_add_explicit(&fill_stats.chunks_bad, 1, memory_order_relaxed);
		return;
	}
	atomic_fetch_add_explicit(&fill_stats.chunks_filled, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&fill_stats.bytes_filled, image->chunks[chunk].length, memory_order_relaxed);
}

static struct lr_error unpack(const struct image *image, uint64_t chunk, struct unpacker *unpacker) {
	struct lr_error error = image_unpack(image, chunk, unpacker);
	if (!error.code)
		atomic_fetch_add_explicit(&fill_stats.bytes_read, image->chunks[chunk].stored, memory_order_relaxed);
	return error;
}

static struct lr_error fill(struct backing *backing, const struct image *image, uint64_t chunk, struct unpacker *unpacker) {
	struct lr_error error = unpack(image, chunk, unpacker);
	if (!error.code)
		error = store(backing, image->chunks[chunk].address, unpacker->raw, image->chunks[chunk].length);
	if (error.code)
		log_line("snapshot %s: chunk %llu at image address %#llx cannot be read: %s: %s", image->name,
			 (unsigned long long)chunk, (unsigned long long)image->chunks[chunk].address, error.step,
			 strerror(error.code));
	return error;
}

/* The end of CHUNK_FILLING. */
static enum chunk_state settle(struct backing *backing, const struct image *image, uint64_t chunk, bool good) {
	uint64_t slot = chunk - backing->first;
	enum chunk_state state = good ? CHUNK_FILLED : CHUNK_BAD;
	count(image, chunk, good);
	if (good)
		atomic_fetch_add(&backing->n_filled, 1);
	if (atomic_exchange(&backing->states[slot], (uint8_t)state) == CHUNK_AWAITED)
		syscall(SYS_futex, futex_word(backing, slot), FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
	return state;
}

static bool is_empty(const struct backing *backing, uint64_t chunk) {
	uint64_t slot = chunk - backing->first;
	return slot < backing->n && atomic_load_explicit(&backing->states[slot], memory_order_acquire) == CHUNK_EMPTY;
}

/* Fills an empty chunk from its raw bytes. */
static void fill_from(struct backing *backing, const struct image *image, uint64_t chunk, const void *raw) {
	const struct lr_chunk *about = &image->chunks[chunk];
	uint8_t empty = CHUNK_EMPTY;
	if (atomic_compare_exchange_strong(&backing->states[chunk - backing->first], &empty, CHUNK_FILLING))
		settle(backing, image, chunk, !store(backing, about->address, raw, about->length).code);
}

void backing_fill_at_leisure(struct backing *backing, const struct image *image, uint64_t chunk, struct unpacker *unpacker) {
	if (is_empty(backing, chunk) && !unpack(image, chunk, unpacker).code)
		fill_from(backing, image, chunk, unpacker->raw);
}

void backing_fill_frame(struct backing *backing, const struct image *image, const struct frame *frame, struct unpacker *unpacker) {
	const struct lr_touched *touched = &image->working_set[frame->first];
	bool wanted = false;
	for (uint32_t i = 0; i < frame->n; i++)
		wanted |= is_empty(backing, touched[i].chunk);
	if (!wanted)
		return;
	if (image_unpack_frame(image, frame, unpacker).code) {
		for (uint32_t i = 0; i < frame->n; i++)
			backing_fill(backing, image, touched[i].chunk, unpacker);
		return;
	}
	atomic_fetch_add_explicit(&fill_stats.bytes_read, frame->stored, memory_order_relaxed);
	const char *raw = unpacker->raw;
	for (uint32_t i = 0; i < frame->n; raw += image->chunks[touched[i].chunk].length, i++)
		if (is_empty(backing, touched[i].chunk))
			fill_from(backing, image, touched[i].chunk, raw);
}

enum chunk_state backing_fill(struct backing *backing, const struct image *image, uint64_t chunk,
			      struct unpacker *unpacker) {
	uint64_t slot = chunk - backing->first;
	if (slot >= backing->n)
		return CHUNK_BAD;
	_Atomic uint8_t *state = &backing->states[slot];
	uint8_t value = atomic_load_explicit(state, memory_order_acquire);
	if (value == CHUNK_EMPTY && atomic_compare_exchange_strong(state, &value, CHUNK_FILLING)) {
		bool good = !fill(backing, image, chunk, unpacker).code;
		return settle(backing, image, chunk, good);
	}
	if (value == CHUNK_FILLING || value == CHUNK_AWAITED)
		await(backing, slot);
	return atomic_load_explicit(state, memory_order_acquire);
}

bool backing_is_filled(const struct backing *backing, uint64_t chunk) {
	uint64_t slot = chunk - backing->first;
	return slot < backing->n && atomic_load_explicit(&backing->states[slot], memory_order_acquire) == CHUNK_FILLED;
}

bool backing_is_untouched(const struct backing *backing, uint64_t chunk) {
	uint64_t slot = chunk - backing->first;
	if (slot >= backing->n)
		return false;
	uint8_t state = atomic_load_explicit(&backing->states[slot], memory_order_acquire);
	return state == CHUNK_EMPTY || state == CHUNK_BAD;
}

struct lr_error backing_fill_all(struct backing *backing, const struct image *image, struct unpacker *unpacker) {
	for (uint64_t chunk = backing->first; chunk < backing->first + backing->n; chunk++)
		if (backing_fill(backing, image, chunk, unpacker) != CHUNK_FILLED)
			return lr_fail("filling a shared memory file", EBADMSG, image->chunks[chunk].address);
	return LR_OK;
}

/* The first of the backing's chunks that ends above `from`, and one more than the last that begins below `to`. */
static void chunks_of(const struct backing *backing, const struct image *image, uint64_t from, uint64_t to, uint64_t *chunk,
		      uint64_t *end) {
	uint64_t above = image_first_at(image, from + 1), limit = image_first_at(image, to);
	*chunk = above > backing->first ? above - 1 : backing->first;
	*end = limit < backing->first + backing->n ? limit : backing->first + backing->n;
}

void backing_fill_range(struct backing *backing, const struct image *image, uint64_t from, uint64_t to, struct unpacker *unpacker) {
	uint64_t chunk, end;
	for (chunks_of(backing, image, from, to, &chunk, &end); chunk < end; chunk++)
		backing_fill(backing, image, chunk, unpacker);
}

void backing_spoil_range(struct backing *backing, const struct image *image, uint64_t from, uint64_t to) {
	uint64_t chunk, end;
	for (chunks_of(backing, image, from, to, &chunk, &end); chunk < end; chunk++) {
		uint8_t empty = CHUNK_EMPTY;
		if (atomic_compare_exchange_strong(&backing->states[chunk - backing->first], &empty, CHUNK_BAD))
			log_line("snapshot %s: image address %#llx of shared memory is lost: it may have been removed", image->name,
				 (unsigned long long)image->chunks[chunk].address);
	}
}

bool backing_is_complete(const struct backing *backing) {
	return atomic_load(&backing->n_filled) == backing->n;
}
