"""A frozen process: all of its threads held by ptrace, and single system calls made by them on our behalf.

Facts. PTRACE_SEIZE does not disturb; PTRACE_INTERRUPT stops a thread (PTRACE_EVENT_STOP) and makes an interruptible
system call return -ERESTART… or -EINTR inside the kernel. When the tracer detaches or dies, the kernel marks a signal
as pending for every stopped thread, so it passes through the signal code on its way out and there restarts the call, if
orig_rax is still the call's number. A few calls return -EINTR instead of a restart code (epoll_wait, rt_sigtimedwait,
…; signal(7), "stop signals"); a process that was merely looked at would see that.

Consequence. A thread's registers are put back exactly as they were, and the kernel restarts what it would have
restarted. For the calls that return -EINTR, lr_settle() alone decides, at the stop and once more at the end, since a
signal may have come: with a signal pending whose handler will run they stay ended, otherwise rip is moved back over the
syscall instruction. What it left in the registers is not looked at again, neither for the stub nor for the copy.

The stub. Calls that only the process itself can make (rt_sigaction, sigaltstack, PR_GET_TID_ADDRESS, getitimer) run
from about 200 bytes in the zero padding behind the vdso's code. If the tracer is killed while a thread is in there, the
thread finishes by itself: it unmaps the scratch page, puts back its signal mask and its registers and jumps to where it
was. Nothing is written to the target's stack. At most one thread is diverted at a time. The cost: a private copy of one
vdso page remains in the target, its bytes as before. And where the kernel is no longer asked, because the tracer died,
a call that restarts or not as the handler's SA_RESTART says is made again.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from lazyrestore._native import _core
from lazyrestore.errors import AlreadyTraced, NoSuchProcess, NotPermitted, SnapshotFailed
from lazyrestore.kernel import procfs
from lazyrestore.kernel.host import STUB_LENGTH

lib = _core.lib
ffi = _core.ffi

# struct user_regs_struct's order
REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_REGISTERS = struct.Struct(f"<{len(REGISTERS)}Q")
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
RESTARTED = (-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND)
SYSCALL_LENGTH = 2  # bytes of the syscall instruction
STUB_PREFIX = b"\x0f\x05\x48\xbf"  # syscall; movabs …, %rdi
FREEZE_MS = 10000
MAIN_EXITED = "its main thread has exited, which is not supported"

# Calls that return -EINTR to a thread that was only stopped and continued; each may be made again.
_AGAIN = ffi.new(
    "int32_t[]",
    (
        lib.SYS_epoll_wait,
        lib.SYS_epoll_pwait,
        lib.SYS_epoll_pwait2,
        lib.SYS_rt_sigtimedwait,
        lib.SYS_semop,
        lib.SYS_semtimedop,
        lib.SYS_io_getevents,
        lib.SYS_accept,
        lib.SYS_accept4,
        lib.SYS_connect,
        lib.SYS_recvfrom,
        lib.SYS_recvmsg,
        lib.SYS_recvmmsg,
        lib.SYS_sendto,
        lib.SYS_sendmsg,
        lib.SYS_sendmmsg,
        lib.SYS_read,
        lib.SYS_readv,
        lib.SYS_preadv2,
        lib.SYS_write,
        lib.SYS_writev,
        lib.SYS_pwritev2,
        lib.SYS_sendfile,
        lib.SYS_splice,
    ),
)

HOLE_START = 0x10_0000_0000  # 64 GiB: above what is linked at fixed addresses, below where the kernel places mappings
HOLE_GAP = 1 << 20


def find_hole(mappings: list[procfs.Mapping], length: int) -> int:
    """The lowest address from HOLE_START on with `length` free bytes and a gap of HOLE_GAP on both sides."""
    at = HOLE_START
    for mapping in sorted(mappings, key=lambda mapping: mapping.start):
        if mapping.start >= at + length + HOLE_GAP:
            break
        if mapping.end + HOLE_GAP > at:
            at = mapping.end + HOLE_GAP
    return at


class Registers(dict[str, int]):
    """The general registers by name; `pack()` gives the kernel's layout."""

    @classmethod
    def unpack(cls, data: bytes) -> Registers:
        return cls(zip(REGISTERS, _REGISTERS.unpack(data), strict=True))

    def pack(self) -> bytes:
        return _REGISTERS.pack(*(self[name] for name in REGISTERS))

    @property
    def in_syscall(self) -> bool:
        return self["orig_rax"] < 1 << 63

    @property
    def result(self) -> int:
        rax = self["rax"]
        return rax - (1 << 64) if rax >= 1 << 63 else rax


