#define _GNU_SOURCE
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int64_t
nanoseconds(const struct timespec *time)
{
	return time->tv_sec * 1000000000ll + time->tv_nsec;
}

static bool
is_the_same(const struct stat *now, const struct lr_signature *seen)
{
	return now->st_ino == seen->inode && now->st_dev == seen->device && now->st_size == seen->size &&
	       nanoseconds(&now->st_mtim) == seen->mtime && nanoseconds(&now->st_ctim) == seen->ctime;
}

int32_t
lr_changed_file(const char *paths, const struct lr_signature *seen, int32_t first, int32_t count)
{
	struct stat now;
	for (int32_t i = 0; i < count; i++, paths += strlen(paths) + 1)
		if (i >= first && (stat(paths, &now) || !is_the_same(&now, &seen[i])))
			return i;
	return count;
}

int32_t
lr_open_files(const char *paths, const struct lr_signature *seen, int32_t count, int32_t *descriptors, int32_t *error)
{
	struct stat now;
	*error = 0;
	for (int32_t i = 0; i < count; i++, paths += strlen(paths) + 1) {
		if (descriptors[i] != -1)
			continue;
		/* What is in its place now may be anything: a pipe is not waited for, a terminal does not become ours. */
		int fd = open(paths, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
		if (fd >= 0 && !fstat(fd, &now) && is_the_same(&now, &seen[i])) {
			descriptors[i] = fd;
			continue;
		}
		if (fd >= 0)
			close(fd);
		else
			*error = errno;
		return i;
	}
	return count;
}

void
lr_close_files(int32_t *descriptors, int32_t count)
{
	for (int32_t i = 0; i < count; i++) {
		int fd = descriptors[i];
		descriptors[i] = -1;
		if (fd >= 0)
			close(fd);
	}
}
