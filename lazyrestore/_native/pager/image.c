#include "image.h"

#include "log.h"
#include "stored.h"
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <zstd.h>

static bool inside(uint64_t offset, uint64_t length, uint64_t size) {
	return offset <= size && length <= size - offset;
}

/* CRC-32 as zlib's, eight bytes at a time: 2 us for a block of the index, where one table of 16 takes 13. */
static uint32_t crc_tables[8][256];

static void crc32_init(void) {
	for (uint32_t byte = 0; byte < 256; byte++) {
		uint32_t crc = byte;
		for (int bit = 0; bit < 8; bit++)
			crc = crc & 1 ? 0xedb88320 ^ crc >> 1 : crc >> 1;
		crc_tables[0][byte] = crc;
	}
	for (int table = 1; table < 8; table++)
		for (int byte = 0; byte < 256; byte++) {
			uint32_t crc = crc_tables[table - 1][byte];
			crc_tables[table][byte] = crc_tables[0][crc & 255] ^ crc >> 8;
		}
}

/* `before`: of what precedes the data, 0 if nothing does. */
static uint32_t crc32_of(uint32_t before, const void *data, size_t length) {
	const unsigned char *at = data;
	uint32_t crc = ~before;
	for (; length >= sizeof(uint64_t); length -= sizeof(uint64_t), at += sizeof(uint64_t)) {
		uint64_t word;
		memcpy(&word, at, sizeof word);
		word ^= crc;
		crc = 0;
		for (int table = 7; table >= 0; table--, word >>= 8)
			crc ^= crc_tables[table][word & 255];
	}
	for (; length; length--, at++)
		crc = crc_tables[0][(crc ^ *at) & 255] ^ crc >> 8;
	return ~crc;
}