def call_again(registers: Registers, number: int | None = None) -> Registers:
    """The registers that make the interrupted call once more (or `number` with the same arguments)."""
    again = Registers(registers)
    again["rax"] = registers["orig_rax"] if number is None else number
    again["rip"] = registers["rip"] - SYSCALL_LENGTH
    again["orig_rax"] = (1 << 64) - 1
    return again


def check(result: int, process: int, step: str) -> int:
    """A native function's result; negative ones become the exception that fits."""
    if result >= 0:
        return int(result)
    if -result == errno.ESRCH:
        raise NoSuchProcess(f"process {process}", step, "the process or thread is gone")
    if -result in (errno.EPERM, errno.EACCES):
        raise NotPermitted(
            f"process {process}", step, "", "run as root or as the owner with CAP_SYS_PTRACE", errno=-result
        )
    raise SnapshotFailed(f"process {process}", step, errno=-result)


class Frozen:
    """Context manager: every thread of `pid` stopped; on leaving, every thread goes on as it was.

    `tids` are ascending with the leader (== pid) first. The thread that enters must be the one that leaves (ptrace).
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.tids: list[int] = []
        self.registers: dict[int, Registers] = {}
        self.masks: dict[int, int] = {}
        self.memory = -1
        self._stub: int | None = None
        self._scratch = 0
        self._seized: set[int] = set()
        self._caught = 0  # signals with a handler
        self._settled: set[int] = set()  # threads whose interrupted call lr_settle() decides
        self._stop_came = False
        self._registers, self._mask = ffi.new("struct lr_registers *"), ffi.new("uint64_t *")

    def __enter__(self) -> Frozen:
        try:
            self._open_memory()
            self._freeze()
            # Again: if it has exec'ed meanwhile, that was the memory of the program before, and its handlers.
            self._open_memory()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.end_calls()
        except NoSuchProcess:
            pass  # it was killed meanwhile: nothing to put back
        finally:
            # The leader first: a traced one makes the kernel queue signals that the process ignores, and wake threads
            # for them.
            for tid in sorted(self._seized, key=lambda tid: tid != self.pid):
                with suppress(NoSuchProcess):
                    self.settle(tid)
                lib.lr_detach(tid, 0)
            self._seized.clear()
            if self._stop_came:
                self._stop_came = False
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGSTOP)
            self._close_memory()

    def kill(self) -> None:
        """End the process, and collect its threads: a traced thread stays a zombie until its tracer has seen it end.

        The leader's exit status is left to its parent.
        """
        parent = procfs.parse_stat(procfs.read(self.pid, "stat")).ppid
        os.kill(self.pid, signal.SIGKILL)
        status = ffi.new("int32_t *")
        for tid in sorted(self._seized, key=lambda tid: tid == self.pid):
            if tid != self.pid or parent != os.getpid():
                while lib.lr_wait(tid, status) >= 0 and os.WIFSTOPPED(status[0]):
                    continue
        self._seized.clear()
        self._stub, self.tids = None, []

    # -- stopping ------------------------------------------------------------------------------------------------------

    def _close_memory(self) -> None:
        memory, self.memory = self.memory, -1
        if memory >= 0:
            os.close(memory)

    def _open_memory(self) -> None:
        self._close_memory()
        try:
            self.memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise NoSuchProcess(f"process {self.pid}", "open its memory", "it ended") from error
        self._caught = int(procfs.parse_status(procfs.read(self.pid, "status"))["SigCgt"], 16)

    def _freeze(self) -> None:
        while True:
            new = [tid for tid in procfs.threads(self.pid) if tid not in self._seized]
            if not new:
                break
            for tid in sorted(new, key=lambda tid: tid == self.pid):  # the leader last: see __exit__
                self._stop(tid)
            if not self._seized:
                raise NoSuchProcess(f"process {self.pid}", "attach", "it ended")
        self.tids = [self.pid, *sorted(self._seized - {self.pid})]
        if self.pid not in self._seized:
            raise SnapshotFailed(f"process {self.pid}", "freeze", MAIN_EXITED)

    def _stop(self, tid: int) -> None:
        """Seize and stop one thread, and at once put right what the stop did to it.

        So a tracer that dies leaves nothing to do.
        A thread in an rseq critical section goes to its abort handler, as after any preemption: it is about to run
        other code, which ends the section's protection.
        """
        result = lib.lr_stop_thread(
            tid, lib.PTRACE_O_TRACESYSGOOD, _AGAIN, len(_AGAIN), self._caught, FREEZE_MS, self._registers, self._mask
        )
        if result in (0, -errno.ESRCH):  # it ended between the listing and now
            return
        if result == -errno.ETIMEDOUT:
            self._seized.add(tid)
            advice = "it may be in an uninterruptible wait"
            raise SnapshotFailed(f"thread {tid}", "freeze", f"did not stop within {FREEZE_MS / 1000:.0f} s", advice)
        if result == -errno.EPERM:  # also what a thread answers whose end nobody has collected yet
            try:
                status = procfs.parse_status(procfs.read(self.pid, f"task/{tid}/status"))
            except NoSuchProcess:
                return
            if status["State"][0] in "ZX":
                if tid == self.pid and self._seized:
                    raise SnapshotFailed(f"process {self.pid}", "freeze", MAIN_EXITED)
                if tid == self.pid:
                    raise NoSuchProcess(f"process {self.pid}", "attach", "it ended")
                return
            if tracer := int(status.get("TracerPid", "0")):
                by = f"already traced by process {tracer}"
                raise AlreadyTraced(f"process {self.pid}", "attach", by, "detach that tracer first")
        check(result, self.pid, "attach")
        self._seized.add(tid)
        if result == 2:
            self._settled.add(tid)
        state = Registers.unpack(bytes(ffi.buffer(self._registers)))
        self.masks[tid] = self._mask[0]
        if not state.in_syscall:
            abort = self._rseq_abort(tid, state["rip"])
            if abort:
                state["rip"] = abort
                self._set(tid, state)
        self.registers[tid] = state

    def settle(self, tid: int) -> None:
        """Decide once more whether the thread's interrupted call stays ended: a signal may have come since."""
        if tid in self._settled:
            packed = bytearray(self.registers[tid].pack())
            registers = ffi.from_buffer("struct lr_registers *", packed)
            check(lib.lr_settle(tid, self._caught, self.masks[tid], registers), self.pid, "settle a call")
            self.registers[tid] = Registers.unpack(bytes(packed))

    def handler_waits(self, tid: int) -> bool:
        """Whether a signal waits for the thread whose handler will run before the thread goes on."""
        return bool(lib.lr_signal_waits(tid, self._caught & ~self.masks[tid]))

    def _rseq_abort(self, tid: int, rip: int) -> int:
        """The abort handler of the rseq critical section that `rip` is in, 0 if it is in none; the section is left."""
        rseq = ffi.new("struct lr_rseq *")
        if lib.lr_get_rseq(tid, rseq) < 0 or not rseq.pointer:
            return 0
        section = struct.unpack("<Q", self.read(rseq.pointer + 8, 8))[0]
        if not section:
            return 0
        _, _, start, length, abort = struct.unpack("<IIQQQ", self.read(section, 32))
        if not start <= rip < start + length:
            return 0
        os.pwrite(self.memory, bytes(8), rseq.pointer + 8)
        return int(abort)

    def _set(self, tid: int, registers: Registers) -> None:
        packed = ffi.from_buffer("struct lr_registers *", registers.pack())
        check(lib.lr_set_registers(tid, packed), self.pid, "set registers")

    # -- calls made by the process itself ------------------------------------------------------------------------------

    def begin_calls(self) -> None:
        """Find a place for the stub, and let the process map the scratch page."""
        self._stub = self._find_stub()
        address = find_hole(procfs.parse_maps(procfs.read(self.pid, "maps")), 4096)
        self._scratch = address
        protection = lib.PROT_READ | lib.PROT_WRITE
        flags = lib.MAP_PRIVATE | lib.MAP_ANONYMOUS | lib.MAP_FIXED_NOREPLACE
        with _Diverted(self, self.pid) as call:
            result = call(lib.SYS_mmap, address, 4096, protection, flags, -1, 0)
        if result != address:
            self._scratch = 0
            advice = "raise its RLIMIT_AS (prlimit --as --pid) or vm.max_map_count" if result == -errno.ENOMEM else ""
            raise SnapshotFailed(f"process {self.pid}", "map a scratch page", advice=advice, errno=-result)

    def end_calls(self) -> None:
        """Unmap the scratch page and put back the padding."""
        if self._stub is None:
            return
        if self._scratch:
            with _Diverted(self, self.pid) as call:
                call(lib.SYS_munmap, self._scratch, 4096)
            self._scratch = 0
        os.pwrite(self.memory, bytes(STUB_LENGTH), self._stub)
        self._stub = None

    def calls(self, tid: int) -> _Diverted:
        """`with frozen.calls(tid) as call: call(number, …)`: system calls by that thread."""
        return _Diverted(self, tid)

    @property
    def scratch(self) -> int:
        """A page of the target for results and arguments, between begin_calls and end_calls."""
        return self._scratch

    def read(self, address: int, length: int) -> bytes:
        """Bytes of the process's memory.

        It waits for a pager, if that is where they come from; /proc/PID/mem would not.
        """
        buffer, failed = ffi.new("char[]", length), ffi.new("uint64_t *")
        run = ffi.new("struct lr_run *", (address, 0, length))
        if lib.lr_copy_runs(self.pid, run, 1, buffer, 1, failed) == 0:
            return bytes(ffi.buffer(buffer))
        return os.pread(self.memory, length, address)

    def _find_stub(self) -> int:
        """The last STUB_LENGTH bytes of an executable private mapping that are padding behind its code: nothing but
        zeros, or a stub that a killed snapshotter left there and that no thread is in."""
        mappings = procfs.parse_maps(procfs.read(self.pid, "maps"))
        mappings.sort(key=lambda mapping: mapping.path != "[vdso]")
        for mapping in mappings:
            if not mapping.execute or mapping.shared or mapping.write or not mapping.path.startswith(("[vdso]", "/")):
                continue
            start = mapping.end - STUB_LENGTH
            before = os.pread(self.memory, STUB_LENGTH, start - STUB_LENGTH)
            there = os.pread(self.memory, STUB_LENGTH, start)
            abandoned = there.startswith(STUB_PREFIX) and all(
                not start <= r["rip"] < mapping.end for r in self.registers.values()
            )
            if not any(before) and (not any(there) or abandoned):
                return start
        raise SnapshotFailed(
            f"process {self.pid}",
            "prepare",
            "no executable mapping has room behind its code",
            "see `lazyrestore doctor`",
        )


