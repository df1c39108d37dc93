/* Files that processes map: whether they are what they were, and opening them. */
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

/* Opens those files, for reading, whose descriptor is -1, and puts it there. The number of the first that could not be opened,
 * with errno in `error`, or that has another signature, with 0 there, and stays closed; `count` if there is none. */
int32_t lr_open_files(const char *paths, const struct lr_signature *seen, int32_t count, int32_t *descriptors, int32_t *error);

/* Closes what is not negative of `count` descriptors, and puts -1 in their places. */
void lr_close_files(int32_t *descriptors, int32_t count);
