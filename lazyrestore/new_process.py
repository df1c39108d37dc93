"""A new process while it becomes the old one: under its program, then under ptrace alone, until it is let go."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lazyrestore import spawn
from lazyrestore._native import _core
from lazyrestore.errors import NoSuchProcess, RestoreError
from lazyrestore.restore_plan import RestorePlan, Written

if TYPE_CHECKING:
    from lazyrestore.program import Program
    from lazyrestore.store import StoredImage

lib, ffi = _core.lib, _core.ffi

PAGE = 4096
LOCKS = ("flock", "POSIX lock", "OFDLCK lock")  # how the operations that take locks are called (resources/files.py)
MAPPING_CALLS = ("mmap", "mprotect", "mremap")
NO_ROOM = "raise vm.max_map_count, or the restorer's limit on its address space (ulimit -v)"
WRITE_XOR_EXECUTE = (
    "the restorer may not have memory that can be written and executed: restore without PR_SET_MDWE "
    "(systemd's MemoryDenyWriteExecute=)"
)
Piece = tuple[Written, int, bytes]  # address, contents


class NewProcess:
    """The new process under its program; the calling thread is its tracer."""

    def __init__(
        self, plan: RestorePlan, image: StoredImage, named: Callable[[], Program], pid: int, *, renumbered: bool
    ) -> None:
        """named: makes the plan's program again, with the names of what its operations serve. renumbered: it has a PID
        namespace of its own, so that we see its threads under other ids than the plan's."""
        self.plan = plan
        self._image = image
        self._named = named
        self.pid = pid
        self.tids = [thread.tid for thread in plan.threads]  # as we see them, once they have started
        self._status, self._index = ffi.new("int32_t *"), ffi.new("uint64_t *")
        self._started = ffi.new("int32_t[]", len(self.tids) - 1 if renumbered else 0)
        self._why, self._result = ffi.new("uint64_t *"), ffi.new("int64_t *")

    def start(self) -> None:
        """Let the first instruction map the program and jump to the executor."""
        kernel = [name for name, _, _ in self.plan.host.vdso]
        try:
            # The end of a leader is not to be seen until its other threads are collected. With TRACEEXIT it stops
            # first, so a process that is killed by somebody else is noticed by who waits for any of its threads.
            # TRACECLONE tells the threads' ids, with a stop for each. /proc/PID/task would, too, but who collects the
            # ended process takes what was looked up there out of the kernel's cache, as its last thread does: while
            # that one is kept from running, the other spins, for milliseconds.
            options = lib.PTRACE_O_TRACEEXIT | (lib.PTRACE_O_TRACECLONE if len(self._started) else 0)
            spawn.enter(self.pid, self.plan.compiled.linked, self.plan.compiled.layout.program, options, kernel)
        except (NoSuchProcess, ProcessLookupError) as error:
            raise self._ended("enter program") from error
        except OSError as error:
            raise RestoreError(f"process {self.pid}", "enter program", errno=error.errno) from error
        self._must(lib.lr_continue(self.pid, 0), "start program")

    def reach_stop(self) -> None:
        self._next(self.pid, 0, lib.LR_STOP_ASKED, resume=False)

    def run_to_end(self) -> None:
        """The rest of the leader's list, then each thread's list."""
        self._next(self.pid, 0, lib.LR_STOP_END)
        self.tids = [self.pid, *(self._started if len(self._started) else self.tids[1:])]
        for tid in self.tids[1:]:
            self._must(lib.lr_wait(tid, self._status), f"wait for thread {tid}")
            self._must(lib.lr_continue(tid, 0), f"start thread {tid}")
        self._fetch_futex_words()  # while they run
        for number, tid in enumerate(self.tids[1:], 1):
            self._next(tid, number, lib.LR_STOP_END, resume=False)

    def take(self, pidfd: int, number: int) -> int:
        return self._must(lib.lr_pidfd_getfd(pidfd, number), "pidfd_getfd")

    def contents(self) -> Iterator[Piece]:
        """What cannot be lazy: the main stack and its like."""
        try:
            for written in self.plan.contents:
                if written.zeros:  # these are not stored, and a file would show through
                    yield written, written.start, bytes(written.end - written.start)
                for at, data in self._image.contents(written.start, written.end):
                    yield written, at, data
        except OSError as error:
            raise RestoreError(f"process {self.pid}", "read contents", errno=error.errno) from error

    def write(self, contents: Iterable[Piece]) -> None:
        """Put them into its memory, where that is mapped."""
        try:
            memory = os.open(f"/proc/{self.pid}/mem", os.O_WRONLY | os.O_CLOEXEC)
            try:
                for written, at, data in contents:
                    if os.pwrite(memory, data, at) != len(data):
                        raise RestoreError(written.label, "write contents", "short write")
            finally:
                os.close(memory)
        except OSError as error:
            raise RestoreError(f"process {self.pid}", "write contents", errno=error.errno) from error

    def set_attributes(self) -> None:
        """What is set through /proc/PID by the restorer, at any time."""
        self._set("oom_score_adj", self.plan.oom_score_adjust, 10)
        self._set("coredump_filter", self.plan.core_dump_filter, 16)

    def _set(self, name: str, value: int, base: int) -> None:
        try:
            file = os.open(f"/proc/{self.pid}/{name}", os.O_RDWR | os.O_CLOEXEC)
            try:
                found = os.read(file, 32)
                if not found:  # its memory is gone
                    raise self._ended(f"set {name}")
                if int(found, base) != value:
                    os.write(file, b"%#x" % value if base == 16 else b"%d" % value)
            finally:
                os.close(file)
        except OSError as error:
            raise RestoreError(f"process {self.pid}", f"set {name}", errno=error.errno) from error

    def let_go(self, *, parked: bool) -> None:
        """Remove what is ours from the address space, set every thread's state, detach."""
        linked = self.plan.compiled.linked
        here = self._registers(self.pid)
        syscall = linked.base + linked.image.index(spawn.SYSCALL)
        if self.plan.compiled.trap_action:
            self._remote(here, syscall, lib.SYS_rt_sigaction, lib.SIGTRAP, self.plan.compiled.trap_action, 0, 8)
        self._remote(here, syscall, lib.SYS_munmap, linked.base, self.plan.compiled.end - linked.base)
        leader, *others = self.plan.threads
        order = [*self.tids[1:], self.tids[0]]
        for tid, thread in zip(order, [*others, leader], strict=True):
            registers = ffi.from_buffer("struct lr_registers *", thread.registers)
            self._must(lib.lr_set_registers(tid, registers), f"set registers of thread {tid}")
            error = lib.lr_set_xstate(tid, ffi.from_buffer(thread.xstate), len(thread.xstate))
            self._must(error, f"set extended state of thread {tid}")
            self._must(lib.lr_set_signal_mask(tid, thread.signal_mask), f"set signal mask of thread {tid}")
        if parked or self.plan.stopped:  # it takes effect before any of its own instructions
            os.kill(self.pid, signal.SIGSTOP)
        for tid in order:
            self._must(lib.lr_detach(tid, 0), f"detach thread {tid}")

    def _fetch_futex_words(self) -> None:
        """The kernel changes some futex words in a way that cannot wait for a pager: bring their pages first."""
        buffer, failed = ffi.new("char[4]"), ffi.new("uint64_t *")
        for page in {word // PAGE * PAGE for thread in self.plan.threads for word in thread.futex_words}:
            lib.lr_copy_runs(self.pid, ffi.new("struct lr_run *", (page, 0, 4)), 1, buffer, 1, failed)

    # -- underneath ----------------------------------------------------------------------------------------------------

    def _next(self, tid: int, number: int, want: int, *, resume: bool = True) -> None:
        stop = self._status, self._index, self._why, self._result
        error = lib.lr_next_stop(tid, resume, *stop, self._started, len(self._started))
        if error:
            status = self._status[0]
            if status >> 16 or not os.WIFSTOPPED(status):
                raise self._ended("run program")
            if os.WSTOPSIG(status) == signal.SIGSEGV:
                self._check_entry()
            raise RestoreError(f"thread {tid}", "run program", f"unexpected stop (status {status:#x})", errno=-error)
        if self._why[0] != want:
            self._surprise(number, self._index[0], self._result[0])

    def _check_entry(self) -> None:
        """RestoreError if the first instruction could not map the program that the next one jumped to."""
        here = self._registers(self.pid)
        result = ffi.cast("int64_t", here.rax)
        if here.rip == self.plan.compiled.linked.entry and -4096 < int(result) < 0:
            number = -int(result)
            advice = {errno.EACCES: WRITE_XOR_EXECUTE, errno.EPERM: WRITE_XOR_EXECUTE, errno.ENOMEM: NO_ROOM}
            raise RestoreError(f"process {self.pid}", "map program", advice=advice.get(number, ""), errno=number)

    def _surprise(self, number: int, index: int, result: int) -> None:
        op = self._named().op(number, index)
        step = op.name + (f" ({op.note})" if op.note else "")
        if -4096 < result < 0:
            advice = "`lazyrestore doctor` tells which privilege is missing" if result == -errno.EPERM else ""
            if result == -errno.EPERM and op.name == "prlimit64":
                advice = "raise the restorer's own hard limit (ulimit -H), or grant CAP_SYS_RESOURCE"
            if result == -errno.EAGAIN and op.note in LOCKS:
                advice = "end the process that holds the lock (the original, or another copy?)"
            if result == -errno.ENOMEM and op.name in MAPPING_CALLS:
                advice = NO_ROOM
            raise RestoreError(op.resource, step, advice=advice, errno=-result)
        raise RestoreError(op.resource, step, f"returned {result:#x} and not {op.want:#x}")

    def _remote(self, base: Any, syscall: int, number: int, *values: int) -> None:
        arguments = ffi.new("uint64_t[6]", [*values, *[0] * (6 - len(values))])
        self._must(lib.lr_remote_syscall(self.pid, base, syscall, number, arguments, self._result), "finish")
        if self._result[0] < 0:
            raise RestoreError(f"process {self.pid}", "finish", errno=-self._result[0])

    def _registers(self, tid: int) -> Any:
        registers = ffi.new("struct lr_registers *")
        self._must(lib.lr_get_registers(tid, registers), "read registers")
        return registers

    def _ended(self, step: str) -> RestoreError:
        return RestoreError(f"process {self.pid}", step, "somebody ended it")

    def _must(self, result: int, step: str) -> int:
        if result < 0:
            raise RestoreError(f"process {self.pid}", step, errno=-result)
        return int(result)
