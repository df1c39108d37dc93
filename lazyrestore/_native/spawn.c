/* Facts. clone3(CLONE_VM | CLONE_VFORK) suspends the calling thread, and only that one, until the child has called
 * exec: the cost does not depend on the caller's memory, and other threads of the caller may hold any lock. The child
 * runs on the caller's memory with the caller's descriptors copied, so between clone and exec it may make system calls
 * and nothing else: no malloc, no locks, no errno (it is the caller's). set_tid needs CAP_CHECKPOINT_RESTORE; the PID
 * namespace for a child is the task's own (setns(CLONE_NEWPID) changes where *children* go), so it is entered on the
 * caller's thread and left again.
 *
 * PTRACE_TRACEME makes the parent of that moment the tracer. If the caller was killed, that is init or a subreaper, which
 * lets a traced process stand at its exec for ever. In another PID namespace getppid() is 0, whoever the parent is; /proc, which
 * is still the caller's, tells. Asked after PTRACE_TRACEME: a tracer that is killed later lets the process go, into its end.
 *
 * Consequence. All signals are blocked around it (a handler of the caller must not run in the child); the child resets
 * every disposition, because exec keeps ignored signals ignored.
 */
#define _GNU_SOURCE
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct child {
	struct lr_spawn *spawn;
	int error;
	int parent; /* its process id, as the child or /proc sees it; 0: unknown */
};

__attribute__((always_inline)) static inline long
raw(long number, long a, long b, long c, long d, long e)
{
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return result;
}

/* The parent of the calling process, as /proc shows it; 0: it does not. For the child. */
__attribute__((no_stack_protector, no_sanitize("address", "thread"))) static int
parent_in_proc(void)
{
	static const char path[] = "/proc/self/stat"; /* pid (name) state parent …: the name may be anything */
	char text[256];
	long fd = raw(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC, 0, 0), at;
	int parent = 0;
	if (fd < 0)
		return 0;
	long length = raw(SYS_read, fd, (long)text, sizeof text - 1, 0, 0);
	raw(SYS_close, fd, 0, 0, 0, 0);
	text[length > 0 ? length : 0] = 0;
	for (at = length - 1; at >= 0 && text[at] != ')'; at--)
		;
	if (at < 0 || at + 4 >= length)
		return 0;
	for (at += 4; text[at] >= '0' && text[at] <= '9'; at++)
		parent = parent * 10 + (text[at] - '0');
	return parent;
}

/* Runs in the child on its own stack; returns only on failure. */
__attribute__((noinline, no_stack_protector, no_sanitize("address", "thread"))) static void
child_main(struct child *child)
{
	struct lr_spawn *spawn = child->spawn;
	static const char *const nothing[] = {NULL};
	struct { uint64_t handler, flags, restorer, mask; } action = {0, 0, 0, 0};
	for (int sig = 1; sig <= 64; sig++)
		if (sig != SIGKILL && sig != SIGSTOP)
			raw(SYS_rt_sigaction, sig, (long)&action, 0, 8, 0);
#define STEP(number, call)                        \
	do {                                      \
		long result_ = (call);            \
		if (result_ < 0) {                \
			spawn->step = (number);   \
			child->error = (int)-result_; \
			return;                   \
		}                                 \
	} while (0)
	if (spawn->new_session == 1)
		STEP(LR_SPAWN_SESSION, raw(SYS_setsid, 0, 0, 0, 0, 0));
	if (spawn->new_session == 2)
		STEP(LR_SPAWN_SESSION, raw(SYS_setpgid, 0, 0, 0, 0, 0));
	if (spawn->descriptor_limit) {
		struct rlimit limit;
		STEP(LR_SPAWN_LIMIT, raw(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, (long)&limit, 0));
		if (limit.rlim_cur < spawn->descriptor_limit) {
			limit.rlim_cur = spawn->descriptor_limit;
			if (limit.rlim_max < limit.rlim_cur)
				limit.rlim_max = limit.rlim_cur;
			STEP(LR_SPAWN_LIMIT, raw(SYS_prlimit64, 0, RLIMIT_NOFILE, (long)&limit, 0, 0));
		}
	}
	/* What the caller left inheritable must not get in: the program counts on an empty table. */
	STEP(LR_SPAWN_DUP, raw(SYS_close_range, 0, ~0u, CLOSE_RANGE_CLOEXEC, 0, 0));
	/* Targets lie above every source that is still needed (the caller sees to it), so no dup3 overwrites one. */
	for (int i = 0; i < spawn->count; i++)
		STEP(LR_SPAWN_DUP, raw(SYS_dup3, spawn->source[i], spawn->target[i], 0, 0, 0));
	uint64_t mask = ~(1ull << (SIGTRAP - 1));
	raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&mask, 0, 8, 0);
	if (spawn->trace) {
		STEP(LR_SPAWN_TRACEME, raw(SYS_ptrace, PTRACE_TRACEME, 0, 0, 0, 0));
		bool apart = spawn->pid_namespace >= 0 || spawn->new_pid_namespace;
		if (child->parent && (apart ? parent_in_proc() : raw(SYS_getppid, 0, 0, 0, 0, 0)) != child->parent)
			return; /* the tracer is somebody else */
	}
	STEP(LR_SPAWN_EXEC, raw(SYS_execveat, spawn->executable, (long)"", (long)nothing, (long)nothing, AT_EMPTY_PATH));
