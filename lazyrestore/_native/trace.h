/* ptrace and its neighbours: functions that return 0 (or a count) or -errno. The calling thread must be the tracer. */
#pragma once
#include <stddef.h>
#include <stdint.h>

struct lr_registers { /* struct user_regs_struct of x86-64 */
	uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
	uint64_t orig_rax, rip, cs, eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs;
};

struct lr_rseq { /* struct ptrace_rseq_configuration, Linux 5.13 */
	uint64_t pointer;
	uint32_t size, signature, flags, reserved;
};

int lr_seize(int32_t tid, uint64_t options);
int lr_set_options(int32_t tid, uint64_t options);
int lr_continue(int32_t tid, int32_t signal);
int lr_detach(int32_t tid, int32_t signal);
int lr_wait(int32_t tid, int32_t *status); /* returns the tid waited for; tid -1: any */
int lr_get_registers(int32_t tid, struct lr_registers *registers);
int lr_set_registers(int32_t tid, const struct lr_registers *registers);
int lr_get_xstate(int32_t tid, void *buffer, size_t *length); /* length: in, the room; out, what there is */
int lr_set_xstate(int32_t tid, const void *buffer, size_t length);
int lr_get_signal_mask(int32_t tid, uint64_t *mask);
int lr_set_signal_mask(int32_t tid, uint64_t mask);
int lr_peek_signals(int32_t tid, int32_t shared, uint64_t offset, void *infos, int32_t room); /* returns how many siginfo_t, 128 bytes each */
int lr_get_rseq(int32_t tid, struct lr_rseq *rseq);
int lr_get_robust_list(int32_t tid, uint64_t *head, uint64_t *length);
int lr_kcmp_file(int32_t pid, int32_t a, int32_t b); /* 0: the same open file description; else the order, -1 or 1; -1 if one is gone */
int lr_pidfd_open(int32_t pid);
int lr_pidfd_getfd(int32_t pidfd, int32_t fd);
int lr_pidfd_send_signal(int32_t pidfd, int32_t signal);
int lr_syscall_stop(int32_t tid, int32_t *status); /* PTRACE_SYSCALL and wait for the next stop */

/* Let the executor go on to its next stop: 0, or -errno; index, why (enum lr_stop) and result as it left them in its
 * registers. A stop that is not the executor's own: -ECHILD with status set. With PTRACE_O_TRACECLONE, `started` gets the ids, as
 * we see them, of the threads that it starts meanwhile, `room` of them at most. */
int lr_next_stop(int32_t tid, int32_t resume, int32_t *status, uint64_t *index, uint64_t *why, int64_t *result, int32_t *started,
		 int32_t room);

/* One system call by a stopped thread, through the stub at `stub` (a syscall instruction at its first byte). The thread
 * must be in a ptrace stop; afterwards it is in a syscall-exit stop at the stub, and the caller sets its registers. 1: done, and a SIGSTOP that came
 * meanwhile was taken away. */
int lr_remote_syscall(int32_t tid, const struct lr_registers *base, uint64_t stub, uint64_t number, const uint64_t *args,
		      int64_t *result);

int lr_signal_waits(int32_t tid, uint64_t signals); /* whether one of them is pending for the thread or its process: 1 or 0 */

/* Whether a call that the kernel ended with -EINTR, and will not restart, stays ended: it does if a signal waits whose
 * handler will run (`caught`: those with one; not in `mask`, the mask from before the call); otherwise only the stop
 * ended it, and it is made again. `registers` are the thread's, as the stop or this function left them: it may be asked
 * again, since a signal may have come. They are set if the answer is another one. 0 or -errno. */
int lr_settle(int32_t tid, uint64_t caught, uint64_t mask, struct lr_registers *registers);

/* Seize a thread, stop it, and at once settle a call in `again` (system call numbers) that returns -EINTR. In one
 * function, because a tracer that is killed between the stop and the repair leaves the -EINTR to the thread. 1: stopped,
 * registers and mask filled; 2: so, and lr_settle() was asked; 0: the thread ended; -errno (-ETIMEDOUT after
 * `timeout_ms`, still seized). */
int lr_stop_thread(int32_t tid, uint64_t options, const int32_t *again, int32_t count, uint64_t caught, int32_t timeout_ms,
		   struct lr_registers *registers, uint64_t *mask);
