/* Facts, measured on the memory of a numpy worker, 16 KiB at a time. zstd -1 takes 93 us for float arrays and leaves 0.48 of them; in
 * planes (planes.h), as literals of zstd's Huffman coder, they take 45 us, and 0.38 is left, which is unpacked in 19 instead of 27 us. In
 * planes of 4-byte words it would be 30 us for these, but half as good for 8-byte numbers; with matches 83 us for no gain. Each plane
 * needs a block of its own, for its own statistics. Text, pointers and anything that repeats are smaller as they are.
 * Choice. Neighbours are alike, so the way that was better for the last chunk is tried first; both where that chunk turns out otherwise
 * than the last, and every EVERY chunks. */
#define _GNU_SOURCE
#include "compress.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <zstd.h>

#include "planes.h"

enum { PAGE = 4096, MAX_CHUNK = 2 << 20, EVERY = 64 };

/* Of a chunk's length: */
static const double LITTLE = 0.1;   /* what is left of one that needs no other way */
static const double WELL = 0.35;    /* what is left of one that hardly needs one */
static const double DOUBTFUL = 0.7; /* what level 1 leaves of one that may be such: */
static const double POORLY = 0.8;   /* what level -1 leaves of one that is worth no more effort */

struct lr_compressor {
	ZSTD_CCtx *usual, *planes, *quick; /* quick: NULL if it is not to be used */
	unsigned char *apart;		   /* a chunk in planes */
	unsigned char *other;		   /* the result of another way, to compare */
};

static ZSTD_CCtx *
context_new(int level)
{
	ZSTD_CCtx *context = ZSTD_createCCtx();
	if (context) {
		ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, level);
		ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
	}
	return context;
}

/* Huffman coding, and matches only where they are long. */
static void
literals_only(ZSTD_CCtx *context)
{
	const ZSTD_cParameter literal_compression_mode = ZSTD_c_experimentalParam5;
	const int enable = 1;
	ZSTD_CCtx_setParameter(context, ZSTD_c_strategy, ZSTD_fast);
	ZSTD_CCtx_setParameter(context, ZSTD_c_minMatch, 7);
	ZSTD_CCtx_setParameter(context, ZSTD_c_hashLog, 8);
	if (!ZSTD_isError(ZSTD_CCtx_setParameter(context, literal_compression_mode, enable))) /* a large step turns it off */
		ZSTD_CCtx_setParameter(context, ZSTD_c_targetLength, 1 << 14);
}

struct lr_compressor *
lr_compressor_new(int32_t level)
{
	struct lr_compressor *made = calloc(1, sizeof *made);
	if (!made)
		return NULL;
	made->usual = context_new(level);
	made->planes = context_new(level);
	made->quick = level == 1 ? context_new(-1) : NULL;
	made->apart = malloc(MAX_CHUNK);
	made->other = malloc(lr_compress_bound(MAX_CHUNK));
	if (made->usual && made->planes && (made->quick || level != 1) && made->apart && made->other) {
		literals_only(made->planes);
		return made;
	}
	lr_compressor_free(made);
	return NULL;
}

void
lr_compressor_free(struct lr_compressor *compressor)
{
	ZSTD_freeCCtx(compressor->usual);
	ZSTD_freeCCtx(compressor->planes);
	ZSTD_freeCCtx(compressor->quick);
	free(compressor->apart);
	free(compressor->other);
	free(compressor);
}

size_t
lr_compress_bound(size_t length)
{
	return ZSTD_compressBound(length) + sizeof LR_PLANES_MARK;
}

/* One way of compressing a chunk: bytes written to `out`, of which there are lr_compress_bound; 0 if it failed. */
static size_t
as_it_is(ZSTD_CCtx *context, const void *content, size_t length, unsigned char *out)
{
	size_t size = ZSTD_compress2(context, out, lr_compress_bound(length), content, length);
	return ZSTD_isError(size) ? 0 : size;
}

