/* In C since importing zstandard takes as long as restoring a small process. */
#include "decompress.h"

#include "stored.h"
#include <errno.h>
#include <stdlib.h>

const char *
lr_decompress(const void *payload, size_t stored, void *memory, size_t length)
{
	ZSTD_DCtx *context = ZSTD_createDCtx();
	void *planes = malloc(length);
	const char *wrong = strerror(ENOMEM);
	if (length % LR_PLANES_BLOCK)
		wrong = "memory of impossible length";
	else if (context && planes)
		wrong = lr_from_stored(context, payload, stored, planes, memory, length);
	free(planes);
	ZSTD_freeDCtx(context);
	return wrong;
}
