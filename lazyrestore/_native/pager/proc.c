#define _GNU_SOURCE
#include "proc.h"

#include "space.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

/* As in Linux 6.11; the headers of the build machine may be older. */
struct procmap_query_v1 {
	uint64_t size;
	uint64_t query_flags;
	uint64_t query_addr;
	uint64_t vma_start;
	uint64_t vma_end;
	uint64_t vma_flags;
	uint64_t vma_page_size;
	uint64_t vma_offset;
	uint64_t inode;
	uint32_t dev_major;
	uint32_t dev_minor;
	uint32_t vma_name_size;
	uint32_t build_id_size;
	uint64_t vma_name_addr;
	uint64_t build_id_addr;
};
#define PROCMAP_QUERY_V1 _IOWR('f', 17, struct procmap_query_v1)

/* The mapping that holds `address`, or ends after it. */
static bool find_in_text(int maps, uint64_t address, struct proc_place *place) {
	int copy = fcntl(maps, F_DUPFD_CLOEXEC, 0);
	FILE *lines = copy >= 0 && !lseek(copy, 0, SEEK_SET) ? fdopen(copy, "r") : NULL;
	if (!lines) {
		if (copy >= 0)
			close(copy);
		return false;
	}
	char line[8192]; /* a path of PATH_MAX bytes, escaped at worst in part: a longer line is read in pieces that do not parse */
	bool found = false;
	while (!found && fgets(line, sizeof line, lines)) {
		uint64_t start, end, offset, inode;
		unsigned major_number, minor_number;
		if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*4s %" SCNx64 " %x:%x %" SCNu64, &start, &end, &offset, &major_number,
			   &minor_number, &inode) != 6)
			continue;
		found = address < end;
		*place = (struct proc_place){start, end, makedev(major_number, minor_number), inode, offset};
	}
	fclose(lines);
	return found;
}

int proc_open(const struct space *space, const char *name, int flags) {
	char path[32];
	struct pollfd ended = {.fd = space->pidfd, .events = POLLIN};
	if (space->pidfd < 0)
		return -1;
	snprintf(path, sizeof path, "/proc/%d/%s", (int)space->pid, name);
	int file = open(path, flags | O_CLOEXEC);
	if (file < 0 || !poll(&ended, 1, 0))
		return file;
	close(file);
	return -1;
}

bool proc_place_quickly(struct space *space, uint64_t address, struct proc_place *place) {
	enum { COVERING_OR_NEXT = 0x10 };
	if (space->maps < 0)
		space->maps = proc_open(space, "maps", O_RDONLY);
	struct procmap_query_v1 query = {.size = sizeof query, .query_addr = address, .query_flags = COVERING_OR_NEXT};
	if (space->maps < 0 || ioctl(space->maps, PROCMAP_QUERY_V1, &query))
		return false;
	*place = (struct proc_place){query.vma_start, query.vma_end, makedev(query.dev_major, query.dev_minor), query.inode,
				    query.vma_offset};
	return true;
}

bool proc_place(struct space *space, uint64_t address, struct proc_place *place) {
	errno = 0;
	return proc_place_quickly(space, address, place) ||
	       (errno == ENOTTY && space->maps >= 0 && find_in_text(space->maps, address, place));
}

static bool open_task(struct space *space) {
	if (space->task < 0)
		space->task = proc_open(space, "task", O_RDONLY);
	return space->task >= 0;
}

int32_t pid_behind(int pidfd) {
	char path[64], line[128];
	long pid = 0;
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", pidfd);
	FILE *file = fopen(path, "re");
	if (!file)
		return 0;
	while (fgets(line, sizeof line, file))
		if (sscanf(line, "Pid: %ld", &pid) == 1)
			break;
	fclose(file);
	return pid > 0 ? (int32_t)pid : 0;
}

bool proc_one_thread(struct space *space) {
	struct stat about;
	return open_task(space) && !fstat(space->task, &about) && about.st_nlink == 3;
}

int32_t proc_own_number(struct space *space, int32_t thread) {
	char path[32], line[256];
	int number = 0;
	if (!open_task(space))
		return 0;
	snprintf(path, sizeof path, "%d/status", (int)thread);
	int status = openat(space->task, path, O_RDONLY | O_CLOEXEC);
	FILE *file = status >= 0 ? fdopen(status, "r") : NULL;
	if (!file) {
		scoped_close(&status);
		return 0;
	}
	while (fgets(line, sizeof line, file))
		if (!strncmp(line, "NSpid:", 6))
			number = atoi(strrchr(line, '\t') + 1); /* one for each namespace, the innermost last */
	fclose(file);
	return number;
}

void proc_tasks_init(struct proc_tasks *tasks, struct space *space) {
	tasks->directory = open_task(space) && !lseek(space->task, 0, SEEK_SET) ? space->task : -1;
	tasks->read = tasks->used = 0;
}

static bool read_call(int directory, const char *thread, struct proc_task *task) {
	char path[32], text[256];
	uint64_t *with = task->arguments;
	snprintf(path, sizeof path, "%.16s/syscall", thread);
	scoped_fd file = openat(directory, path, O_RDONLY | O_CLOEXEC);
	if (file < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM)) {
		*task = (struct proc_task){.thread = atoi(thread), .call = -1, .runs = true}; /* for all that is known */
		return true;
	}
	ssize_t length = file >= 0 ? read(file, text, sizeof text - 1) : -1;
	if (length <= 0)
		return false;
	text[length] = 0;
	*task = (struct proc_task){.thread = atoi(thread), .call = -1, .runs = !strncmp(text, "running", 7)};
	sscanf(text, "%ld %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64, &task->call, &with[0], &with[1], &with[2], &with[3],
	       &with[4]);
	return true;
}

bool proc_next_task(struct proc_tasks *tasks, struct proc_task *task) {
	while (tasks->directory >= 0) {
		if (tasks->used >= tasks->read) {
			tasks->read = syscall(SYS_getdents64, tasks->directory, tasks->entries, sizeof tasks->entries);
			tasks->used = 0;
			if (tasks->read <= 0)
				return false;
		}
		const struct dirent64 *entry = (const void *)(tasks->entries + tasks->used);
		tasks->used += entry->d_reclen;
		if (entry->d_name[0] != '.' && read_call(tasks->directory, entry->d_name, task))
			return true;
	}
	return false;
}
