/* Trying what one process may do to another: see features.h.
 *
 * Facts. Whether a tracer, a chosen process id or another's limits are allowed depends on capabilities, on the user
 * namespace, on security modules (Yama) and on seccomp filters of a container; none of these can be read off reliably.
 * Choice. Do it to a child that was made for that. The child is a raw clone() without an end signal, so that no handler
 * and no other waiter of this process notices; it makes system calls only (a lock of libc may be held by another
 * thread), and waits in read() on a pipe whose other end only we hold: when we die, it ends.
 * Cost. Each attempt copies this process's page tables once.
 */
#define _GNU_SOURCE
#include "features.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <linux/sched.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define FAILED(name) (*step = (name), errno)
#define SURPRISE(name) (*step = (name), EPROTO)

enum { PAGE = 4096, NOBODY = 65534, XSTATE_ROOM = 16384 /* AMX's state is 11 KiB */, INNER_PID = 300 };

/* A process that waits until it is killed, or until `release` is closed. */
struct victim {
	pid_t pid;
	int release, wait;
};

static int victim_init(struct victim *victim, const char **step)
{
	int ends[2];

	*victim = (struct victim){.pid = -1, .release = -1, .wait = -1};
	if (pipe2(ends, O_CLOEXEC))
		return FAILED("pipe2");
	victim->wait = ends[0];
	victim->release = ends[1];
	return 0;
}

static void victim_deinit(struct victim *victim)
{
	if (victim->pid > 0) {
		kill(victim->pid, SIGKILL);
		waitpid(victim->pid, NULL, __WALL);
	}
	if (victim->release >= 0)
		close(victim->release);
	if (victim->wait >= 0)
		close(victim->wait);
}

static long raw_fork(void)
{
	return syscall(SYS_clone, 0, NULL, NULL, NULL, NULL);
}

/* The child's side. */
static void victim_run(const struct victim *victim)
{
	char byte;

	close(victim->release);
	while (read(victim->wait, &byte, 1) == 1)
		;
	_exit(0);
}

static int victim_start(struct victim *victim, const char **step)
{
	int error = victim_init(victim, step);

	if (error)
		return error;
	if ((victim->pid = (pid_t)raw_fork()) < 0)
		return FAILED("clone");
	if (!victim->pid)
		victim_run(victim);
	return 0;
}

/* The same, but its parent is gone: no descendant of ours, unless orphans come to us. */
static int victim_start_stranger(struct victim *victim, const char **step)
{
	volatile pid_t *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int error = victim_init(victim, step);

	if (shared == MAP_FAILED)
		return FAILED("mmap");
	if (!error) {
		long parent = raw_fork();

		if (!parent) {
			long child = raw_fork();

			if (!child)
				victim_run(victim);
			*shared = (pid_t)child;
			_exit(0);
		}
		if (parent < 0 || waitpid((pid_t)parent, NULL, __WALL) != parent)
			error = FAILED("clone");
		else if ((victim->pid = *shared) <= 0)
			error = SURPRISE("clone");
	}
	munmap((void *)shared, sizeof *shared);
	return error;
}

/* The same, as another user where we may change to one; returns once it has. */
static int victim_start_other(struct victim *victim, const char **step)
{
	int ready[2], error = victim_init(victim, step);
	char byte = 0;

	if (error)
		return error;
	if (pipe2(ready, O_CLOEXEC))
		return FAILED("pipe2");
	if ((victim->pid = (pid_t)raw_fork()) < 0)
		error = FAILED("clone");
	if (!victim->pid) {
		syscall(SYS_setresuid, NOBODY, NOBODY, NOBODY);
		if (write(ready[1], &byte, 1) == 1)
			victim_run(victim);
		_exit(1);
	}
	close(ready[1]);
	if (!error && read(ready[0], &byte, 1) != 1)
		error = SURPRISE("clone");
	close(ready[0]);
	return error;
}

static int trace_stop(pid_t pid, long options, const char **step)
{
	int status;

	if (ptrace(PTRACE_SEIZE, pid, NULL, options))
		return FAILED("PTRACE_SEIZE");
	if (ptrace(PTRACE_INTERRUPT, pid, NULL, NULL))
		return FAILED("PTRACE_INTERRUPT");
	if (waitpid(pid, &status, __WALL) != pid)
		return FAILED("waitpid");
	return WIFSTOPPED(status) ? 0 : SURPRISE("PTRACE_INTERRUPT");
}

