/* Whether files are what they were. */
#pragma once
#include <stddef.h>
#include <stdint.h>

struct lr_signature { /* what stat() says of a file; times in ns */
	uint64_t device, inode;
	int64_t size, mtime, ctime;
};

/* `paths`: `count` of them, each ended by NUL. The number of the first from `first` on that does not lead to a file with that
 * signature; `count` if there is none. */
int32_t lr_changed_file(const char *paths, const struct lr_signature *seen, int32_t first, int32_t count);
