"""Starting a process at its first instruction: the smallest executable there is, traced, ready to be told what to do.

Facts. The new process is an ELF file of one page in a memory file: its code makes one system call and jumps to rbx. The
tracer sets the registers, so this one call maps a linked program (`program.Linked`), and the jump enters its executor.
So a new process costs the same from any caller, however large. The kernel puts the vdso anywhere, tells where in the
auxiliary vector, and puts the vvar mappings before it, always at the same distances.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress

from lazyrestore._native import _core
from lazyrestore.errors import NoSuchProcess
from lazyrestore.kernel import host
from lazyrestore.memory_files import MemoryFile
from lazyrestore.restore_plan import Linked

lib, ffi = _core.lib, _core.ffi

ADDRESS = 0x0F_F000_0000  # where the executable is linked: 64 GiB less 256 MiB, below every hole that we choose
SYSCALL = b"\x0f\x05"
STOPPED = 0x7F  # a wait status
CODE = SYSCALL + b"\xff\xe3"  # jmp *%rbx
STEPS = {
    lib.LR_SPAWN_CLONE: "clone3",
    lib.LR_SPAWN_DUP: "dup3",
    lib.LR_SPAWN_TRACEME: "ptrace",
    lib.LR_SPAWN_EXEC: "execveat",
    lib.LR_SPAWN_SETNS: "setns",
    lib.LR_SPAWN_WAIT: "wait",
    lib.LR_SPAWN_SESSION: "setsid",
    lib.LR_SPAWN_LIMIT: "prlimit",
}

_distances: dict[str, int] = {}  # of the kernel's mappings in a new process, from its vdso
_executable: MemoryFile | None = None
_executable_lock = threading.Lock()


class Child:
    """A process that was started here. Whoever drops it ends it: an interrupt (Ctrl-C) can drop it anywhere, on its way
    out of a function that returned it, too. To let it go: take the pidfd, and put -1 in its place, in one statement
    without a call, since interrupts come at calls."""

    __slots__ = ("pid", "pidfd")

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd

    def end(self) -> None:
        """Kill it, if it was not let go, and collect it: its other threads first, which we trace too."""
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd < 0:
            return
        lib.lr_pidfd_send_signal(pidfd, lib.SIGKILL)
        from lazyrestore.kernel import procfs

        with suppress(ChildProcessError, NoSuchProcess):  # a failed step has collected it, or the kernel does (SIGCHLD)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            for tid in sorted(procfs.threads(self.pid), key=lambda tid: tid == self.pid):
                status = ffi.new("int32_t *", STOPPED)
                while os.WIFSTOPPED(status[0]):
                    lib.lr_continue(tid, 0)  # from the stop in which a step met it
                    if lib.lr_wait(tid, status) < 0:
                        break
        os.close(pidfd)

    def __del__(self) -> None:
        self.end()


def start(
    pairs: list[tuple[int, int]],
    *,
    wanted_pid: int = 0,
    pid_namespace: int = -1,
    new_pid_namespace: bool = False,
    session: int = 0,
) -> Child:
    """A new process, stopped and traced by this thread. RestoreError, OSError with the step as its filename.

    pairs: (our descriptor, its number there); all other descriptors are closed. wanted_pid: 0 for any. pid_namespace: a
    descriptor of one to start in. session: 1 for setsid(), 2 for setpgid(0, 0).
    """
    sources = ffi.new("int32_t[]", [source for source, _ in pairs])
    targets = ffi.new("int32_t[]", [target for _, target in pairs])
    request = ffi.new("struct lr_spawn *")
    request.executable = executable()
    request.count = len(pairs)
    request.source, request.target = sources, targets
    request.wanted_pid = wanted_pid
    request.pid_namespace = pid_namespace
    request.new_pid_namespace = new_pid_namespace
    request.new_session = session
    request.descriptor_limit = max(target for _, target in pairs) + 16
    request.trace = 1
    request.pidfd = -1
    try:
        error = lib.lr_spawn(request)
        if error:
            raise OSError(-error, os.strerror(-error), STEPS.get(request.step, "clone3"))
    except BaseException:  # an interrupt that came meanwhile is raised as soon as the call has returned
        Child(request.pid, request.pidfd).end()
        raise
    return Child(request.pid, request.pidfd)


def enter(pid: int, linked: Linked, descriptor: int, options: int = 0, kernel: Sequence[str] = ()) -> None:
    """Set the registers of a process from start() for what it does once continued.

    It maps `linked` from its descriptor number `descriptor`, privately, and runs the first list. options: of ptrace,
    besides those that are always set; kernel: the names of the mappings that KernelMapping's numbers stand for. OSError
    if ptrace refuses, NoSuchProcess.
    """
    registers = ffi.new("struct lr_registers *")
    _check(lib.lr_set_options(pid, options | lib.PTRACE_O_EXITKILL | lib.PTRACE_O_TRACESYSGOOD))
    _check(lib.lr_get_registers(pid, registers))
    if kernel:
        mappings = _kernel_mappings(pid, registers.rsp)
        addresses = (*(mappings[name] for name in kernel), 0, 0, 0)
        registers.r13, registers.r14, registers.r15 = addresses[:3]
    registers.rax = lib.SYS_mmap
    registers.rdi, registers.rsi = linked.base, len(linked.image)
    registers.rdx = lib.PROT_READ | lib.PROT_WRITE | lib.PROT_EXEC
    registers.r10 = lib.MAP_PRIVATE | lib.MAP_FIXED_NOREPLACE
    registers.r8, registers.r9 = descriptor, 0
    registers.rbx, registers.r12, registers.rsp = linked.entry, linked.lists[0], linked.stacks[0]
    registers.orig_rax = (1 << 64) - 1
    _check(lib.lr_set_registers(pid, registers))


def _kernel_mappings(pid: int, stack: int) -> dict[str, int]:
    """Where what the kernel has mapped lies in a process at its first instruction. NoSuchProcess."""
    global _distances
    vdso = lib.lr_auxiliary_value(pid, stack, lib.AT_SYSINFO_EHDR)
    if not _distances or not vdso:
        found = {path: start for path, start, _ in host.kernel_mappings(pid)}
        vdso = found.get("[vdso]", 0)
        if not vdso:
            raise NoSuchProcess(f"process {pid}", "find its vdso", "no such process")
        _distances = {path: start - vdso for path, start in found.items()}
    return {path: vdso + distance for path, distance in _distances.items()}


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result), "ptrace")


def executable() -> int:
    """The descriptor of the executable, a memory file, made once. Raises RestoreError."""
    global _executable
    with _executable_lock:
        if _executable is None:
            header = struct.pack(
                "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, ADDRESS + 176, 64, 0, 0, 64, 56, 2, 0, 0, 0
            )  # ET_EXEC, EM_X86_64
            load = struct.pack("<IIQQQQQQ", 1, 5, 0, ADDRESS, ADDRESS, 180, 180, 4096)
            stack = struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)  # PT_GNU_STACK, not executable
            _executable = MemoryFile("lazyrestore-start", header + load + stack + CODE)
        return _executable.descriptor