static int trace_basic(pid_t pid, const char **step)
{
	uint64_t registers[32], mask;
	struct iovec area = {registers, sizeof registers};

	if (ptrace(PTRACE_GETREGSET, pid, NT_PRSTATUS, &area))
		return FAILED("PTRACE_GETREGSET");
	if (ptrace(PTRACE_GETSIGMASK, pid, sizeof mask, &mask))
		return FAILED("PTRACE_GETSIGMASK");
	return ptrace(PTRACE_DETACH, pid, NULL, NULL) ? FAILED("PTRACE_DETACH") : 0;
}

static int trace_xstate(pid_t pid, const char **step)
{
	static _Thread_local uint8_t state[XSTATE_ROOM] __attribute__((aligned(64)));
	struct iovec area = {state, sizeof state};

	if (ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, &area))
		return FAILED("PTRACE_GETREGSET NT_X86_XSTATE");
	return ptrace(PTRACE_SETREGSET, pid, NT_X86_XSTATE, &area) ? FAILED("PTRACE_SETREGSET NT_X86_XSTATE") : 0;
}

static int trace_rseq(pid_t pid, const char **step)
{
	struct __ptrace_rseq_configuration rseq;

	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, pid, sizeof rseq, &rseq) < 0)
		return FAILED("PTRACE_GET_RSEQ_CONFIGURATION");
	return 0;
}

static int trace_memory(pid_t pid, uint64_t address, const char **step)
{
	char path[64];
	uint64_t written = 0x6c617a7972657374, found = 0;

	snprintf(path, sizeof path, "/proc/%d/mem", pid);
	int fd = open(path, O_RDWR | O_CLOEXEC);

	if (fd < 0)
		return FAILED("open /proc/PID/mem");
	int error = 0;

	if (pwrite(fd, &written, sizeof written, (off_t)address) != sizeof written)
		error = FAILED("write to /proc/PID/mem");
	else if (pread(fd, &found, sizeof found, (off_t)address) != sizeof found)
		error = FAILED("read from /proc/PID/mem");
	close(fd);
	if (error)
		return error;
	return found == written && *(const volatile uint64_t *)address != written ? 0 : SURPRISE("write to /proc/PID/mem");
}

int lr_try_trace(int what, uint64_t address, const char **step)
{
	struct victim victim __attribute__((cleanup(victim_deinit)));
	int error = what == LR_TRACE_STRANGER ? victim_start_stranger(&victim, step) : victim_start(&victim, step);

	if (!error)
		error = trace_stop(victim.pid, what == LR_TRACE_SECCOMP ? PTRACE_O_SUSPEND_SECCOMP : 0, step);
	if (error)
		return error;
	switch (what) {
	case LR_TRACE_XSTATE:
		return trace_xstate(victim.pid, step);
	case LR_TRACE_RSEQ:
		return trace_rseq(victim.pid, step);
	case LR_TRACE_MEMORY:
		return trace_memory(victim.pid, address, step);
	case LR_TRACE_SECCOMP:
		return 0;
	default:
		return trace_basic(victim.pid, step);
	}
}

static long clone_with(uint64_t flags, pid_t *wanted)
{
	struct clone_args arguments = {.flags = flags, .set_tid = (uintptr_t)wanted, .set_tid_size = wanted != NULL};

	return syscall(SYS_clone3, &arguments, sizeof arguments);
}

int lr_try_set_tid(const char **step)
{
	/* An id that was just freed; should somebody take it in between, the next one is tried. */
	for (int attempt = 0;; attempt++) {
		pid_t wanted = (pid_t)raw_fork();

		if (!wanted)
			_exit(0);
		if (wanted < 0 || waitpid(wanted, NULL, __WALL) != wanted)
			return FAILED("clone");
		long child = clone_with(0, &wanted);

		if (!child)
			_exit(0);
		if (child < 0 && errno == EEXIST && attempt < 8)
			continue;
		if (child < 0)
			return FAILED("clone3 with set_tid");
		waitpid((pid_t)child, NULL, __WALL);
		return child == wanted ? 0 : SURPRISE("clone3 with set_tid");
	}
}

/* The first process of the new namespace makes another one with a chosen id; its exit status is an errno. */
static void namespace_run(void)
{
	pid_t wanted = INNER_PID;

	if (syscall(SYS_getpid) != 1)
		_exit(EPROTO);
	long child = clone_with(0, &wanted);

	if (!child)
		_exit(0);
	if (child < 0)
		_exit(errno);
	waitpid((pid_t)child, NULL, __WALL);
	_exit(child == wanted ? 0 : EPROTO);
}

int lr_try_pid_namespace(const char **step)
{
	int status;
	long child = clone_with(CLONE_NEWPID, NULL);

	if (!child)
		namespace_run();
	if (child < 0)
		return FAILED("clone3 with CLONE_NEWPID");
	if (waitpid((pid_t)child, &status, __WALL) != child)
		return FAILED("waitpid");
	errno = WIFEXITED(status) ? WEXITSTATUS(status) : EPROTO;
	return errno ? FAILED("clone3 with set_tid in a new pid namespace") : 0;
}

