#define _GNU_SOURCE
#include "files.h"

#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>

static int64_t
nanoseconds(const struct timespec *time)
{
	return time->tv_sec * 1000000000ll + time->tv_nsec;
}

static bool
is_the_same(const char *path, const struct lr_signature *seen)
{
	struct stat now;
	return !stat(path, &now) && now.st_ino == seen->inode && now.st_dev == seen->device && now.st_size == seen->size &&
	       nanoseconds(&now.st_mtim) == seen->mtime && nanoseconds(&now.st_ctim) == seen->ctime;
}

int32_t
lr_changed_file(const char *paths, const struct lr_signature *seen, int32_t first, int32_t count)
{
	for (int32_t i = 0; i < count; i++, paths += strlen(paths) + 1)
		if (i >= first && !is_the_same(paths, &seen[i]))
			return i;
	return count;
}
