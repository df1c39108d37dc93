"""Threads: registers, extended state, masks, TLS, stacks for signals, robust list, rseq, name, scheduling.

Facts. clone3() with set_tid gives a chosen thread id (CAP_CHECKPOINT_RESTORE), CLONE_CHILD_CLEARTID sets the tid
address, CLONE_SETTLS the fs base. The rest only the thread itself can set. A thread inside an interruptible system call
shows orig_rax = its number and rax = a restart code. The copy gets both, and the kernel does with them what it does
with the original's when the thread goes on: it restarts the call, or ends it with EINTR, as the handler of a pending
signal (restored too) says. But the copy has no restart block, so a call that the kernel would resume from one is made
anew, unless a handler ends it: nanosleep and clock_nanosleep with the remaining time (which the kernel has just
written, if the caller gave it a place), the others (poll, a futex wait with a relative time, a sleep without a place)
with their full time, so they are never cut short. Of one that was stopped twice the kernel no longer tells the number;
kernel/restarted.py finds it. A futex call that needs to write the word (FUTEX_LOCK_PI, …) gets
EFAULT where only a pager could bring the page, so those pages are brought before. So are those that the kernel itself
writes when the thread ends, to tell others: what is held of its robust list, and the word at the tid address, by which
it is joined. A thread that ends gets no userfaultfd (PF_EXITING, fs/userfaultfd.c): who waits would wait for ever.
Source: signal(7), kernel/futex, get_robust_list(2).
"""

from __future__ import annotations

import os
import re
import struct
from signal import SIGKILL, SIGSTOP

import msgspec

from lazyrestore._native import _core
from lazyrestore.errors import NoSuchProcess
from lazyrestore.kernel import procfs, restarted
from lazyrestore.kernel.tracee import ERESTART_RESTARTBLOCK, Frozen, Registers, call_again, check
from lazyrestore.program import OpList, Pointer, Program, lib

ffi = _core.ffi

PAGE = 4096
SIGINFO = 128  # bytes of a siginfo_t
ROBUST_LIST_LIMIT = 2048  # linux/futex.h
SCHED_DEADLINE = 6  # linux/sched.h
SCHED_FLAG_RESET_ON_FORK = 1
CPU_MASK = 1024  # bytes: for the 8192 CPUs that Linux can have on x86
XSTATE_ROOM = 16384  # AMX tiles take 8 KiB
THREAD_FLAGS = (
    lib.CLONE_VM
    | lib.CLONE_FS
    | lib.CLONE_FILES
    | lib.CLONE_SIGHAND
    | lib.CLONE_THREAD
    | lib.CLONE_SYSVSEM
    | lib.CLONE_SETTLS
    | lib.CLONE_CHILD_CLEARTID
    | lib.CLONE_PTRACE
)
FUTEX_TWO_WORDS = (3, 4, 5, 11, 12)  # REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_REQUEUE_PI, CMP_REQUEUE_PI: linux/futex.h
_CLONE_ARGS = struct.Struct("<11Q")
_OWN_LINES = re.compile(rb"^(?:Uid|Gid|Groups|Cap\w+|NoNewPrivs|Seccomp):.*$", re.MULTILINE)


class SignalStack(msgspec.Struct, frozen=True):
    address: int
    flags: int
    size: int


class Thread(msgspec.Struct, frozen=True):
    """One thread. registers and xstate are the kernel's layouts (user_regs_struct, XSAVE area), ready for ptrace."""

    tid: int
    name: bytes
    registers: bytes
    xstate: bytes
    signal_mask: int
    tid_address: int
    robust_list: int
    robust_length: int
    rseq: tuple[int, int, int]  # address, length, signature; address 0: none
    signal_stack: SignalStack
    pending: list[bytes]  # siginfo_t
    nice: int
    policy: int  # with SCHED_RESET_ON_FORK
    rt_priority: int
    affinity: list[int] | None  # None: all CPUs of the machine
    timer_slack: int
    io_priority: int
    last_words: list[int] = []  # addresses that the kernel reads and writes when the thread ends