int lr_try_kcmp(const char **step)
{
	struct victim victim __attribute__((cleanup(victim_deinit)));
	int error = victim_start(&victim, step);

	if (error)
		return error;
	long order = syscall(SYS_kcmp, getpid(), victim.pid, KCMP_FILE, victim.wait, victim.wait);

	if (order < 0)
		return FAILED("kcmp");
	return order == 0 ? 0 : SURPRISE("kcmp");
}

int lr_try_pidfd_getfd(const char **step)
{
	struct victim victim __attribute__((cleanup(victim_deinit)));
	int error = victim_start(&victim, step);

	if (error)
		return error;
	int pidfd = (int)syscall(SYS_pidfd_open, victim.pid, 0);

	if (pidfd < 0)
		return FAILED("pidfd_open");
	int fd = (int)syscall(SYS_pidfd_getfd, pidfd, victim.wait, 0);

	error = fd < 0 ? FAILED("pidfd_getfd") : 0;
	close(pidfd);
	if (fd >= 0)
		close(fd);
	return error;
}

int lr_try_prlimit(const char **step)
{
	struct victim victim __attribute__((cleanup(victim_deinit)));
	struct rlimit old;
	int error = victim_start_other(&victim, step);

	if (error)
		return error;
	if (prlimit(victim.pid, RLIMIT_NOFILE, NULL, &old) || prlimit(victim.pid, RLIMIT_NOFILE, &old, NULL))
		return FAILED("prlimit");
	return 0;
}

/* A page registered for EVENT_FORK with a new userfaultfd, which is returned; -errno on failure. */
static int register_for_fork(void)
{
	void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_FORK};
	struct uffdio_register reg = {.range = {(uintptr_t)page, PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (page == MAP_FAILED || uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &reg))
		return -errno;
	return uffd;
}

/* Tells its userfaultfd's number, waits for a byte, keeps no descriptor of it (a fork that holds the last one would
 * wait for itself), forks, and tells when that is done. */
static void forker_run(const struct victim *victim, int report)
{
	int uffd = register_for_fork(), sent = write(report, &uffd, sizeof uffd) == sizeof uffd;
	char byte = 0;

	close(victim->release);
	if (!sent || uffd < 0 || read(victim->wait, &byte, 1) != 1)
		_exit(1);
	close(uffd);
	long child = raw_fork();

	if (child > 0)
		waitpid((pid_t)child, NULL, __WALL);
	_exit(child < 0 || (child && write(report, &byte, 1) != 1));
}

/* Reads events until the forker is done or gone; whether its fork was among them. */
static bool fork_event_comes(int uffd, int report)
{
	struct pollfd polled[] = {{.fd = uffd, .events = POLLIN}, {.fd = report, .events = POLLIN}};
	struct uffd_msg message;
	bool seen = false;

	while (!polled[1].revents && (poll(polled, 2, -1) > 0 || errno == EINTR))
		if (polled[0].revents && read(uffd, &message, sizeof message) == sizeof message &&
		    message.event == UFFD_EVENT_FORK)
			seen = close((int)message.arg.fork.ufd) == 0;
	return seen;
}

static int fork_serve(const struct victim *victim, int report, const char **step)
{
	int number, pidfd, uffd, error = 0;
	char byte = 0;

	if (read(report, &number, sizeof number) != sizeof number)
		return SURPRISE("clone");
	if (number < 0)
		return errno = -number, FAILED("UFFDIO_API with EVENT_FORK");
	if ((pidfd = (int)syscall(SYS_pidfd_open, victim->pid, 0)) < 0)
		return FAILED("pidfd_open");
	if ((uffd = (int)syscall(SYS_pidfd_getfd, pidfd, number, 0)) < 0)
		error = FAILED("pidfd_getfd");
	close(pidfd);
	if (error)
		return error;
	if (write(victim->release, &byte, 1) != 1)
		error = FAILED("write");
	else if (!fork_event_comes(uffd, report))
		error = SURPRISE("EVENT_FORK");
	close(uffd);
	return error;
}

int lr_try_uffd_fork(const char **step)
{
	struct victim victim __attribute__((cleanup(victim_deinit)));
	int report[2], error = victim_init(&victim, step);

	if (error)
		return error;
	if (pipe2(report, O_CLOEXEC))
		return FAILED("pipe2");
	if ((victim.pid = (pid_t)raw_fork()) < 0)
		error = FAILED("clone");
	if (!victim.pid)
		forker_run(&victim, report[1]);
	close(report[1]);
	if (!error)
		error = fork_serve(&victim, report[0], step);
	close(report[0]);
	return error;
}