class _Diverted:
    """One thread, diverted to the stub."""

    def __init__(self, frozen: Frozen, tid: int) -> None:
        self.frozen = frozen
        self.tid = tid

    def __enter__(self) -> Callable[..., int]:
        frozen, tid = self.frozen, self.tid
        stub = frozen._stub
        assert stub is not None
        registers = frozen.registers[tid]
        home = _home(registers, handled=frozen.handler_waits(tid))
        os.pwrite(frozen.memory, _stub_code(home, frozen.masks[tid], frozen._scratch), stub)
        base = ffi.from_buffer("struct lr_registers *", registers.pack())
        arguments, result = ffi.new("uint64_t[6]"), ffi.new("int64_t *")
        masked = False

        def call(number: int, *values: int) -> int:
            nonlocal masked
            for index in range(6):
                arguments[index] = values[index] & (1 << 64) - 1 if index < len(values) else 0
            if not masked:
                # From here on the stub is what runs if we die; it puts this mask back.
                diverted = Registers(registers)
                diverted.update(rip=stub, orig_rax=(1 << 64) - 1, rax=lib.SYS_getpid)
                frozen._set(tid, diverted)
                check(lib.lr_set_signal_mask(tid, (1 << 64) - 1), frozen.pid, "block signals")
                masked = True
            error = lib.lr_remote_syscall(tid, base, stub, number, arguments, result)
            if check(error, frozen.pid, "make a system call in the process"):
                frozen._stop_came = True  # a SIGSTOP, which cannot be blocked: sent again when the process goes on
            return int(result[0])

        return call

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        frozen, tid = self.frozen, self.tid
        # In this order: a thread whose tracer dies in between is still in the stub, which puts back both.
        lib.lr_set_signal_mask(tid, frozen.masks[tid])
        frozen._set(tid, frozen.registers[tid])


