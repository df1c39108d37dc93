/* Facts. A stopped thread that was inside an interruptible system call has orig_rax = its number and rax = -ERESTART…
 * or -EINTR; the kernel restarts it when it next leaves for user mode with a signal (or a trap) pending, and a detach
 * always makes one pending. Setting orig_rax to -1 prevents the restart, so a diverted thread does not have its rip
 * moved back. PTRACE_SYSCALL stops at entry and at exit; PTRACE_O_TRACESYSGOOD marks both with SIGTRAP | 0x80.
 * A call with a signal mask of its own (epoll_pwait) leaves that mask in force until the thread has been through the signal
 * code; PTRACE_GETSIGMASK gives the mask from before the call, and PTRACE_SETSIGMASK puts it in force.
 */
#define _GNU_SOURCE
#include "trace.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "executor.h"

#ifndef PTRACE_GET_RSEQ_CONFIGURATION
#define PTRACE_GET_RSEQ_CONFIGURATION 0x420f /* Linux 5.13 */
#endif
_Static_assert(sizeof(struct lr_registers) == sizeof(struct user_regs_struct), "the kernel's register layout");

static int
result_of(long value)
{
	return value < 0 ? -errno : (int)value;
}

int lr_seize(int32_t tid, uint64_t options) { return result_of(ptrace(PTRACE_SEIZE, tid, 0, options)); }
int lr_set_options(int32_t tid, uint64_t options) { return result_of(ptrace(PTRACE_SETOPTIONS, tid, 0, options)); }
int lr_continue(int32_t tid, int32_t signal) { return result_of(ptrace(PTRACE_CONT, tid, 0, (long)signal)); }
int lr_detach(int32_t tid, int32_t signal) { return result_of(ptrace(PTRACE_DETACH, tid, 0, (long)signal)); }

int
lr_wait(int32_t tid, int32_t *status)
{
	pid_t got;
	do
		got = waitpid(tid, status, __WALL);
	while (got < 0 && errno == EINTR);
	return result_of(got);
}

int
lr_get_registers(int32_t tid, struct lr_registers *registers)
{
	struct iovec iov = {registers, sizeof *registers};
	return result_of(ptrace(PTRACE_GETREGSET, tid, NT_PRSTATUS, &iov));
}

int
lr_set_registers(int32_t tid, const struct lr_registers *registers)
{
	struct iovec iov = {(void *)registers, sizeof *registers};
	return result_of(ptrace(PTRACE_SETREGSET, tid, NT_PRSTATUS, &iov));
}

int
lr_get_xstate(int32_t tid, void *buffer, size_t *length)
{
	struct iovec iov = {buffer, *length};
	int error = result_of(ptrace(PTRACE_GETREGSET, tid, NT_X86_XSTATE, &iov));
	*length = iov.iov_len;
	return error;
}

int
lr_set_xstate(int32_t tid, const void *buffer, size_t length)
{
	struct iovec iov = {(void *)buffer, length};
	return result_of(ptrace(PTRACE_SETREGSET, tid, NT_X86_XSTATE, &iov));
}

int
lr_get_signal_mask(int32_t tid, uint64_t *mask)
{
	return result_of(ptrace(PTRACE_GETSIGMASK, tid, sizeof *mask, mask));
}

int
lr_set_signal_mask(int32_t tid, uint64_t mask)
{
	return result_of(ptrace(PTRACE_SETSIGMASK, tid, sizeof mask, &mask));
}

int
lr_peek_signals(int32_t tid, int32_t shared, uint64_t offset, void *infos, int32_t room)
{
	struct __ptrace_peeksiginfo_args args = {.off = offset, .flags = shared ? PTRACE_PEEKSIGINFO_SHARED : 0, .nr = room};
	return result_of(ptrace(PTRACE_PEEKSIGINFO, tid, &args, infos));
}

int
lr_get_rseq(int32_t tid, struct lr_rseq *rseq)
{
	long size = ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, sizeof *rseq, rseq);
	return size < 0 ? -errno : 0;
}

int
lr_get_robust_list(int32_t tid, uint64_t *head, uint64_t *length)
{
	return result_of(syscall(SYS_get_robust_list, tid, head, length));
}