#undef STEP
}

static long
clone_vfork(struct clone_args *args, struct child *child)
{
	long result;
	__asm__ volatile("mov %[child], %%rbx\n\t"
			 "syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "mov %%rbx, %%rdi\n\t"
			 "call *%[main]\n\t"
			 "mov $60, %%eax\n\t"
			 "mov $127, %%edi\n\t"
			 "syscall\n\t"
			 "ud2\n"
			 "1:"
			 : "=a"(result)
			 : "a"((long)SYS_clone3), "D"(args), "S"(sizeof *args), [child] "r"(child), [main] "r"(child_main)
			 : "rbx", "rcx", "r11", "memory");
	return result;
}

/* The calling process's id in the namespace that /proc shows, 0 if there is none. */
static int
own_id_in_proc(void)
{
	char text[16];
	ssize_t length = readlink("/proc/self", text, sizeof text - 1);
	text[length > 0 ? length : 0] = 0;
	return atoi(text);
}

int
lr_spawn(struct lr_spawn *spawn)
{
	enum { STACK = 64 << 10 };
	struct child child = {spawn, 0, spawn->pid_namespace < 0 && !spawn->new_pid_namespace ? getpid() : own_id_in_proc()};
	int pidfd = -1, own_namespace = -1;
	uint64_t all = ~0ull, old;
	int32_t wanted[1] = {spawn->wanted_pid};
	spawn->step = LR_SPAWN_CLONE;
	void *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	if (stack == MAP_FAILED)
		return -errno;
	struct clone_args args = {
		.flags = CLONE_VM | CLONE_VFORK | CLONE_PIDFD | (spawn->new_pid_namespace ? CLONE_NEWPID : 0),
		.pidfd = (uint64_t)(uintptr_t)&pidfd,
		.exit_signal = SIGCHLD,
		.stack = (uint64_t)(uintptr_t)stack,
		.stack_size = STACK,
		.set_tid = spawn->wanted_pid ? (uint64_t)(uintptr_t)wanted : 0,
		.set_tid_size = spawn->wanted_pid ? 1 : 0,
	};
	int error = 0;
	raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&all, (long)&old, 8, 0);
	if (spawn->pid_namespace >= 0) {
		own_namespace = open("/proc/thread-self/ns/pid_for_children", O_RDONLY | O_CLOEXEC);
		if (own_namespace < 0 || setns(spawn->pid_namespace, CLONE_NEWPID) < 0) {
			error = errno;
			spawn->step = LR_SPAWN_SETNS;
		}
	}
	if (!error) {
		long pid = clone_vfork(&args, &child);
		if (pid < 0)
			error = (int)-pid;
		else
			spawn->pid = (int32_t)pid;
	}
	if (own_namespace >= 0) {
		setns(own_namespace, CLONE_NEWPID);
		close(own_namespace);
	}
	raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&old, 0, 8, 0);
	munmap(stack, STACK);
	if (error)
		return -error;
	int status;
	if (child.error) {
		while (waitpid(spawn->pid, &status, __WALL) < 0 && errno == EINTR)
			;
		close(pidfd);
		spawn->pidfd = -1;
		return -child.error;
	}
	if (spawn->trace) {
		pid_t got;
		do
			got = waitpid(spawn->pid, &status, __WALL);
		while (got < 0 && errno == EINTR);
		if (got < 0 || !WIFSTOPPED(status)) {
			spawn->step = LR_SPAWN_WAIT;
			close(pidfd);
			spawn->pidfd = -1;
			return got < 0 ? -errno : -ECHILD;
		}
	}
	spawn->pidfd = pidfd;
	return 0;
}
