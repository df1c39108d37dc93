"""A PID namespace of its own for a restored process, so that its old process id is free in it.

Facts. The first process of a PID namespace is its init: orphans become its children, signals without a handler do not
reach it from inside, and when it ends the kernel kills all the others. A process may be started into a namespace by one
outside (setns), and is then that one's child. A /proc mount shows the namespace of the process that mounted it.

A signal that is blocked waits even for an init. Reading a pidfd's state with poll() is the only way to wait for a
process that is not one's child, and poll() is never restarted after a handler.

Choice. The init is a restore program of a dozen operations: it ignores SIGCHLD (so that the kernel reaps the orphans),
blocks all signals and reads them from a signalfd, sends each on to the restored process, and ends when that has ended
(a pidfd), and with it whatever the process left behind. The restored process itself stays our child, so its exit status
is ours to wait for.

Cost. SIGKILL and SIGSTOP cannot be passed on: the first ends the namespace, the second stops the init only. A signal's
sender and value are lost on the way.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache

from lazyrestore import spawn
from lazyrestore._native import _core
from lazyrestore.errors import MissingFeature, RestoreError
from lazyrestore.memory_files import MemoryFile
from lazyrestore.program import OpList, Program, Word, lib
from lazyrestore.restore_plan import Linked

ffi = _core.ffi

_BASE = 0x10_0000_0000
_PROGRAM = 3  # the number of the program's descriptor in init
POLLIN = 1
SIGCHLD = 17
PASSED_ON = ((1 << 64) - 1) & ~sum(1 << (number - 1) for number in (lib.SIGKILL, lib.SIGSTOP, lib.SIGTRAP, SIGCHLD))


class Namespace:
    """A namespace whose init is stopped until watch() is called; whoever drops it before ends it, even by kill -9:
    the kernel kills what is traced with PTRACE_O_EXITKILL when its tracer, the calling thread, has ended."""

    __slots__ = ("_init", "_watching", "descriptor", "pid")

    def __init__(self, init: spawn.Child) -> None:
        self._init = init
        self._watching = -1  # init's pidfd once it is let go
        self.pid = init.pid
        self.descriptor = -1  # the namespace's

    def hold(self) -> None:
        """Init stays stopped until watch() is called; nothing more is started in the namespace from here."""
        self._close_namespace()

    def watch(self) -> None:
        """Let init run, if it is not: from now on it waits for the restored process, and ends with it."""
        if self._init.pidfd < 0:
            return
        error = lib.lr_detach(self.pid, 0)
        self._close_namespace()
        if error < 0:
            raise RestoreError("pid namespace", "detach init", errno=-error)
        self._watching, self._init.pidfd = self._init.pidfd, -1

    def end(self) -> None:
        """Kill init, if it was not let go, and with it all that is in the namespace."""
        self._init.end()
        self._close_namespace()

    def collect(self) -> None:
        """Wait for the end of init, when the restored process has ended; if it is stopped, too."""
        self.end()
        if self._watching >= 0:
            with suppress(ChildProcessError):  # collected, or our parent's, who forked us: then not to be killed
                os.waitid(os.P_PIDFD, self._watching, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                lib.lr_pidfd_send_signal(self._watching, lib.SIGKILL)  # what it is about to do
                os.waitid(os.P_PIDFD, self._watching, os.WEXITED)
            self._close_watching()

    def __del__(self) -> None:
        self.end()
        self._close_watching()

    def _close_watching(self) -> None:
        watching, self._watching = self._watching, -1
        if watching >= 0:
            os.close(watching)

    def _close_namespace(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def new_namespace(pid: int, *, ends_with_caller: bool = False) -> Namespace:
    """A namespace in which process id `pid` is free. Raises MissingFeature, RestoreError.

    ends_with_caller: all in it is killed when the calling thread ends, even by kill -9.
    """
    linked, program = _linked(pid, ends_with_caller)
    try:
        namespace = Namespace(spawn.start([(program.descriptor, _PROGRAM)], new_pid_namespace=True, session=1))
    except PermissionError as error:
        raise MissingFeature(
            "pid namespace", "create", "it takes CAP_SYS_ADMIN", "run as root", errno=error.errno
        ) from error
    except OSError as error:
        raise RestoreError("pid namespace", f"create: {error.filename}", errno=error.errno) from error
    init = namespace.pid
    try:
        spawn.enter(init, linked, _PROGRAM)
        status, result = ffi.new("int32_t *"), ffi.new("int64_t *")
        index, why = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        error_number = lib.lr_next_stop(init, 1, status, index, why, result, ffi.NULL, 0)
        if error_number or why[0] != lib.LR_STOP_ASKED:
            raise RestoreError("pid namespace", "start init", f"stopped at operation {index[0]} with {result[0]}")
        namespace.descriptor = os.open(f"/proc/{init}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:  # somebody ended it
        namespace.end()
        raise RestoreError("pid namespace", "start init", errno=error.errno) from error
    except BaseException:
        namespace.end()
        raise
    return namespace


@lru_cache(16)
def _linked(pid: int, ends_with_caller: bool) -> tuple[Linked, MemoryFile]:
    linked = _init_program(pid, ends_with_caller).link(_BASE)
    return linked, MemoryFile("lazyrestore-init", linked.image)


def _init_program(pid: int, ends_with_caller: bool) -> Program:
    program = Program()
    ops = program.add_list()
    signals, process = 0, 1  # the numbers of init's descriptors
    with ops.serving("init of the PID namespace"):
        ignore = program.place(struct.pack("<QQQQ", 1, lib.SA_RESTORER, 0, 0))
        ops.call(lib.SYS_rt_sigaction, SIGCHLD, ignore, 0, 8, note="SIGCHLD is ignored")
        ops.call(lib.SYS_prctl, lib.PR_SET_NAME, program.string("lazyrestore"))
        if ends_with_caller:
            ops.call(lib.SYS_prctl, lib.PR_SET_PDEATHSIG, lib.SIGKILL)
        ops.call(lib.SYS_close, _PROGRAM)
        mask = program.place(struct.pack("<Q", PASSED_ON))
        ops.call_expecting(signals, lib.SYS_signalfd4, -1, mask, 8, lib.SFD_NONBLOCK, note="spawn blocked all signals")
        ops.stop("until the restored process runs")
        ops.call_expecting(process, lib.SYS_pidfd_open, pid, 0)
        both = program.place(struct.pack("<ihhihh", process, POLLIN, 0, signals, POLLIN, 0))
        now, received = program.place(bytes(16)), program.reserve(128)
        wait = ops.try_call(lib.SYS_ppoll, both, 2, 0, 0, 8, note="the process's end, or a signal")
        # Without a signal, the last one is sent again, to a process that has ended by then.
        ops.try_call(lib.SYS_read, signals, received, 128)
        ops.try_call(lib.SYS_pidfd_send_signal, process, Word(received.offset), 0, 0)
        ended = ops.try_call(lib.SYS_ppoll, both, 1, now, 0, 8, note="the process's end")
        ops.repeat_while_zero(ended, wait)
        ops.try_call(lib.SYS_exit_group, 0)
    return program


def own_mounts(program: Program, ops: OpList, more: Iterable[tuple[str, str]] = ()) -> None:
    """Append a mount namespace of its own with a /proc that shows the process's PID namespace.

    more: (path, path of the same kind that it is mounted over).
    """
    with ops.serving("/proc of the PID namespace"):
        ops.call(lib.SYS_unshare, lib.CLONE_NEWNS)
        none = program.string("none")
        ops.call(lib.SYS_mount, none, program.string("/"), 0, lib.MS_REC | lib.MS_PRIVATE, 0)
        flags = lib.MS_NOSUID | lib.MS_NODEV | lib.MS_NOEXEC
        ops.call(lib.SYS_mount, program.string("proc"), program.string("/proc"), program.string("proc"), flags, 0)
    for path, over in more:
        with ops.serving(f"mount at {over}"):
            ops.call(lib.SYS_mount, program.string(path), program.string(over), none, lib.MS_BIND, 0)