def _home(registers: Registers, *, handled: bool) -> Registers:
    """How a thread goes on by itself, after a handler has run if one is waited for: what the kernel would have done."""
    if not registers.in_syscall:
        return registers
    if handled and registers.result in (-ERESTARTNOHAND, -ERESTART_RESTARTBLOCK):
        return Registers(registers, rax=(1 << 64) - errno.EINTR)
    if registers.result == -ERESTART_RESTARTBLOCK:
        return call_again(registers, lib.SYS_restart_syscall)
    return call_again(registers) if registers.result in RESTARTED else registers


def _stub_code(home: Registers, mask: int, scratch: int) -> bytes:
    """The stub for one thread. All but the first instruction is the way home of a thread whose tracer died."""
    quad = struct.Struct("<Q").pack
    word = struct.Struct("<I").pack
    syscall = b"\x0f\x05"
    code = bytearray(syscall)
    # munmap(scratch, 4096)
    code += (
        b"\x48\xbf" + quad(scratch) + b"\xbe" + word(4096 if scratch else 0) + b"\xb8" + word(lib.SYS_munmap) + syscall
    )
    # rt_sigprocmask(SIG_SETMASK, &mask, NULL, 8); mov leaves the flags alone
    code += b"\xbf" + word(lib.SIG_SETMASK) + b"\x48\x8d\x35"
    mask_reference = len(code)
    code += word(0) + b"\xba" + word(0) + b"\x41\xba" + word(8) + b"\xb8" + word(lib.SYS_rt_sigprocmask) + syscall
    for opcode, name in (
        (b"\x48\xb8", "rax"),
        (b"\x48\xb9", "rcx"),
        (b"\x48\xba", "rdx"),
        (b"\x48\xbe", "rsi"),
        (b"\x48\xbf", "rdi"),
        (b"\x49\xb8", "r8"),
        (b"\x49\xb9", "r9"),
        (b"\x49\xba", "r10"),
        (b"\x49\xbb", "r11"),
    ):
        code += opcode + quad(home[name])
    code += b"\xff\x25" + word(0) + quad(home["rip"])  # jmp *0(%rip)
    struct.pack_into("<i", code, mask_reference, len(code) - mask_reference - 4)
    code += quad(mask)
    assert len(code) <= STUB_LENGTH
    return bytes(code)
