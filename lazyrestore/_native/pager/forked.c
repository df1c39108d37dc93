#define _GNU_SOURCE
#include "forked.h"

#include "../abi.h"
#include "proc.h"
#include <fcntl.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

enum { LOOKS_MAX = 16 };

void forked_begin(struct space *parent, struct space *child) {
	if (parent->pid_namespace < 0 && !parent->generation)
		parent->pid_namespace = proc_open(parent, "ns/pid_for_children", O_RDONLY);
	if (parent->pid_namespace >= 0)
		child->pid_namespace = fcntl(parent->pid_namespace, F_DUPFD_CLOEXEC, 0);
}

int32_t forked_thread(const struct space *space, const struct fault *fault) {
	struct stat own, its;
	if (space->pid_namespace < 0 || fstat(space->pid_namespace, &its) || stat("/proc/self/ns/pid", &own))
		return -1;
	if (own.st_dev == its.st_dev && own.st_ino == its.st_ino)
		return fault->thread;
	return ioctl(space->pid_namespace, NS_GET_PID_FROM_PIDNS, fault->thread);
}

/* Does the thread sleep where it was in user mode? */
static bool waits_for_a_page(int32_t thread) {
	char path[48], text[4] = "";
	snprintf(path, sizeof path, "/proc/%d/syscall", (int)thread);
	scoped_fd file = open(path, O_RDONLY | O_CLOEXEC);
	return file >= 0 && read(file, text, 3) == 3 && !strcmp(text, "-1 ");
}

/* A number in /proc/PID/status; 0: there is none. */
static int32_t status_of(int32_t pid, const char *format) {
	char path[48], line[256];
	int value = 0;
	snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
	FILE *file = fopen(path, "re");
	if (!file)
		return 0;
	while (!value && fgets(line, sizeof line, file))
		sscanf(line, format, &value);
	fclose(file);
	return value;
}

int32_t forked_process(int32_t thread) {
	return status_of(thread, "Tgid: %d");
}

static bool share_memory(int32_t one, int32_t other) {
	return !syscall(SYS_kcmp, one, other, KCMP_VM, 0, 0);
}

/* Is the page in these page tables, or swapped? */
static bool has_page(int pagemap, uint64_t address) {
	uint64_t entry = 0;
	return pread(pagemap, &entry, sizeof entry, (off_t)(address / LR_PAGE * sizeof entry)) != sizeof entry || entry >> 62;
}

static void close_look(struct forked_look *look) {
	scoped_close(&look->pidfd);
	scoped_close(&look->pagemap);
	look->pidfd = look->pagemap = -1;
}

bool forked_sought(const struct space *space) {
	return space->generation && space->child < 0 && space->looks < LOOKS_MAX;
}

struct forked_look forked_look(struct space *space, const struct fault *fault) {
	struct forked_look look = {.pidfd = -1, .pagemap = -1, .address = fault->address};
	if (!forked_sought(space))
		return look;
	space->looks++;
	int32_t thread = forked_thread(space, fault);
	if (thread <= 0 || !waits_for_a_page(thread))
		return look;
	int32_t pid = forked_process(thread);
	for (int32_t parent; pid > 0 && (parent = status_of(pid, "PPid: %d")) > 0 && share_memory(pid, parent);)
		pid = parent; /* which forked itself: a vfork's parent waits */
	if (pid <= 0)
		return look;
	char path[48];
	snprintf(path, sizeof path, "/proc/%d/pagemap", (int)pid);
	look.pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	look.pagemap = open(path, O_RDONLY | O_CLOEXEC);
	struct pollfd ended = {.fd = look.pidfd, .events = POLLIN};
	if (look.pidfd < 0 || look.pagemap < 0 || !share_memory(thread, pid) || has_page(look.pagemap, fault->address) ||
	    !waits_for_a_page(thread) || poll(&ended, 1, 0))
		close_look(&look);
	return look;
}

void forked_confirm(struct space *space, struct forked_look *look) {
	if (look->pidfd >= 0 && has_page(look->pagemap, look->address)) {
		pthread_mutex_lock(&space->pager->lock); /* somebody may be asking for statistics */
		space->child = fd_release(&look->pidfd);
		pthread_mutex_unlock(&space->pager->lock);
		space->pagemap = fd_release(&look->pagemap);
	}
	close_look(look);
}
