/* A pager that leaves removes what others, who were killed, could not. By the rules of main.c: only under a socket's lock,
 * which whoever connects or starts holds, may the socket be found dead and be removed, and the lock file last. Nobody is
 * waited for. At the end of a pager, since nobody waits for that. */
#define _GNU_SOURCE
#include "sweep.h"

#include "result.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { SUFFIX = 5 };

/* True unless somebody listens there, or may. */
static bool is_dead(const char *socket_path) {
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	scoped_fd fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0 || strlen(socket_path) >= sizeof address.sun_path)
		return false;
	strcpy(address.sun_path, socket_path);
	return connect(fd, (struct sockaddr *)&address, sizeof address) && (errno == ECONNREFUSED || errno == ENOENT);
}

static void sweep(const char *directory, const char *name) {
	char lock_path[256], socket_path[256];
	struct stat held, found;
	int stem = (int)strlen(name) - SUFFIX;
	if (snprintf(lock_path, sizeof lock_path, "%s/%.*s.lock", directory, stem, name) >= (int)sizeof lock_path)
		return;
	snprintf(socket_path, sizeof socket_path, "%s/%.*s.sock", directory, stem, name);
	scoped_fd lock = open(lock_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (lock < 0 || flock(lock, LOCK_EX | LOCK_NB))
		return;
	if (fstat(lock, &held) || stat(lock_path, &found) || held.st_dev != found.st_dev || held.st_ino != found.st_ino)
		return; /* removed meanwhile, perhaps made again: not ours */
	if (!is_dead(socket_path))
		return;
	unlink(socket_path);
	unlink(lock_path);
}

void sweep_directory_of(const char *socket_path) {
	char directory[128];
	const char *slash = strrchr(socket_path, '/');
	if (!slash || (size_t)(slash - socket_path) >= sizeof directory)
		return;
	memcpy(directory, socket_path, (size_t)(slash - socket_path));
	directory[slash - socket_path] = 0;
	DIR *entries = opendir(directory);
	if (!entries)
		return;
	for (struct dirent *entry; (entry = readdir(entries));) {
		size_t length = strlen(entry->d_name);
		const char *suffix = entry->d_name + length - (length < SUFFIX ? length : SUFFIX);
		if (length > SUFFIX && (!strcmp(suffix, ".lock") || !strcmp(suffix, ".sock")))
			sweep(directory, entry->d_name);
	}
	closedir(entries);
}
