#define _GNU_SOURCE
#include "keeper.h"

#include "log.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>

/* The keeper may be cloned from a process with threads: it allocates nothing and takes no lock. */

/* What getdents64 gives. */
struct entry {
	uint64_t inode, offset;
	unsigned short length;
	unsigned char type;
	char name[];
};

static bool is_ours(const struct keeper_files *files, uint64_t only, uint64_t device, uint64_t inode) {
	if (!inode)
		return false;
	uint32_t n = atomic_load(&files->n);
	for (uint32_t i = 0; i < n; i++)
		if (files->files[i].inode == inode && files->files[i].device == device && (!only || only == inode))
			return true;
	return false;
}

/* /proc/PID/maps: "start-end perms offset major:minor inode path"; device numbers are hexadecimal. */
struct maps_parser {
	unsigned field;
	bool between;
	uint64_t major, minor, inode;
	bool after_colon;
};

static bool maps_feed(struct maps_parser *parser, char c, const struct keeper_files *files, uint64_t only) {
	enum { DEVICE = 3, INODE = 4 };
	if (c == '\n') {
		bool hit = is_ours(files, only, makedev(parser->major, parser->minor), parser->inode);
		*parser = (struct maps_parser){0};
		return hit;
	}
	if (c == ' ') {
		parser->between = true;
		return false;
	}
	if (parser->between && parser->field <= INODE)
		parser->field++;
	parser->between = false;
	if (parser->field == DEVICE) {
		uint64_t *number = parser->after_colon ? &parser->minor : &parser->major;
		if (c == ':')
			parser->after_colon = true;
		else
			*number = *number * 16 + (uint64_t)(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
	} else if (parser->field == INODE) {
		parser->inode = parser->inode * 10 + (uint64_t)(c - '0');
	}
	return false;
}

static bool maps_ours(int proc, pid_t pid, const struct keeper_files *files, uint64_t only) {
	char buffer[8192];
	snprintf(buffer, sizeof buffer, "%d/maps", (int)pid);
	scoped_fd fd = openat(proc, buffer, O_RDONLY | O_CLOEXEC);
	struct maps_parser parser = {0};
	for (;;) {
		ssize_t n = fd < 0 ? 0 : read(fd, buffer, sizeof buffer);
		if (n <= 0)
			return false;
		for (ssize_t i = 0; i < n; i++)
			if (maps_feed(&parser, buffer[i], files, only))
				return true;
	}
}

/* A process is taken by pidfd first and looked at second: what is killed is what was looked at. */
static bool kill_if_ours(int proc, const char *name, const struct keeper_files *files, uint64_t only, bool wait) {
	pid_t pid = (pid_t)atoi(name);
	if (pid <= 0 || pid == getpid())
		return false;
	scoped_fd pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	if (pidfd < 0 || !maps_ours(proc, pid, files, only))
		return false;
	/* Another keeper: it has a copy of what the pager had mapped when it was cloned. */
	if (!syscall(SYS_kcmp, getpid(), pid, KCMP_FILES, 0, 0))
		return false;
	if (syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0))
		return false;
	if (!wait)
		log_line("killed process %d, whose memory nobody can serve any more", (int)pid);
	struct pollfd dead = {.fd = pidfd, .events = POLLIN};
	while (wait && poll(&dead, 1, -1) < 0 && errno == EINTR)
		;
	return true;
}

/* One pass over all processes. */
static unsigned kill_mappers(const struct keeper_files *files, uint64_t only, bool wait) {
	unsigned killed = 0;
	scoped_fd proc = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	_Alignas(8) char buffer[16384];
	long n;
	while (proc >= 0 && (n = syscall(SYS_getdents64, proc, buffer, sizeof buffer)) > 0)
		for (long at = 0; at < n; at += ((struct entry *)(void *)(buffer + at))->length)
			killed += kill_if_ours(proc, ((struct entry *)(void *)(buffer + at))->name, files, only, wait);
	return killed;
}

unsigned keeper_kill_mappers(const struct keeper_files *files, uint64_t only) {
	/* First all of them: a debugger may hold one in its last stop. Then again, since a fork may race. */
	unsigned killed = kill_mappers(files, only, false);
	while (kill_mappers(files, only, true))
		;
	return killed;
}

/* Calls `visit` with each socket that this process holds. */
static void each_socket(void (*visit)(int fd, bool listens)) {
	scoped_fd table = open("/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	_Alignas(8) char buffer[16384];
	long n;
	while (table >= 0 && (n = syscall(SYS_getdents64, table, buffer, sizeof buffer)) > 0)
		for (long at = 0; at < n; at += ((struct entry *)(void *)(buffer + at))->length) {
			int fd = atoi(((struct entry *)(void *)(buffer + at))->name), listens;
			if (!getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &(socklen_t){sizeof listens}))
				visit(fd, listens);
		}
}