def unsupported(pid: int) -> list[str]:
    """What a thread of the process has that threads usually share, or that cannot be given to another; a line each."""
    from lazyrestore.kernel import libc

    lines: list[str] = []
    leader, spaces = _own_lines(pid, pid), _namespaces(pid, pid)
    for tid in procfs.threads(pid):
        try:
            found = []
            own = leader if tid == pid else _own_lines(pid, tid)
            if own[-1] != b"Seccomp:\t0":
                found.append("seccomp filters" + (f" of thread {tid}" if tid != pid else ""))
            if os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK == SCHED_DEADLINE:
                found.append(f"thread {tid} is scheduled by deadlines (SCHED_DEADLINE)")
            if tid != pid:
                if own[:-1] != leader[:-1]:
                    found.append(f"thread {tid} has credentials of its own")
                if _namespaces(pid, tid) != spaces:
                    found.append(f"thread {tid} is in a namespace of its own")
                if not libc.same_place(pid, tid):
                    found.append(f"thread {tid} has a working directory, root and umask of its own (CLONE_FS)")
            if found and (tid == pid or not procfs.is_exiting(pid, tid)):
                lines += found
        except (NoSuchProcess, ProcessLookupError):
            continue
    return lines


def _own_lines(pid: int, tid: int) -> list[bytes]:
    """The lines of a thread's status that tell its credentials; the last one is Seccomp, 0 if the kernel has none."""
    found = _OWN_LINES.findall(procfs.read(pid, f"task/{tid}/status"))
    return found if found[-1].startswith(b"Seccomp:") else [*found, b"Seccomp:\t0"]


def _namespaces(pid: int, tid: int) -> list[str]:
    """Those that a single thread can leave, but for the mount namespace, which it cannot without CLONE_FS."""
    try:
        return [os.readlink(f"/proc/{pid}/task/{tid}/ns/{kind}") for kind in ("net", "ipc", "uts", "cgroup")]
    except FileNotFoundError as error:
        raise NoSuchProcess(f"thread {tid}", "read its namespaces", "no such thread") from error
    except PermissionError as error:  # so is a thread refused that has given back its memory
        if not procfs.is_exiting(pid, tid):
            raise
        raise NoSuchProcess(f"thread {tid}", "read its namespaces", "it ends") from error


def capture(frozen: Frozen, tid: int) -> Thread:
    """The state of one stopped thread; begin_calls() must have been called."""
    pid = frozen.pid
    with frozen.calls(tid) as call:
        check(call(lib.SYS_prctl, lib.PR_GET_TID_ADDRESS, frozen.scratch), pid, "PR_GET_TID_ADDRESS")
        check(call(lib.SYS_sigaltstack, 0, frozen.scratch + 8), pid, "sigaltstack")
        slack = call(lib.SYS_prctl, lib.PR_GET_TIMERSLACK)
        io_priority = call(lib.SYS_ioprio_get, 1, 0)
        tid_address, address, flags, size = struct.unpack("<QQixxxxQ", frozen.read(frozen.scratch, 32))
    head, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    check(lib.lr_get_robust_list(tid, head, length), pid, "get_robust_list")
    rseq = ffi.new("struct lr_rseq *")
    if lib.lr_get_rseq(tid, rseq) < 0:
        rseq.pointer = 0
    room, used = ffi.new("char[]", XSTATE_ROOM), ffi.new("size_t *", XSTATE_ROOM)
    check(lib.lr_get_xstate(tid, room, used), pid, "read extended state")
    stat = procfs.parse_stat(procfs.read(pid, f"task/{tid}/stat"))
    cpus = os.sched_getaffinity(tid)
    return Thread(
        tid=tid,
        name=procfs.read(pid, f"task/{tid}/comm").removesuffix(b"\n"),
        registers=_resumable(frozen, tid).pack(),
        xstate=bytes(ffi.buffer(room, used[0])),
        signal_mask=frozen.masks[tid],
        tid_address=tid_address,
        robust_list=head[0],
        robust_length=length[0],
        rseq=(rseq.pointer, rseq.size, rseq.signature),
        signal_stack=SignalStack(address, flags & ~1, size),  # SS_ONSTACK tells where it is, it is not a setting
        pending=pending_signals(tid, stat.pending, shared=False),
        nice=stat.nice,
        policy=os.sched_getscheduler(tid),
        rt_priority=stat.rt_priority,
        affinity=None if len(cpus) == os.cpu_count() else sorted(cpus),
        timer_slack=slack,
        io_priority=io_priority,
        last_words=_last_words(frozen, tid, tid_address, head[0], rseq.pointer),
    )


