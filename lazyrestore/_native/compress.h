/* Chunks of memory to what the store keeps of them. */
#pragma once
#include <stddef.h>
#include <stdint.h>

struct lr_compressor; /* of one thread */

struct lr_content {
	uint64_t address, length; /* in this process; bytes, a multiple of 64, at most 2 MiB */
};

/* Take pages of zeros (4 KiB) off both ends of each; all of a whole one of 2 MiB, or nothing: a huge page arrives in one piece. */
void lr_trim_zeros(struct lr_content *contents, size_t count);

/* level: zstd's. At 1, data that hardly compresses is left as it is. NULL: no memory. */
struct lr_compressor *lr_compressor_new(int32_t level);
void lr_compressor_free(struct lr_compressor *compressor);

/* The most bytes that a chunk of `length` bytes takes. */
size_t lr_compress_bound(size_t length);

/* Compress contents[0 … count), one behind the other, to `out`, whose room is the sum of their bounds; sizes[i]: what each took. The same
 * contents give the same bytes. 0, or -errno. */
int lr_compress(struct lr_compressor *compressor, const struct lr_content *contents, size_t count, void *out, uint32_t *sizes);
