/* What the store keeps of memory, back to memory: one zstd frame, behind LR_PLANES_MARK if it is of planes.
 *
 * Shared by the pager, which counts on buffers of its own, and Python's side (decompress.h). The frame must tell its size and have a
 * checksum: without them, damage would go through. */
#pragma once
#include "planes.h"
#include <stdbool.h>
#include <zstd.h>

/* Writes the `length` bytes of memory, a multiple of LR_PLANES_BLOCK, of which `stored` bytes at `payload` are all that is stored.
 * `planes`: room for as many. NULL, or what is wrong with these bytes: a text that lasts. */
static inline const char *
lr_from_stored(ZSTD_DCtx *context, const void *payload, size_t stored, void *planes, void *memory, size_t length)
{
	enum { DESCRIPTOR = 4, CHECKSUM_FLAG = 1 << 2 }; /* RFC 8878, 3.1.1.1.1 */
	const unsigned char *frame = payload;
	bool in_planes = stored > sizeof LR_PLANES_MARK && !memcmp(frame, LR_PLANES_MARK, sizeof LR_PLANES_MARK);
	if (in_planes) {
		frame += sizeof LR_PLANES_MARK;
		stored -= sizeof LR_PLANES_MARK;
	}
	unsigned long long content = ZSTD_getFrameContentSize(frame, stored);
	if (content == ZSTD_CONTENTSIZE_ERROR)
		return "no zstd frame";
	if (content != length)
		return "a frame of another size";
	if (!(frame[DESCRIPTOR] & CHECKSUM_FLAG))
		return "a frame without a checksum";
	if (ZSTD_findFrameCompressedSize(frame, stored) != stored)
		return "a frame that ends too soon or too late";
	size_t n = ZSTD_decompressDCtx(context, in_planes ? planes : memory, length, frame, stored);
	if (ZSTD_isError(n))
		return ZSTD_getErrorName(n);
	if (n != length)
		return "fewer bytes than it tells";
	if (in_planes)
		lr_join_planes(planes, length, memory);
	return NULL;
}
