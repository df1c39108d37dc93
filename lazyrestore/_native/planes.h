/* Memory as planes: the first bytes of all its 8-byte words, then their second bytes, and so on.
 *
 * Numbers in a row share most of their upper bytes, and zstd sees that only where these bytes stand together. A chunk that is
 * stored in planes is LR_PLANES_MARK, an empty skippable frame (RFC 8878, 3.1.2), and its planes as one zstd frame. */
#pragma once
#include <emmintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LR_PLANES = 8, LR_PLANES_BLOCK = 8 * sizeof(__m128i) }; /* lengths are multiples of it */

static const unsigned char LR_PLANES_MARK[8] = {0x58, 0x2a, 0x4d, 0x18}; /* with the length of its content, 0 */

/* Of 128 bytes, byte i goes to 2 * i, and byte 64 + i to 2 * i + 1: the address, as 7 bits, is rotated by one. */
static inline void
lr_interleave(__m128i block[8])
{
	__m128i made[8];
#pragma GCC unroll 4
	for (int i = 0; i < 4; i++) {
		made[2 * i] = _mm_unpacklo_epi8(block[i], block[i + 4]);
		made[2 * i + 1] = _mm_unpackhi_epi8(block[i], block[i + 4]);
	}
	memcpy(block, made, sizeof made);
}

/* 16 words of 8 bytes at a time: to have their numbers (4 bits) below those of their bytes (3 bits) takes 4 rotations, back 3. */
static inline void
lr_split_planes(const unsigned char *memory, size_t length, unsigned char *planes)
{
	for (size_t at = 0; at < length / LR_PLANES; at += sizeof(__m128i), memory += LR_PLANES_BLOCK) {
		__m128i block[8];
		memcpy(block, memory, sizeof block);
		lr_interleave(block);
		lr_interleave(block);
		lr_interleave(block);
		lr_interleave(block);
		for (size_t plane = 0; plane < LR_PLANES; plane++)
			memcpy(planes + plane * (length / LR_PLANES) + at, &block[plane], sizeof block[plane]);
	}
}

static inline void
lr_join_planes(const unsigned char *planes, size_t length, unsigned char *memory)
{
	for (size_t at = 0; at < length / LR_PLANES; at += sizeof(__m128i), memory += LR_PLANES_BLOCK) {
		__m128i block[8];
		for (size_t plane = 0; plane < LR_PLANES; plane++)
			memcpy(&block[plane], planes + plane * (length / LR_PLANES) + at, sizeof block[plane]);
		lr_interleave(block);
		lr_interleave(block);
		lr_interleave(block);
		memcpy(memory, block, sizeof block);
	}
}