static size_t
as_planes(struct lr_compressor *compressor, const void *content, size_t length, unsigned char *out)
{
	lr_split_planes(content, length, compressor->apart);
	memcpy(out, LR_PLANES_MARK, sizeof LR_PLANES_MARK);
	ZSTD_CCtx_reset(compressor->planes, ZSTD_reset_session_only);
	ZSTD_CCtx_setPledgedSrcSize(compressor->planes, length);
	ZSTD_inBuffer in = {.src = compressor->apart};
	ZSTD_outBuffer to = {.dst = out, .size = lr_compress_bound(length), .pos = sizeof LR_PLANES_MARK};
	while (in.size < length) {
		in.size += length / LR_PLANES;
		if (ZSTD_compressStream2(compressor->planes, &to, &in, in.size < length ? ZSTD_e_flush : ZSTD_e_end))
			return 0; /* an error, or no room: there is less than is pledged */
	}
	return to.pos;
}

static bool
is_zero(const char *page)
{
	static const char zeros[PAGE];
	return !memcmp(page, zeros, PAGE);
}

void
lr_trim_zeros(struct lr_content *contents, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		uint64_t first = contents[i].address, end = first + contents[i].length;
		while (first < end && is_zero((const char *)(uintptr_t)first))
			first += PAGE;
		while (first < end && is_zero((const char *)(uintptr_t)(end - PAGE)))
			end -= PAGE;
		if (first == end || contents[i].length != MAX_CHUNK)
			contents[i] = (struct lr_content){first, end - first};
	}
}

struct preference {
	bool planes;	  /* the way to be tried first */
	unsigned decided; /* chunks since both were */
	double left;	  /* of the last chunk, of its length */
};

/* Whether the way that is not preferred is worth a try, as the preferred one has left that much. */
static bool
is_doubtful(struct preference *prefer, double left)
{
	bool alike = left > prefer->left * 0.875 && left < prefer->left * 1.125;
	bool due = ++prefer->decided >= EVERY && left > LITTLE;
	prefer->left = left;
	return due || (!alike && (prefer->planes || left > WELL));
}

static size_t
compress_one(struct lr_compressor *compressor, struct preference *prefer, const void *content, size_t length, unsigned char *out)
{
	bool planes = prefer->planes;
	size_t size = planes ? as_planes(compressor, content, length, out) : as_it_is(compressor->usual, content, length, out);
	if (size && is_doubtful(prefer, (double)size / (double)length)) {
		prefer->decided = 0;
		size_t other = planes ? as_it_is(compressor->usual, content, length, compressor->other)
				      : as_planes(compressor, content, length, compressor->other);
		if (other && other < size) {
			memcpy(out, compressor->other, other);
			size = other;
			prefer->planes = planes = !planes;
			prefer->left = (double)size / (double)length;
		}
	}
	if (compressor->quick && !planes && (double)size > DOUBTFUL * (double)length) {
		size_t quick = as_it_is(compressor->quick, content, length, compressor->other);
		if ((double)quick > POORLY * (double)length) {
			memcpy(out, compressor->other, quick);
			return quick;
		}
	}
	return size;
}

int
lr_compress(struct lr_compressor *compressor, const struct lr_content *contents, size_t count, void *out, uint32_t *sizes)
{
	struct preference prefer = {.decided = EVERY}; /* the first chunk is tried both ways */
	unsigned char *at = out;
	for (size_t i = 0; i < count; i++) {
		if (!contents[i].length || contents[i].length > MAX_CHUNK || contents[i].length % LR_PLANES_BLOCK)
			return -EINVAL;
		const void *content = (const void *)(uintptr_t)contents[i].address;
		size_t size = compress_one(compressor, &prefer, content, contents[i].length, at);
		if (!size)
			return -ENOMEM;
		sizes[i] = (uint32_t)size;
		at += size;
	}
	return 0;
}