static struct lr_error read_whole(int fd, void *buffer, size_t length, uint64_t offset) {
	for (size_t done = 0; done < length;) {
		ssize_t n = pread(fd, (char *)buffer + done, length - done, (off_t)(offset + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return lr_fail("pread", n < 0 ? errno : EIO, offset + done);
		done += (size_t)n;
	}
	return LR_OK;
}

void image_deinit(struct image *image) {
	if (image->verdicts && image->chunks)
		munmap(image->chunks, image->n_chunks * sizeof *image->chunks);
	if (image->map)
		munmap(image->map, image->map_length);
	free((void *)image->verdicts);
	free(image->packs);
	free(image->working_set);
	free(image->frames);
	if (image->data_fd >= 0)
		close(image->data_fd);
	*image = (struct image){.data_fd = -1};
}

static uint64_t n_blocks(const struct image *image) {
	return image->n_chunks / LR_INDEX_BLOCK + (image->n_chunks % LR_INDEX_BLOCK != 0);
}

static struct lr_error map_index(struct image *image, uint64_t offset, bool sums) {
	uint64_t entries = image->n_chunks * sizeof(struct lr_chunk);
	uint64_t bytes = entries + (sums ? n_blocks(image) * sizeof *image->sums : 0);
	if (image->n_chunks > UINT64_MAX / 2 / sizeof(struct lr_chunk) || !inside(offset, bytes, image->data_size))
		return lr_fail("image: index beyond the data file", EINVAL, offset);
	if (offset % _Alignof(struct lr_chunk))
		return lr_fail("image: index not aligned", EINVAL, offset);
	if (!bytes)
		return LR_OK;
	uint64_t first = offset & ~(uint64_t)(LR_PAGE - 1);
	image->map_length = bytes + (offset - first);
	image->map = mmap(NULL, image->map_length, PROT_READ, MAP_SHARED, image->data_fd, (off_t)first);
	if (image->map == MAP_FAILED) {
		image->map = NULL;
		return lr_fail("mmap of the index", errno, offset);
	}
	image->stored = (const struct lr_chunk *)((const char *)image->map + (offset - first));
	image->chunks = (struct lr_chunk *)image->stored;
	if (!sums)
		return LR_OK;
	void *copy = mmap(NULL, entries, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (copy == MAP_FAILED)
		return lr_fail("mmap of a copy of the index", errno, entries);
	image->chunks = copy;
	image->sums = (const uint32_t *)(image->stored + image->n_chunks);
	image->verdicts = calloc(n_blocks(image), 1);
	if (image->verdicts)
		return LR_OK;
	munmap(copy, entries);
	return lr_fail("calloc", ENOMEM, 0);
}

static struct lr_error read_frames(struct image *image, int image_fd, uint64_t table, uint32_t n, uint64_t offset) {
	scoped_free struct lr_frame *stored = calloc(n ? n : 1, sizeof *stored);
	image->frames = calloc(n ? n : 1, sizeof *image->frames);
	if (!stored || !image->frames)
		return lr_fail("calloc", ENOMEM, 0);
	struct lr_error error = read_whole(image_fd, stored, n * sizeof *stored, table);
	uint32_t first = 0;
	for (uint32_t i = 0; !error.code && i < n; i++) {
		if (!inside(offset, stored[i].stored, image->data_size) || !stored[i].chunks ||
		    stored[i].chunks > image->n_working_set - first)
			return lr_fail("image: frame beyond the data file or the working set", EINVAL, i);
		image->frames[i] = (struct frame){offset, stored[i].stored, first, stored[i].chunks, stored[i].tag};
		image->n_frames++;
		offset += stored[i].stored;
		first += stored[i].chunks;
	}
	return error;
}

struct lr_error image_init(int image_fd, int data_fd, struct image *image) {
	struct lr_image header;
	struct stat data, about;
	*image = (struct image){.data_fd = -1};
	crc32_init();
	if (fstat(data_fd, &data) || fstat(image_fd, &about))
		return lr_fail("fstat", errno, 0);
	struct lr_error error = read_whole(image_fd, &header, sizeof header, 0);
	if (error.code)
		return error;
	if (header.magic != LR_IMAGE_MAGIC || header.version != LR_PROTOCOL_VERSION)
		return lr_fail("image: magic or version", EPROTO, header.version);
	uint64_t packs_size = header.n_packs * (uint64_t)sizeof(struct lr_pack);
	uint64_t working_set_size = header.n_working_set * (uint64_t)sizeof(struct lr_touched);
	uint64_t frames_size = header.n_frames * (uint64_t)sizeof(struct lr_frame);
	if ((uint64_t)about.st_size != sizeof header + packs_size + working_set_size + frames_size)
		return lr_fail("image: size", EINVAL, (uint64_t)about.st_size);
	struct image made = {
		.data_fd = -1,
		.data_size = (uint64_t)data.st_size,
		.n_chunks = header.n_chunks,
		.n_packs = header.n_packs,
		.n_working_set = header.n_working_set,
		.hugetlb = header.flags & LR_IMAGE_HUGETLB,
		.packs = calloc(header.n_packs ? header.n_packs : 1, sizeof *made.packs),
		.working_set = calloc(header.n_working_set ? header.n_working_set : 1, sizeof *made.working_set),
	};
	made.data_fd = -1;
	if (!made.packs || !made.working_set) {
		image_deinit(&made);
		return lr_fail("calloc", ENOMEM, 0);
	}
	memcpy(made.name, header.name, sizeof made.name - 1);
	error = read_whole(image_fd, made.packs, packs_size, sizeof header);
	if (!error.code)
		error = read_whole(image_fd, made.working_set, working_set_size, sizeof header + packs_size);
	if (!error.code)
		error = read_frames(&made, image_fd, sizeof header + packs_size + working_set_size, header.n_frames,
				    header.frames_offset);
	for (uint32_t i = 0; !error.code && i < made.n_packs; i++)
		if (!inside(made.packs[i].offset, made.packs[i].length, made.data_size))
			error = lr_fail("image: pack beyond the data file", EINVAL, i);
	made.data_fd = data_fd;
	if (!error.code)
		error = map_index(&made, header.index_offset, header.flags & LR_IMAGE_SUMS);
	if (error.code) {
		made.data_fd = -1; /* the caller keeps it */
		image_deinit(&made);
		return error;
	}
	*image = made;
	return LR_OK;
}

enum index_verdict { INDEX_UNKNOWN, INDEX_SOUND, INDEX_DAMAGED };

static pthread_mutex_t verdict_lock = PTHREAD_MUTEX_INITIALIZER; /* one thread copies a block */

static enum index_verdict verdict_of(const struct image *image, uint64_t block) {
	uint64_t first = block * LR_INDEX_BLOCK;
	uint64_t n = image->n_chunks - first < LR_INDEX_BLOCK ? image->n_chunks - first : LR_INDEX_BLOCK;
	struct lr_chunk copy[LR_INDEX_BLOCK];
	memcpy(copy, image->stored + first, n * sizeof *copy);
	if (crc32_of(0, copy, n * sizeof *copy) == image->sums[block]) {
		memcpy(image->chunks + first, copy, n * sizeof *copy);
		return INDEX_SOUND;
	}
	log_line("snapshot %s: the index is damaged: chunks %llu to %llu cannot be read", image->name, (unsigned long long)first,
		 (unsigned long long)(first + n - 1));
	return INDEX_DAMAGED;
}

static bool is_sound(const struct image *image, uint64_t chunk) {
	if (!image->sums)
		return true;
	uint64_t block = chunk / LR_INDEX_BLOCK;
	uint8_t verdict = atomic_load_explicit(&image->verdicts[block], memory_order_acquire);
	if (verdict == INDEX_UNKNOWN) {
		pthread_mutex_lock(&verdict_lock);
		verdict = atomic_load_explicit(&image->verdicts[block], memory_order_relaxed);
		if (verdict == INDEX_UNKNOWN)
			verdict = (uint8_t)verdict_of(image, block);
		atomic_store_explicit(&image->verdicts[block], verdict, memory_order_release);
		pthread_mutex_unlock(&verdict_lock);
	}
	return verdict == INDEX_SOUND;
}

const struct lr_chunk *image_chunk(const struct image *image, uint64_t chunk) {
	is_sound(image, chunk);
	return &image->chunks[chunk];
}

/* The first chunk from `first` on that begins a sound block; `end` if there is none below it. Both are such chunks, or n_chunks. */
static uint64_t sound_from(const struct image *image, uint64_t first, uint64_t end) {
	while (first < end && !is_sound(image, first))
		first += LR_INDEX_BLOCK;
	return first < end ? first : end;
}

/* The first chunk of the last sound block that begins below `address`; false: there is none. */
static bool block_below(const struct image *image, uint64_t address, uint64_t *found) {
	uint64_t low = 0, high = n_blocks(image);
	bool any = false;
	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		uint64_t chunk = sound_from(image, middle * LR_INDEX_BLOCK, high * LR_INDEX_BLOCK);
		if (chunk < high * LR_INDEX_BLOCK && image->chunks[chunk].address < address) {
			*found = chunk;
			any = true;
			low = chunk / LR_INDEX_BLOCK + 1;
		} else {
			high = middle;
		}
	}
	return any;
}

uint64_t image_first_at(const struct image *image, uint64_t address) {
	uint64_t low;
	if (!block_below(image, address, &low))
		return 0;
	uint64_t high = image->n_chunks - low < LR_INDEX_BLOCK ? image->n_chunks : low + LR_INDEX_BLOCK;
	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		if (image->chunks[middle].address < address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

struct image_place image_find(const struct image *image, uint64_t address) {
	uint64_t above = image_first_at(image, address + 1);
	struct image_place place = {.hole = true, .end = UINT64_MAX};
	if (above) { /* in a sound block: that is how it was found */
		const struct lr_chunk *below = &image->chunks[above - 1];
		uint64_t end = below->address + below->length;
		if (address >= below->address && address < end && !((below->address | end) % LR_PAGE))
			return (struct image_place){.chunk = above - 1, .start = below->address, .end = end};
		place.start = end;
	}
	if (above < image->n_chunks) {
		uint64_t next = sound_from(image, above, image->n_chunks);
		if (next < image->n_chunks)
			place.end = image->chunks[next].address;
		place.damaged = next != above;
	}
	bool sane = address >= place.start && address < place.end && place.start % LR_PAGE == 0 &&
		    (place.end % LR_PAGE == 0 || place.end == UINT64_MAX);
	return sane ? place : (struct image_place){.damaged = true, .start = address, .end = address + 1};
}

struct lr_error unpacker_init(struct unpacker *unpacker) {
	size_t stored = ZSTD_compressBound(LR_MAX_CHUNK);
	*unpacker = (struct unpacker){
		.context = ZSTD_createDCtx(),
		.stored = malloc(stored),
		.raw = malloc(LR_MAX_CHUNK),
		.planes = malloc(LR_MAX_CHUNK),
	};
	if (unpacker->context && unpacker->stored && unpacker->raw && unpacker->planes)
		return LR_OK;
	unpacker_deinit(unpacker);
	return lr_fail("malloc", ENOMEM, 0);
}

void unpacker_deinit(struct unpacker *unpacker) {
	ZSTD_freeDCtx(unpacker->context);
	free(unpacker->stored);
	free(unpacker->raw);
	free(unpacker->planes);
	*unpacker = (struct unpacker){0};
}

static struct lr_error check(const struct image *image, uint64_t index) {
	const struct lr_chunk *chunk = &image->chunks[index];
	if (!is_sound(image, index))
		return lr_fail("index: checksum", EBADMSG, index);
	if (chunk->address % LR_PAGE || chunk->length % LR_PAGE || !chunk->length || chunk->length > LR_MAX_CHUNK ||
	    chunk->address > UINT64_MAX - chunk->length)
		return lr_fail("chunk: address or length", EBADMSG, chunk->address);
	if (index + 1 < image->n_chunks && is_sound(image, index + 1) &&
	    chunk->address + chunk->length > image->chunks[index + 1].address)
		return lr_fail("chunk: overlaps the next", EBADMSG, chunk->address);
	if (chunk->pack >= image->n_packs || !inside(chunk->offset, chunk->stored, image->packs[chunk->pack].length))
		return lr_fail("chunk: outside its pack", EBADMSG, chunk->address);
	return LR_OK;
}

/* What is stored in `stored` bytes at `offset` of the data file, which makes `length` bytes, a multiple of LR_PAGE; `address`: what to name in
 * an error. */
static struct lr_error unpack(const struct image *image, uint64_t offset, uint32_t stored, uint64_t length, uint64_t address,
			      struct unpacker *unpacker) {
	unpacker->held = 0;
	if (stored > ZSTD_compressBound(LR_MAX_CHUNK))
		return lr_fail("frame: stored size", EBADMSG, address);
	struct lr_error error = read_whole(image->data_fd, unpacker->stored, stored, offset);
	if (error.code)
		return error;
	const char *wrong = lr_from_stored(unpacker->context, unpacker->stored, stored, unpacker->planes, unpacker->raw, length);
	return wrong ? lr_fail(wrong, EBADMSG, address) : LR_OK;
}

struct lr_error image_unpack(const struct image *image, uint64_t index, struct unpacker *unpacker) {
	const struct lr_chunk *chunk = &image->chunks[index];
	struct lr_error error = check(image, index);
	if (error.code)
		return error;
	uint64_t offset = image->packs[chunk->pack].offset + chunk->offset;
	error = unpack(image, offset, chunk->stored, chunk->length, chunk->address, unpacker);
	unpacker->held = error.code ? 0 : index + 1;
	return error;
}

uint64_t image_touched_bytes(const struct image *image, const struct lr_touched *touched) {
	uint32_t n = image_chunk(image, touched->chunk)->length / LR_PAGE, page = 0;
	uint64_t bytes = 0;
	for (uint32_t end; (end = image_next_run(touched->pages, n, &page)); page = end)
		bytes += (end - page) * (uint64_t)LR_PAGE;
	return bytes;
}

struct lr_error image_unpack_frame(const struct image *image, const struct frame *frame, struct unpacker *unpacker) {
	uint64_t length = 0;
	for (uint32_t i = frame->first; i < frame->first + frame->n; i++) {
		uint32_t chunk = image->working_set[i].chunk;
		struct lr_error error = chunk < image->n_chunks ? check(image, chunk) : lr_fail("frame: chunk", EBADMSG, chunk);
		if (error.code)
			return error;
		length += image_touched_bytes(image, &image->working_set[i]);
	}
	if (length > LR_MAX_CHUNK)
		return lr_fail("frame: raw size", EBADMSG, length);
	struct lr_error error = unpack(image, frame->offset, frame->stored, length, frame->offset, unpacker);
	if (error.code)
		return error;
	uint32_t tag = 0;
	for (uint32_t i = frame->first; i < frame->first + frame->n; i++) {
		const struct lr_touched *touched = &image->working_set[i];
		tag = crc32_of(tag, &touched->chunk, sizeof touched->chunk);
		if (touched->pages != ALL_PAGES)
			tag = crc32_of(tag, &touched->pages, sizeof touched->pages);
	}
	tag = crc32_of(tag, (const char *)unpacker->stored + frame->stored - sizeof tag, sizeof tag);
	return tag == frame->tag ? LR_OK : lr_fail("frame: of other chunks", EBADMSG, frame->offset);
}