int
lr_kcmp_file(int32_t pid, int32_t a, int32_t b)
{
	long order = syscall(SYS_kcmp, pid, pid, KCMP_FILE, (unsigned long)a, (unsigned long)b);
	return order == 0 ? 0 : order == 2 ? 1 : -1;
}

int lr_pidfd_open(int32_t pid) { return result_of(syscall(SYS_pidfd_open, pid, 0)); }
int lr_pidfd_getfd(int32_t pidfd, int32_t fd) { return result_of(syscall(SYS_pidfd_getfd, pidfd, fd, 0)); }

int
lr_pidfd_send_signal(int32_t pidfd, int32_t signal)
{
	return result_of(syscall(SYS_pidfd_send_signal, pidfd, signal, NULL, 0));
}

/* Whether a thread has been killed. Its flags tell before it reaches the stop of PTRACE_O_TRACEEXIT (get_signal() in
 * kernel/signal.c sets PF_SIGNALED, then do_exit() stops), and go on telling. */
static bool
is_killed(int32_t tid)
{
	enum { PF_EXITING = 0x4, PF_SIGNALED = 0x400 }; /* include/linux/sched.h */
	char path[48], text[512];
	unsigned flags;
	snprintf(path, sizeof path, "/proc/%d/stat", tid);
	int file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return errno == ENOENT;
	ssize_t length = read(file, text, sizeof text - 1);
	close(file);
	text[length > 0 ? length : 0] = 0;
	const char *behind_name = strrchr(text, ')');
	/* State, parent, group, session, terminal, its group, flags. */
	if (!behind_name || sscanf(behind_name + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1)
		return length < 0 && errno == ESRCH;
	return flags & (PF_EXITING | PF_SIGNALED);
}

/* Lets a stopped thread go and waits for its next stop. -ESRCH: it was killed, before or meanwhile.
 * A thread that was killed after its stop was met waits in a stop of its own, which a request takes away unseen; and of a leader
 * whose other threads nobody has collected, wait() tells nothing more: it would wait for ever. So it is asked in between. One that is
 * not killed then has yet to reach that stop, and wait() will tell. */
static int
go_on(int32_t tid, int request, int32_t *status)
{
	*status = 0;
	if (ptrace((enum __ptrace_request)request, tid, 0, 0) < 0)
		return -errno;
	if (is_killed(tid)) {
		*status = PTRACE_EVENT_EXIT << 16;
		return -ESRCH;
	}
	int got = lr_wait(tid, status);
	return got < 0 ? got : 0;
}

int lr_syscall_stop(int32_t tid, int32_t *status) { return go_on(tid, PTRACE_SYSCALL, status); }

int
lr_next_stop(int32_t tid, int32_t resume, int32_t *status, uint64_t *index, uint64_t *why, int64_t *result, int32_t *started,
	     int32_t room)
{
	struct lr_registers registers;
	for (;; resume = true) {
		unsigned long thread;
		*status = 0;
		int got = resume ? go_on(tid, PTRACE_CONT, status) : lr_wait(tid, status);
		if (got < 0)
			return got;
		if (!WIFSTOPPED(*status) || *status >> 16 != PTRACE_EVENT_CLONE || room-- <= 0)
			break;
		if (ptrace(PTRACE_GETEVENTMSG, tid, 0, &thread) < 0)
			return -errno;
		*started++ = (int32_t)thread;
	}
	if (!WIFSTOPPED(*status) || WSTOPSIG(*status) != SIGTRAP || *status >> 16)
		return -ECHILD;
	int error = lr_get_registers(tid, &registers);
	if (error)
		return error;
	*index = registers.rdi;
	*why = registers.rsi;
	*result = (int64_t)registers.rax;
	return 0;
}

int
lr_remote_syscall(int32_t tid, const struct lr_registers *base, uint64_t stub, uint64_t number, const uint64_t *args,
		  int64_t *result)
{
	struct lr_registers registers = *base;
	int32_t status;
	registers.rip = stub;
	registers.orig_rax = ~0ull;
	registers.rax = number;
	registers.rdi = args[0];
	registers.rsi = args[1];
	registers.rdx = args[2];
	registers.r10 = args[3];
	registers.r8 = args[4];
	registers.r9 = args[5];
	int error = lr_set_registers(tid, &registers);
	int stop_signal = 0;
	for (int stops = 0; !error && stops < 2;) {
		error = lr_syscall_stop(tid, &status);
		if (error)
			break;
		if (!WIFSTOPPED(status) || status >> 16 == PTRACE_EVENT_EXIT)
			return -ESRCH;
		if (WSTOPSIG(status) == (SIGTRAP | 0x80))
			stops++;
		else if (status >> 16 == 0 && WSTOPSIG(status) == SIGSTOP)
			stop_signal = 1; /* it cannot be blocked; the caller sends it again later */
		else if (status >> 16 == 0 && WSTOPSIG(status) != SIGTRAP)
			return -EINTR;
	}
	if (error)
		return error;
	error = lr_get_registers(tid, &registers);
	*result = (int64_t)registers.rax;
	return error ? error : stop_signal;
}

int
lr_signal_waits(int32_t tid, uint64_t signals)
{
	enum { ROOM = 32 };
	static _Thread_local siginfo_t infos[ROOM];
	for (int shared = 0; shared < 2; shared++) {
		int count;
		for (uint64_t offset = 0; (count = lr_peek_signals(tid, shared, offset, infos, ROOM)) > 0; offset += (uint64_t)count)
			for (int i = 0; i < count; i++)
				if (signals >> (infos[i].si_signo - 1) & 1)
					return 1;
	}
	return 0;
}

int
lr_settle(int32_t tid, uint64_t caught, uint64_t mask, struct lr_registers *registers)
{
	bool ended = (int64_t)registers->orig_rax >= 0;
	if (lr_signal_waits(tid, caught & ~mask) == ended)
		return 0;
	if (ended) {
		registers->rax = registers->orig_rax;
		registers->orig_rax = ~0ull;
		registers->rip -= 2; /* the syscall instruction */
	} else {
		registers->orig_rax = registers->rax;
		registers->rax = (uint64_t)-EINTR;
		registers->rip += 2;
	}
	/* The call that is made again brings its own mask; until then no signal may come that only that mask lets through. */
	int error = lr_set_signal_mask(tid, mask);
	return error ? error : lr_set_registers(tid, registers);
}

/* 1: in the stop that was asked for; 0: it ended; -errno. Signals that were on their way are delivered. */
static int
await_stop(int32_t tid, int32_t timeout_ms)
{
	struct timespec pause = {0, 200000};
	int32_t status;
	for (int64_t tries = 0;; tries++) {
		pid_t got = waitpid(tid, &status, __WALL | WNOHANG);
		if (got < 0 && errno != EINTR)
			return errno == ECHILD ? 0 : -errno;
		if (got > 0) {
			if (!WIFSTOPPED(status))
				return 0;
			if (status >> 16 == PTRACE_EVENT_STOP)
				return 1;
			ptrace(PTRACE_CONT, tid, 0, (long)WSTOPSIG(status));
		} else if (tries > 20000) { /* some ms of looking: it is in an uninterruptible wait */
			if ((tries - 20000) / 5 > timeout_ms)
				return -ETIMEDOUT;
			nanosleep(&pause, NULL);
		} else if (tries > 100) {
			sched_yield();
		}
	}
}

int
lr_stop_thread(int32_t tid, uint64_t options, const int32_t *again, int32_t count, uint64_t caught, int32_t timeout_ms,
	       struct lr_registers *registers, uint64_t *mask)
{
	int error = lr_seize(tid, options);
	if (error < 0)
		return error;
	if (ptrace(PTRACE_INTERRUPT, tid, 0, 0) < 0)
		return errno == ESRCH ? 0 : -errno;
	int stopped = await_stop(tid, timeout_ms);
	if (stopped <= 0)
		return stopped;
	error = lr_get_registers(tid, registers);
	if (!error)
		error = lr_get_signal_mask(tid, mask);
	if (error || (int64_t)registers->orig_rax < 0 || (int64_t)registers->rax != -EINTR)
		return error ? error : 1;
	for (int i = 0; i < count; i++)
		if ((int32_t)registers->orig_rax == again[i]) {
			error = lr_settle(tid, caught, *mask, registers);
			return error ? error : 2;
		}
	return 1;
}