static void accept_waiting(int fd, bool listens) {
	while (listens && accept4(fd, NULL, NULL, SOCK_CLOEXEC) >= 0)
		;
}

static void end_connection(int fd, bool listens) {
	if (!listens)
		shutdown(fd, SHUT_RDWR);
}

/* Clients must learn of the pager's death now, though its descriptors stay open: one may be the tracer of a new process,
 * which cannot die before its tracer lets it. So must those whom the pager had not accepted yet: who starts a pager lets a
 * process map its template meanwhile. Not so who connects from now on, as those do who hear of it: the next pager is to
 * come when the keeper is gone. Hence all are accepted before the first is told. */
static void end_connections(void) {
	each_socket(accept_waiting);
	each_socket(end_connection);
}

/* One keeper at a time: who comes first, then, when that one has ended, the next. By pidfds, which are in the table of all:
 * a lock would go with the table, not with its owner. */
static void await_turn(struct keeper_files *files) {
	int own = (int)syscall(SYS_pidfd_open, getpid(), 0), other = -1;
	while (own >= 0 && !atomic_compare_exchange_strong(&files->acting, &other, own)) {
		struct pollfd ended = {.fd = other, .events = POLLIN};
		while (other >= 0 && poll(&ended, 1, -1) <= 0)
			;
	}
}

static _Noreturn void keep(const struct keeper *keeper) {
	prctl(PR_SET_NAME, "lr-keeper");
	setsid(); /* what is sent to the pager's process group is not for this one */
	struct pollfd pager = {.fd = keeper->pager_pidfd, .events = POLLIN};
	while (poll(&pager, 1, -1) <= 0)
		;
	await_turn(keeper->files);
	if (keeper->files->settled)
		_exit(0);
	end_connections();
	unsigned killed = keeper_kill_mappers(keeper->files, 0);
	log_line("the pager died; the keeper ended %u processes", killed);
	keeper->files->settled = true; /* first: once it is unlinked, there may be a next pager's */
	unlink(keeper->socket_path);
	_exit(0);
}

struct lr_error keeper_init(struct keeper *keeper, const char *socket_path) {
	*keeper = (struct keeper){.pidfd = -1, .pager_pidfd = -1};
	if (strlen(socket_path) >= sizeof keeper->socket_path)
		return lr_fail("socket path", ENAMETOOLONG, 0);
	strcpy(keeper->socket_path, socket_path);
	keeper->files = mmap(NULL, sizeof *keeper->files, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (keeper->files == MAP_FAILED)
		return lr_fail("mmap of the keeper's list", errno, 0);
	keeper->files->acting = -1;
	keeper->pager_pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
	return keeper->pager_pidfd < 0 ? lr_fail("pidfd_open", errno, 0) : LR_OK;
}

struct lr_error keeper_start(struct keeper *keeper) {
	if (keeper->pidfd >= 0)
		close(keeper->pidfd);
	keeper->pidfd = -1;
	return keeper_clone(keeper, &keeper->pid, &keeper->pidfd);
}

struct lr_error keeper_clone(const struct keeper *keeper, pid_t *pid, int *pidfd) {
	int made = -1;
	struct clone_args arguments = {
		.flags = CLONE_FILES | CLONE_PIDFD,
		.pidfd = (uintptr_t)&made,
		.exit_signal = SIGCHLD,
	};
	long child = syscall(SYS_clone3, &arguments, sizeof arguments);
	if (child < 0)
		return lr_fail("clone3 of the keeper", errno, 0);
	if (!child)
		keep(keeper);
	*pid = (pid_t)child;
	*pidfd = made;
	return LR_OK;
}

void keeper_dismiss(struct keeper *keeper) {
	keeper->files->settled = true;
}

void keeper_deinit(struct keeper *keeper) {
	if (keeper->pidfd >= 0) {
		kill(keeper->pid, SIGKILL);
		waitpid(keeper->pid, NULL, 0);
		close(keeper->pidfd);
	}
	munmap(keeper->files, sizeof *keeper->files);
}

struct lr_error keeper_add(struct keeper *keeper, dev_t device, ino_t inode, uint32_t *slot) {
	struct keeper_files *files = keeper->files;
	for (uint32_t i = 0; i < KEEPER_FILES; i++)
		if (!files->files[i].inode) {
			files->files[i].device = device;
			files->files[i].inode = inode;
			if (i >= files->n)
				files->n = i + 1;
			*slot = i;
			return LR_OK;
		}
	return lr_fail("list of memory files", ENOSPC, inode);
}

void keeper_remove(struct keeper *keeper, uint32_t slot) {
	keeper->files->files[slot].inode = 0;
}