def _last_words(frozen: Frozen, tid: int, tid_address: int, head: int, rseq: int) -> list[int]:
    """But for what the thread has touched by then: the pages of its rseq area, and of the start of its TLS."""
    touched = {rseq // PAGE, frozen.registers[tid]["fs_base"] // PAGE}
    words = {tid_address} if tid_address and tid_address // PAGE not in touched else set()
    locks: list[int] = []
    offset = 0
    try:
        entry, offset, pending = struct.unpack("<QqQ", frozen.read(head, 24)) if head else (0, 0, 0)
        locks += [pending & ~1] if pending else []
        while (entry := entry & ~1) != head and len(locks) < ROBUST_LIST_LIMIT:  # bit 0: it inherits priorities
            locks.append(entry)
            entry = struct.unpack("<Q", frozen.read(entry, 8))[0]
    except (OSError, OverflowError, struct.error):  # the list leads nowhere: the kernel goes no further, either
        pass
    if locks:
        words |= {head, *locks, *((lock + offset) % 2**64 for lock in locks)}
    return sorted(words)


def pending_signals(tid: int, known: int, *, shared: bool) -> list[bytes]:
    """The siginfo_t of every signal that waits for the thread or (shared) for its process, in order.

    known: those that are known to wait, bit n-1 for signal n. What is not in the queue among them, for want of room
    (RLIMIT_SIGPENDING), will come with an empty siginfo_t, as the kernel has it then.
    """
    room = ffi.new(f"char[{64 * SIGINFO}]")
    infos: list[bytes] = []
    while (count := lib.lr_peek_signals(tid, shared, len(infos), room, 64)) > 0:
        infos += (bytes(ffi.buffer(room + index * SIGINFO, SIGINFO)) for index in range(count))
    if known:
        queued = {struct.unpack_from("<i", info)[0] for info in infos}
        waiting = {signal for signal in range(1, 65) if known >> (signal - 1) & 1} - {SIGKILL, SIGSTOP}
        infos += (struct.pack(f"<i{SIGINFO - 4}x", signal) for signal in sorted(waiting - queued))
    return infos


def _resumable(frozen: Frozen, tid: int) -> Registers:
    """The registers with which the copy goes on."""
    frozen.settle(tid)
    registers = frozen.registers[tid]
    if not registers.in_syscall or registers.result != -ERESTART_RESTARTBLOCK or frozen.handler_waits(tid):
        return registers
    number = registers["orig_rax"]
    if number == lib.SYS_restart_syscall:  # it was stopped before: by a snapshot, SIGSTOP, a debugger
        number = restarted.interrupted_call(registers, frozen.read)
    registers = call_again(registers, number)
    if number == lib.SYS_nanosleep and registers["rsi"]:
        registers["rdi"] = registers["rsi"]
    elif number == lib.SYS_clock_nanosleep and registers["r10"]:
        registers["rdx"] = registers["r10"]
    return registers


def futex_words(thread: Thread) -> list[int]:
    """The addresses that the thread's futex call names, if it may be made again, and those needed when it ends."""
    registers = Registers.unpack(thread.registers)
    if registers["orig_rax" if registers.in_syscall else "rax"] != lib.SYS_futex:
        return thread.last_words
    second = [registers["r8"]] if (registers["rsi"] & 0x7F) in FUTEX_TWO_WORDS else []
    return [registers["rdi"], *second, *thread.last_words]


# -- restore -----------------------------------------------------------------------------------------------------------


def restore_own(thread: Thread, program: Program, ops: OpList, *, leader: bool) -> None:
    """Append what the thread sets for itself. userfaultfd must be served: the kernel writes the rseq area."""
    with ops.serving(f"thread {thread.tid}"):
        if leader:
            ops.call(lib.SYS_set_tid_address, thread.tid_address)
        if thread.robust_list:
            ops.call(lib.SYS_set_robust_list, thread.robust_list, thread.robust_length)
        stack = thread.signal_stack
        if stack.address and not stack.flags & 2:  # SS_DISABLE
            ops.call(
                lib.SYS_sigaltstack, program.place(struct.pack("<QixxxxQ", stack.address, stack.flags, stack.size)), 0
            )
        address, length, signature = thread.rseq
        if address:
            ops.call(lib.SYS_rseq, address, length, 0, signature)
        ops.call(lib.SYS_prctl, lib.PR_SET_NAME, program.string(thread.name))
        # The restorer's own settings are inherited, so what equals the kernel's default must be set too.
        if thread.timer_slack > 0:
            ops.call(lib.SYS_prctl, lib.PR_SET_TIMERSLACK, thread.timer_slack)
        if thread.io_priority >= 0:
            ops.try_call(lib.SYS_ioprio_set, 1, 0, thread.io_priority)
        # The kernel takes of it the CPUs that there are. Whatever the restorer's is: the program does not depend on it.
        mask = bytearray(CPU_MASK if thread.affinity is not None else b"\xff" * CPU_MASK)
        for cpu in thread.affinity or ():
            mask[cpu // 8] |= 1 << cpu % 8
        ops.try_call(lib.SYS_sched_setaffinity, 0, CPU_MASK, program.string(bytes(mask)))
        if thread.policy or os.sched_getscheduler(0):
            policy = thread.policy & ~os.SCHED_RESET_ON_FORK
            flags = SCHED_FLAG_RESET_ON_FORK if policy != thread.policy else 0
            attributes = struct.pack("<IIQiIQQQ", 48, policy, flags, thread.nice, thread.rt_priority, 0, 0, 0)
            ops.call(lib.SYS_sched_setattr, 0, program.place(attributes), 0)
        elif thread.nice != os.getpriority(os.PRIO_PROCESS, 0):
            ops.call(lib.SYS_setpriority, lib.PRIO_PROCESS, 0, thread.nice)


def restore_pending(thread: Thread, pid: int, program: Program, ops: OpList) -> None:
    with ops.serving(f"thread {thread.tid} (pending signal)"):
        for info in thread.pending:
            signal = struct.unpack_from("<i", info)[0]
            ops.call(lib.SYS_rt_tgsigqueueinfo, pid, thread.tid, signal, program.place(info))


def restore_start(thread: Thread, program: Program, ops: OpList, own: OpList) -> None:
    """Append the creation of a thread that then runs its own list."""
    tid = program.place(struct.pack("<i", thread.tid))
    registers = Registers.unpack(thread.registers)
    stack_size = 1024
    # flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup
    flags = THREAD_FLAGS
    arguments = _CLONE_ARGS.pack(flags, 0, thread.tid_address, 0, 0, 0, stack_size, registers["fs_base"], 0, 1, 0)
    place = program.place(arguments)
    program.stack_of(Pointer(place.offset + 5 * 8), own)
    program.pointer_at(Pointer(place.offset + 8 * 8), tid)
    with ops.serving(f"thread {thread.tid}"):
        ops.start_thread(place, _CLONE_ARGS.size, own, thread.tid)
