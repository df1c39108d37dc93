/* For Python, where few chunks are read: what cannot be lazy, and verify. The pager has its own (pager/image.c), which counts on buffers
 * and reads from the store. In C since importing zstandard takes as long as restoring a small process. */
#include "decompress.h"

#include "planes.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

enum { DESCRIPTOR = 4, CHECKSUM_FLAG = 1 << 2 }; /* RFC 8878, 3.1.1.1.1 */

static const char *
unpack(const unsigned char *frame, size_t stored, void *raw, size_t length)
{
	unsigned long long content = ZSTD_getFrameContentSize(frame, stored);
	if (content == ZSTD_CONTENTSIZE_ERROR)
		return "no zstd frame";
	if (content != length)
		return "a frame of another size";
	if (!(frame[DESCRIPTOR] & CHECKSUM_FLAG))
		return "a frame without a checksum";
	if (ZSTD_findFrameCompressedSize(frame, stored) != stored)
		return "a frame that ends too soon or too late";
	size_t n = ZSTD_decompress(raw, length, frame, stored);
	if (ZSTD_isError(n))
		return ZSTD_getErrorName(n);
	return n == length ? NULL : "fewer bytes than it tells";
}

const char *
lr_decompress(const void *payload, size_t stored, void *memory, size_t length)
{
	const unsigned char *frame = payload;
	if (stored < sizeof LR_PLANES_MARK || memcmp(frame, LR_PLANES_MARK, sizeof LR_PLANES_MARK) != 0)
		return unpack(frame, stored, memory, length);
	if (length % LR_PLANES_BLOCK)
		return "planes of impossible length";
	unsigned char *planes = malloc(length);
	if (!planes)
		return strerror(ENOMEM);
	const char *wrong = unpack(frame + sizeof LR_PLANES_MARK, stored - sizeof LR_PLANES_MARK, planes, length);
	if (!wrong)
		lr_join_planes(planes, length, memory);
	free(planes);
	return wrong;
}
