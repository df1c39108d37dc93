#define _GNU_SOURCE
#include "cgroup.h"

#include "result.h"
#include <errno.h>
#include <fcntl.h>
#include <mntent.h>
#include <stdio.h>
#include <string.h>

char *cgroup_of(pid_t pid) {
	char name[32], *line = NULL, *path = NULL;
	size_t room = 0;
	ssize_t length;
	snprintf(name, sizeof name, "/proc/%d/cgroup", (int)pid);
	FILE *file = pid > 0 ? fopen(name, "re") : NULL;
	while (file && !path && (length = getline(&line, &room, file)) > 0)
		if (!strncmp(line, "0::/", 4)) {
			line[strcspn(line, "\n")] = 0;
			path = strdup(line + 3);
		}
	free(line);
	if (file)
		fclose(file);
	return path;
}

bool cgroup_is_beyond(const char *path) {
	return !strcmp(path, "/..") || !strncmp(path, "/../", 4);
}

bool cgroup_covers(const char *above, const char *path) {
	size_t length = strlen(above);
	if (!strcmp(above, "/"))
		return !cgroup_is_beyond(path);
	return !strncmp(above, path, length) && (!path[length] || path[length] == '/');
}

/* The file that takes processes in; -1 with ENOTSUP. */
static int open_door(const char *path) {
	struct mntent mount;
	char names[8192], door[8192];
	int fd = -1, error = ENOTSUP;
	FILE *mounts = setmntent("/proc/self/mounts", "re");
	while (mounts && fd < 0 && getmntent_r(mounts, &mount, names, sizeof names)) {
		if (strcmp(mount.mnt_type, "cgroup2") != 0 ||
		    snprintf(door, sizeof door, "%s%s/cgroup.procs", mount.mnt_dir, path) >= (int)sizeof door)
			continue;
		fd = open(door, O_WRONLY | O_CLOEXEC);
		error = errno;
	}
	if (mounts)
		endmntent(mounts);
	errno = error;
	return fd;
}

int cgroup_move(pid_t pid, const char *path) {
	scoped_fd door = open_door(path);
	return door < 0 || dprintf(door, "%d", (int)pid) < 0 ? errno : 0;
}
