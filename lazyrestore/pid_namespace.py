"""A PID namespace of its own for a restored process, so that its old process id is free in it.

Facts. The first process of a PID namespace is its init: orphans become its children, signals without a handler do not
reach it from inside, and when it ends the kernel kills all the others. A process may be started into a namespace by one
outside (setns), and is then that one's child. A /proc mount shows the namespace of the process that mounted it.

Choice. The init is a restore program of six operations: it ignores SIGCHLD (so that the kernel reaps the orphans),
waits for the restored process to end (a pidfd), and ends, and with it whatever the process left behind. The restored
process itself stays our child, so its exit status is ours to wait for.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass

from lazyrestore import spawn
from lazyrestore._native import _core
from lazyrestore.errors import MissingFeature, RestoreError
from lazyrestore.program import OpList, Program, lib

ffi = _core.ffi

_BASE = 0x10_0000_0000
_PROGRAM = 3  # the number of the program's descriptor in init
POLLIN = 1


@dataclass(slots=True)
class Namespace:
    """A namespace whose init is stopped until watch() is called.

    pid and pidfd are init's; descriptor is the namespace's.
    """

    pid: int
    pidfd: int
    descriptor: int

    def watch(self) -> None:
        """Let init run: from now on it waits for the restored process, and ends with it."""
        error = lib.lr_detach(self.pid, 0)
        self._close_namespace()
        if error < 0:
            raise RestoreError("pid namespace", "detach init", errno=-error)

    def end(self) -> None:
        """Kill init, and with it all that is in the namespace."""
        lib.lr_pidfd_send_signal(self.pidfd, lib.SIGKILL)
        self.collect()

    def collect(self) -> None:
        """Wait for init's end."""
        self._close_namespace()
        if self.pidfd >= 0:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            os.close(self.pidfd)
            self.pidfd = -1

    def _close_namespace(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def new_namespace(pid: int) -> Namespace:
    """A namespace in which process id `pid` is free. Raises MissingFeature, RestoreError."""
    program = Program()
    ops = program.add_list()
    with ops.serving("init of the PID namespace"):
        ignore = program.place(struct.pack("<QQQQ", 1, lib.SA_RESTORER, 0, 0))
        ops.call(lib.SYS_rt_sigaction, 17, ignore, 0, 8, note="SIGCHLD is ignored")
        ops.call(lib.SYS_prctl, lib.PR_SET_NAME, program.string("lazyrestore"))
        ops.call(lib.SYS_close, _PROGRAM)
        ops.stop("until the restored process runs")
        ops.call_expecting(0, lib.SYS_pidfd_open, pid, 0)
        ops.try_call(lib.SYS_ppoll, program.place(struct.pack("<ihh", 0, POLLIN, 0)), 1, 0, 0, 8, note="descriptor 0")
        ops.try_call(lib.SYS_exit_group, 0)
    linked = program.link(_BASE)
    descriptor = os.memfd_create("lazyrestore-init", os.MFD_CLOEXEC)
    try:
        os.pwrite(descriptor, linked.image, 0)
        try:
            init, pidfd = spawn.start([(descriptor, _PROGRAM)], new_pid_namespace=True, session=1)
        except PermissionError as error:
            raise MissingFeature(
                "pid namespace", "create", "it takes CAP_SYS_ADMIN", "run as root", errno=error.errno
            ) from error
        except OSError as error:
            raise RestoreError("pid namespace", f"create: {error.filename}", errno=error.errno) from error
    finally:
        os.close(descriptor)
    namespace = Namespace(init, pidfd, -1)
    try:
        spawn.enter(init, linked, _PROGRAM)
        status, result = ffi.new("int32_t *"), ffi.new("int64_t *")
        index, why = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        error_number = lib.lr_next_stop(init, 1, status, index, why, result)
        if error_number or why[0] != lib.LR_STOP_ASKED:
            raise RestoreError("pid namespace", "start init", f"stopped at operation {index[0]} with {result[0]}")
        namespace.descriptor = os.open(f"/proc/{init}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except BaseException:
        namespace.end()
        raise
    return namespace


def mount_proc(program: Program, ops: OpList) -> None:
    """Append a mount namespace of its own with a /proc that shows the process's PID namespace."""
    with ops.serving("/proc of the PID namespace"):
        ops.call(lib.SYS_unshare, lib.CLONE_NEWNS)
        none = program.string("none")
        ops.call(lib.SYS_mount, none, program.string("/"), 0, lib.MS_REC | lib.MS_PRIVATE, 0)
        flags = lib.MS_NOSUID | lib.MS_NODEV | lib.MS_NOEXEC
        ops.call(lib.SYS_mount, program.string("proc"), program.string("/proc"), program.string("proc"), flags, 0)
