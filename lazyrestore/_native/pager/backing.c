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
	made.present_length = (made.n * sizeof *made.present + LR_PAGE) & ~(size_t)(LR_PAGE - 1);
	made.present = mmap(NULL, made.present_length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (made.present == MAP_FAILED) {
		munmap((void *)made.states, made.states_length);
		return lr_fail("mmap of pages present", errno, 0);
	}
	made.fd = fd;
	*backing = made;
	hold_init(&backing->hold, fd);
	return LR_OK;
}

void backing_deinit(struct backing *backing) {
	hold_deinit(&backing->hold);
	munmap((void *)backing->states, backing->states_length);
	munmap((void *)backing->present, backing->present_length);
	close(backing->fd);
}

static struct lr_error make_template(const struct image *image, uint32_t kind, int fd, struct backing *backing) {
	if (ftruncate(fd, (off_t)LR_ADDRESS_END))
		return lr_fail("ftruncate of the template", errno, LR_ADDRESS_END);
	return backing_init(image, kind, fd, backing);
}

struct lr_error backing_take_template(const struct image *image, int fd, struct backing *backing) {
	return make_template(image, LR_BACKING_TEMPLATE, fd, backing);
}

struct lr_error backing_create_huge_template(const struct image *image, struct backing *backing) {
	scoped_fd fd = memfd_create("lazyrestore-huge", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB);
	if (fd < 0)
		return lr_fail("memfd_create", errno, 0);
	struct lr_error error = make_template(image, LR_BACKING_HUGETLB, fd, backing);
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

/* -- filling: whoever has brought a chunk to CHUNK_FILLING, and nobody else, writes it ---------------------------------------- */

static _Atomic uint8_t *state_of(const struct backing *backing, uint64_t chunk) {
	return &backing->states[chunk - backing->first];
}

static uint16_t present(const struct backing *backing, uint64_t chunk) {
	return atomic_load_explicit(&backing->present[chunk - backing->first], memory_order_acquire);
}

/* True if it had none of its contents, or a part, and is the caller's now. */
static bool claim(struct backing *backing, uint64_t chunk) {
	uint8_t found = atomic_load_explicit(state_of(backing, chunk), memory_order_acquire);
	return (found == CHUNK_EMPTY || found == CHUNK_PARTLY) &&
	       atomic_compare_exchange_strong(state_of(backing, chunk), &found, CHUNK_FILLING);
}

/* The end of a claim. */
static enum chunk_state settle(struct backing *backing, uint64_t chunk, enum chunk_state state) {
	uint64_t slot = chunk - backing->first;
	if (state == CHUNK_BAD)
		atomic_fetch_add_explicit(&fill_stats.chunks_bad, 1, memory_order_relaxed);
	if (state == CHUNK_FILLED)
		atomic_fetch_add(&backing->n_filled, 1);
	if (atomic_exchange(&backing->states[slot], (uint8_t)state) == CHUNK_AWAITED)
		syscall(SYS_futex, futex_word(backing, slot), FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
	return state;
}

static struct lr_error unpack(const struct image *image, uint64_t chunk, struct unpacker *unpacker) {
	struct lr_error error = image_unpack(image, chunk, unpacker);
	if (!error.code)
		atomic_fetch_add_explicit(&fill_stats.bytes_read, image_chunk(image, chunk)->stored, memory_order_relaxed);
	return error;
}

/* Bytes of a chunk: of all of `pages`, one behind the other, of which those in `but` are not to be written. */
struct content {
	const char *raw;
	uint16_t pages, but;
};

/* Writes those of a claimed chunk's pages that are missing. */
static struct lr_error write_pages(struct backing *backing, const struct image *image, uint64_t chunk, struct content content) {
	const struct lr_chunk *about = image_chunk(image, chunk);
	uint16_t there = present(backing, chunk), passed = there | content.but;
	const char *raw = content.raw;
	uint32_t n = about->length / LR_PAGE, missing = passed ? (uint16_t)~passed : ALL_PAGES, page = 0;
	if (!there)
		atomic_fetch_add_explicit(&fill_stats.chunks_filled, 1, memory_order_relaxed);
	for (uint32_t end; (end = image_next_run(content.pages, n, &page)); raw += (end - page) * (size_t)LR_PAGE, page = end)
		for (uint32_t at = page, last; (last = image_next_run(missing, end, &at)); at = last) {
			uint64_t bytes = (last - at) * (uint64_t)LR_PAGE, offset = at * (uint64_t)LR_PAGE;
			struct lr_error error = store(backing, about->address + offset, raw + (at - page) * (size_t)LR_PAGE, bytes);
			if (error.code)
				return error;
			atomic_fetch_add_explicit(&fill_stats.bytes_filled, bytes, memory_order_relaxed);
		}
	return LR_OK;
}

/* The end of a claim: writes pages, unless getting them was an error. */
static enum chunk_state put(struct backing *backing, const struct image *image, uint64_t chunk, struct content content,
			    struct lr_error error) {
	uint32_t n = image_chunk(image, chunk)->length / LR_PAGE;
	uint16_t there = present(backing, chunk) | (content.pages & ~content.but);
	bool whole = content.pages == ALL_PAGES || (n <= 16 && (there & ((1u << n) - 1)) == (1u << n) - 1);
	if (!error.code)
		error = write_pages(backing, image, chunk, content);
	if (error.code) {
		log_line("snapshot %s: chunk %llu at image address %#llx cannot be read: %s: %s", image->name,
			 (unsigned long long)chunk, (unsigned long long)image_chunk(image, chunk)->address, error.step,
			 strerror(error.code));
		if (error.code != ENOSPC && error.code != ENOMEM)
			return settle(backing, chunk, CHUNK_BAD);
		settle(backing, chunk, present(backing, chunk) ? CHUNK_PARTLY : CHUNK_EMPTY); /* the next may find memory */
		return CHUNK_BAD;
	}
	if (whole)
		return settle(backing, chunk, CHUNK_FILLED);
	atomic_store_explicit(&backing->present[chunk - backing->first], there, memory_order_release);
	return settle(backing, chunk, CHUNK_PARTLY);
}

/* FILLED or BAD, by somebody else; or what the caller's claim found. */
static enum chunk_state claim_or_await(struct backing *backing, uint64_t chunk, bool *claimed) {
	for (;;) {
		enum chunk_state state = atomic_load_explicit(state_of(backing, chunk), memory_order_acquire);
		*claimed = claim(backing, chunk);
		if (*claimed || state == CHUNK_FILLED || state == CHUNK_BAD)
			return state;
		await(backing, chunk - backing->first);
	}
}

enum chunk_state backing_fill(struct backing *backing, const struct image *image, uint64_t chunk, struct unpacker *unpacker) {
	bool claimed;
	if (chunk - backing->first >= backing->n)
		return CHUNK_BAD;
	enum chunk_state state = claim_or_await(backing, chunk, &claimed);
	if (!claimed)
		return state;
	struct lr_error error = unpack(image, chunk, unpacker);
	return put(backing, image, chunk, (struct content){.raw = unpacker->raw}, error);
}

bool backing_bring_page(struct backing *backing, const struct image *image, uint64_t chunk, uint32_t page, struct unpacker *unpacker) {
	bool claimed;
	if (backing_has_page(backing, chunk, page))
		return true;
	if (chunk - backing->first >= backing->n)
		return false;
	enum chunk_state state = claim_or_await(backing, chunk, &claimed);
	if (!claimed)
		return state == CHUNK_FILLED || backing_has_page(backing, chunk, page);
	struct lr_error error = unpack(image, chunk, unpacker);
	const char *raw = unpacker->raw;
	struct content asked = {.raw = raw + page * (size_t)LR_PAGE, .pages = (uint16_t)(1u << page)};
	return put(backing, image, chunk, asked, error) != CHUNK_BAD;
}

void backing_finish(struct backing *backing, const struct image *image, uint64_t chunk, struct unpacker *unpacker) {
	if (unpacker->held == chunk + 1 && claim(backing, chunk))
		put(backing, image, chunk, (struct content){.raw = unpacker->raw}, LR_OK);
}

void backing_fill_at_leisure(struct backing *backing, const struct image *image, uint64_t chunk, struct unpacker *unpacker) {
	enum chunk_state state = atomic_load_explicit(state_of(backing, chunk), memory_order_acquire);
	bool wanted = state == CHUNK_EMPTY || state == CHUNK_PARTLY;
	if (wanted && !unpack(image, chunk, unpacker).code && claim(backing, chunk))
		put(backing, image, chunk, (struct content){.raw = unpacker->raw}, LR_OK);
}

/* True if there are such pages that it lacks. */
static bool lacks(const struct backing *backing, uint64_t chunk, struct content content) {
	uint16_t wanted = content.pages & ~content.but;
	return chunk - backing->first < backing->n && (wanted || content.pages == ALL_PAGES) && !backing_has(backing, chunk, wanted);
}

void backing_fill_frame(struct backing *backing, const struct image *image, const struct frame *frame, struct own_pages *own,
			struct unpacker *unpacker) {
	if (image_unpack_frame(image, frame, unpacker).code) {
		for (uint32_t i = frame->first; i < frame->first + frame->n; i++)
			backing_fill(backing, image, image->working_set[i].chunk, unpacker);
		return;
	}
	atomic_fetch_add_explicit(&fill_stats.bytes_read, frame->stored, memory_order_relaxed);
	struct content content = {.raw = unpacker->raw};
	for (uint32_t i = frame->first; i < frame->first + frame->n; i++) {
		const struct lr_touched *touched = &image->working_set[i];
		struct own_entry *entry = own_pages_find(own, touched->chunk);
		content.pages = touched->pages;
		content.but = entry ? entry->pages : 0;
		if (entry)
			own_pages_keep(own, entry, touched->pages, content.raw);
		if (lacks(backing, touched->chunk, content) && claim(backing, touched->chunk))
			put(backing, image, touched->chunk, content, LR_OK);
		content.raw += image_touched_bytes(image, touched);
	}
}

void backing_fill_own(struct backing *backing, const struct image *image, const struct own_pages *own, uint32_t chunk) {
	const struct own_entry *entry = own_pages_find(own, chunk);
	const char *raw = entry ? own_pages_bytes(own, entry, (uint32_t)__builtin_ctz(entry->pages)) : NULL;
	struct content content = {.raw = raw, .pages = entry ? entry->pages : ALL_PAGES};
	if (raw && lacks(backing, chunk, content) && claim(backing, chunk))
		put(backing, image, chunk, content, LR_OK);
}

bool backing_has(const struct backing *backing, uint64_t chunk, uint32_t pages) {
	if (chunk - backing->first >= backing->n)
		return false;
	return atomic_load_explicit(state_of(backing, chunk), memory_order_acquire) == CHUNK_FILLED ||
	       (pages != ALL_PAGES && !(pages & ~(uint32_t)present(backing, chunk)));
}

bool backing_has_page(const struct backing *backing, uint64_t chunk, uint32_t page) {
	return backing_has(backing, chunk, page < 16 ? 1u << page : ALL_PAGES);
}

bool backing_bring(struct backing *backing, const struct image *image, uint64_t chunk, uint32_t pages, struct unpacker *unpacker) {
	return backing_has(backing, chunk, pages) || backing_fill(backing, image, chunk, unpacker) == CHUNK_FILLED;
}

bool backing_is_untouched(const struct backing *backing, uint64_t chunk) {
	if (chunk - backing->first >= backing->n)
		return false;
	enum chunk_state state = atomic_load_explicit(state_of(backing, chunk), memory_order_acquire);
	return (state == CHUNK_EMPTY || state == CHUNK_BAD) && !present(backing, chunk);
}

struct lr_error backing_fill_all(struct backing *backing, const struct image *image, struct unpacker *unpacker) {
	for (uint64_t chunk = backing->first; chunk < backing->first + backing->n; chunk++)
		if (backing_fill(backing, image, chunk, unpacker) != CHUNK_FILLED)
			return lr_fail("filling a shared memory file", EBADMSG, image_chunk(image, chunk)->address);
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
				 (unsigned long long)image_chunk(image, chunk)->address);
	}
}

bool backing_is_complete(const struct backing *backing) {
	return atomic_load(&backing->n_filled) == backing->n;
}
