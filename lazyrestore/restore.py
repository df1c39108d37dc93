"""Restoring: a new process runs the compiled program, the pager takes its lazy memory, and it is let go.

The steps, each timed as a phase: check (this host, the mapped files), compile, pager (until it answers), spawn, map
(the program up to the userfaultfd), attach (the pager registers the ranges), write (what cannot be lazy), finish
(threads, credentials, registers, detach). Whatever fails, the new process is killed and reaped before the exception
leaves.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import chain

import msgspec

from lazyrestore import memory_files, spawn
from lazyrestore._native import _core
from lazyrestore.errors import MissingFeature, NoSuchProcess, PidTaken, RestoreError
from lazyrestore.kernel import procfs
from lazyrestore.kernel.tracee import Registers
from lazyrestore.manifest import Manifest
from lazyrestore.own_pages import Run, own_pages_of
from lazyrestore.pager.client import BACKING_HUGETLB, BACKING_SHARED, BACKING_TEMPLATE, PagerClient, Range, pack_ranges
from lazyrestore.pid_namespace import Namespace, new_namespace
from lazyrestore.program import Op, lib
from lazyrestore.resources import attributes, descriptors, listeners, threads, vma
from lazyrestore.restore_checks import check_host, check_huge_pages, check_pid_free
from lazyrestore.restore_options import AS_IT_WAS, Options
from lazyrestore.restore_program import Compiled, compile_program, inherited_settings, layout_for
from lazyrestore.store import HUGE_CHUNK, StoredImage

ffi = _core.ffi

LAST_STREAM = 2
AHEAD = 4 << 20  # bytes of contents that are decompressed while the new process maps its memory
STOPPED = 0x7F  # a wait status
Piece = tuple[vma.Vma, int, bytes]  # address, contents


class Started(msgspec.Struct):
    """A restored process that runs: pid (ours, not its namespace's), pidfds that the caller owns, times in ms."""

    pid: int
    pidfd: int
    init: Namespace | None
    restore_ms: float
    phases: dict[str, float]


class Prepared(msgspec.Struct):
    """A snapshot on this host, ready to be restored many times: checked, compiled."""

    name: str
    manifest: Manifest
    image: StoredImage
    own: attributes.Credentials
    # Options.shape → a program that can be used again, and the settings of the thread that it was compiled for
    compiled: dict[object, tuple[object, Compiled]] = msgspec.field(default_factory=dict)
    own_pages: tuple[bytes, tuple[Run, ...]] = (b"", ())  # a working set, and where the process wrote in it
    ranges: bytes = b""  # pack_ranges()
    pieces: list[Piece] = msgspec.field(default_factory=list)  # what contents() gave, if it is less than AHEAD
    huge_pages: int = 0  # of 2 MiB, with content
    checked: dict[str, vma.Signature | None] = msgspec.field(default_factory=dict)  # path → signature, unchanged


class Checked(msgspec.Struct, frozen=True):
    """One restore that nothing speaks against, about to begin."""

    prepared: Prepared
    compiled: Compiled
    options: Options
    own_pages: tuple[Run, ...]
    phases: _Phases


class _Phases:
    def __init__(self) -> None:
        self.began = self._last = time.perf_counter()
        self.ms: dict[str, float] = {}

    def done(self, name: str) -> None:
        now = time.perf_counter()
        self.ms[name] = self.ms.get(name, 0.0) + (now - self._last) * 1e3
        self._last = now


def prepare(name: str, manifest: Manifest, image: StoredImage) -> Prepared:
    """Check what does not change while this host runs: CPU, kernel. Raises CpuMismatch, KernelMismatch."""
    check_host(name, manifest)
    prepared = Prepared(name, manifest, image, attributes.credentials_of(os.getpid(), os.getpid()))
    prepared.ranges = pack_ranges(_ranges(manifest))
    if image.hugetlb:
        prepared.huge_pages = sum(length == HUGE_CHUNK for _, length, *_ in image.entries())
    return prepared


def listening_elsewhere(manifest: Manifest, ports: Mapping[int, int], reuse_port: bool) -> Manifest:
    """The manifest with TCP listeners on other ports (old → new), all with SO_REUSEPORT if wanted. RestoreError."""
    if not ports and not reuse_port:
        return manifest
    table = listeners.rebind(manifest.descriptors, ports, reuse_port=reuse_port)
    return msgspec.structs.replace(manifest, descriptors=table)


def compiled_for(prepared: Prepared, options: Options, own_pages: tuple[Run, ...] = (), above: int = 0) -> Compiled:
    """The program, from the last time if it can be used again.

    Handed-over descriptors get numbers higher than `above`.
    """
    settings, compiled = prepared.compiled.get(options.shape, (None, None))
    inherited = inherited_settings(), own_pages
    if compiled is None or settings != inherited or above >= compiled.layout.program:
        layout = layout_for(prepared.manifest, above + 1, options.inherited_numbers)
        compiled = compile_program(prepared.manifest, layout, prepared.own, options, own_pages)
        if descriptors.is_reusable(prepared.manifest.descriptors):
            prepared.compiled[options.shape] = inherited, compiled
    return compiled


def explain(prepared: Prepared, options: Options = AS_IT_WAS) -> list[str]:
    """The restore program, a line per operation; nothing is run."""
    layout = layout_for(prepared.manifest, 0, options.inherited_numbers)
    compiled = compile_program(prepared.manifest, layout, prepared.own, options)
    return list(compiled.program.explain())


def check(prepared: Prepared, options: Options = AS_IT_WAS, filled: bytes = b"") -> Checked:
    """Check what may change between two restores, and compile if that is to do: all that can be done before the pager
    answers. `filled`: a working set all of which is in the pager's template; the process then gets its own copies of
    the pages that it is about to write before the pager has to do with them. Raises PidTaken, FileChanged and
    RestoreError."""
    manifest, phases = prepared.manifest, _Phases()
    if not options.new_pid:
        check_pid_free(manifest.pid)
    for identity in manifest.files:
        signature = vma.file_signature(identity)
        if signature is None or signature not in (identity.seen, prepared.checked.get(identity.path)):
            vma.check_file(identity)
            prepared.checked[identity.path] = vma.file_signature(identity)
    attributes.check_place(manifest.attributes)
    descriptors.check_files(manifest.descriptors)
    descriptors.prepare(manifest.descriptors, options.inherited_numbers, own_network=options.new_net)
    phases.done("check")
    known, own_pages = prepared.own_pages
    if known != filled:
        prepared.own_pages = filled, (own_pages := own_pages_of(manifest, prepared.image, filled))
    compiled = compiled_for(prepared, options, own_pages)
    phases.done("compile")
    return Checked(prepared, compiled, options, own_pages, phases)


def run(checked: Checked, pager: PagerClient, streams: Sequence[int] = (0, 1, 2)) -> Started:
    """Restore once. `streams` are the caller's descriptors for the new process's standard streams, where it needs
    them."""
    prepared, compiled, options, phases = checked.prepared, checked.compiled, checked.options, checked.phases
    manifest = prepared.manifest
    phases.done("pager")
    with ExitStack() as owned:
        shared = {
            index: memory_files.shared(prepared.name, manifest.shared[index], prepared.image, owned)
            for index in range(len(manifest.shared))
        }
        hugetlb = pager.hugetlb_fd
        if hugetlb is not None:
            check_huge_pages(prepared.name, prepared.huge_pages, hugetlb)
        template = pager.template_fd
        streams = [stream if _is_stream(stream) else _nothing(owned) for stream in streams]
        inherited = dict(options.inherited)
        program = memory_files.new("lazyrestore-program", owned)
        sources = [template, hugetlb or 0, program, spawn.executable(), *shared.values(), *streams, *inherited.values()]
        if max(sources) >= compiled.layout.program:  # a caller with many descriptors
            compiled = compiled_for(prepared, options, checked.own_pages, max(sources))
        os.pwrite(program, compiled.linked.image, 0)
        handed = {program: compiled.layout.program, template: compiled.layout.template}
        pairs = [*handed.items(), *((shared[k], compiled.layout.shared[k]) for k in shared)]
        pairs += [(streams[k], compiled.layout.streams[k]) for k in range(3)]
        pairs += [(inherited[k], compiled.layout.inherited[k]) for k in inherited]
        # Where there is none, something else: the program takes the number for taken.
        pairs.append((template if hugetlb is None else hugetlb, compiled.layout.hugetlb))
        namespace = None
        if options.new_pid:
            namespace = new_namespace(manifest.pid, ends_with_caller=options.ends_with_caller)
        try:
            pid, pidfd = _spawn(prepared, pairs, namespace)
        except BaseException:
            if namespace:
                namespace.end()
            raise
        phases.done("spawn")
        try:
            child = _Child(prepared, compiled, pid)
            child.start(program)
            contents = child.contents()
            ahead = prepared.pieces or _take(contents, AHEAD)  # while it maps
            child.reach_stop()
            phases.done("map")
            userfaultfd = child.take(pidfd, compiled.userfaultfd)
            try:
                lazy_shared = {k: fd for k, fd in shared.items() if manifest.shared[k].anonymous}
                pager.attach(
                    userfaultfd,
                    pidfd,
                    prepared.ranges,
                    lazy_shared,
                    record=options.record,
                    own_pages=bool(checked.own_pages),
                    fill=options.fill,
                )
            finally:
                os.close(userfaultfd)
            phases.done("attach")
            child.write(ahead if prepared.pieces else chain(ahead, contents))
            if not prepared.pieces and sum(len(data) for _, _, data in ahead) < AHEAD:
                prepared.pieces = ahead
            phases.done("write")
            child.run_to_end()
            child.let_go(parked=options.parked)
            if namespace:
                namespace.watch()
        except BaseException:
            _kill(pid, pidfd)
            if namespace:
                namespace.end()
            raise
    phases.done("finish")
    return Started(pid, pidfd, namespace, (time.perf_counter() - phases.began) * 1e3, phases.ms)


# -- pieces of one restore ---------------------------------------------------------------------------------------------


def _ranges(manifest: Manifest) -> list[Range]:
    """What the pager serves of the address space."""
    ranges = []
    for v in manifest.vmas:
        if v.kind == "lazy":
            ranges.append(Range(v.start, v.end, v.start, BACKING_TEMPLATE))
        elif v.kind == "hugetlb":
            ranges.append(Range(v.start, v.end, v.start, BACKING_HUGETLB))
        elif v.kind == "shared" and manifest.shared[v.shared_object].anonymous:
            image = manifest.shared[v.shared_object].image + v.offset
            ranges.append(Range(v.start, v.end, image, BACKING_SHARED + v.shared_object))
    return ranges


def _is_stream(descriptor: int) -> bool:
    """False for what is none, -1 or a standard stream that the caller has closed: 0 to 2 may then be files of its own,
    even the store's, and no child would get them, as they are close-on-exec."""
    if descriptor > LAST_STREAM:
        return True
    try:
        return descriptor >= 0 and os.get_inheritable(descriptor)
    except OSError:
        return False


def _nothing(owned: ExitStack) -> int:
    """What stands for a standard stream that the caller does not have."""
    descriptor = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    owned.callback(os.close, descriptor)
    return descriptor


def _take(contents: Iterator[Piece], limit: int) -> list[Piece]:
    """The first pieces, `limit` bytes or one more piece."""
    taken, size = [], 0
    for piece in contents:
        taken.append(piece)
        size += len(piece[2])
        if size >= limit:
            break
    return taken


def _spawn(prepared: Prepared, pairs: list[tuple[int, int]], namespace: Namespace | None) -> tuple[int, int]:
    """The new process, stopped at its first instruction; returns (pid, pidfd)."""
    manifest = prepared.manifest
    try:
        return spawn.start(
            pairs,
            wanted_pid=manifest.pid,
            pid_namespace=namespace.descriptor if namespace else -1,
            session=1 if manifest.attributes.session_leader else 2 if manifest.attributes.group_leader else 0,
        )
    except OSError as error:
        raise _spawn_failure(manifest.pid, error) from error


def _spawn_failure(pid: int, error: OSError) -> RestoreError | MissingFeature:
    step, number = error.filename, error.errno
    if step == "clone3" and number == errno.EEXIST:
        return PidTaken(
            f"process id {pid}",
            "start process",
            "it is in use by another process or group",
            "end that one, or restore with --pid new (new_pid=True)",
            errno=number,
        )
    if step == "clone3" and number == errno.EPERM:
        advice = "run as root"
        return MissingFeature(
            f"process id {pid}", "start process", "choosing it takes CAP_CHECKPOINT_RESTORE", advice, errno=number
        )
    if step == "prlimit" and number == errno.EPERM:
        advice = "raise the hard limit (ulimit -Hn), or grant CAP_SYS_RESOURCE"
        return MissingFeature(
            f"process id {pid}",
            "start process",
            "it needs more descriptors than the hard limit allows",
            advice,
            errno=number,
        )
    return RestoreError(f"process {pid}", f"start: {step}", errno=number)


class _Child:
    """The new process under its program; the calling thread is its tracer."""

    def __init__(self, prepared: Prepared, compiled: Compiled, pid: int) -> None:
        self.prepared = prepared
        self.compiled = compiled
        self.pid = pid
        self.tids = [thread.tid for thread in prepared.manifest.threads]  # as we see them, once they have started
        self._status, self._index = ffi.new("int32_t *"), ffi.new("uint64_t *")
        self._started = ffi.new("int32_t[]", len(self.tids) - 1)
        self._why, self._result = ffi.new("uint64_t *"), ffi.new("int64_t *")

    def start(self, program: int) -> None:
        """Tell the program where the vdso is, and let the first instruction map it and jump to the executor."""
        mappings = procfs.parse_maps(procfs.read(self.pid, "maps"))
        kernel = {m.path: m.start for m in mappings if m.path in procfs.KERNEL_MAPPINGS}
        if not kernel:
            raise self._ended("map program")
        linked = self.compiled.linked
        for index, (name, _, _) in zip(self.compiled.kernel_moves, self.prepared.manifest.host.vdso, strict=True):
            os.pwrite(program, struct.pack("<Q", kernel[name]), linked.op_addresses[0] - linked.base + index * 80 + 16)
        try:
            spawn.enter(self.pid, linked, self.compiled.layout.program)
            # The end of a leader is not to be seen until its other threads are collected. With TRACEEXIT it stops
            # first, so a process that is killed by somebody else is noticed by who waits for any of its threads.
            # TRACECLONE tells the threads' ids. /proc/PID/task would, too, but who collects the ended process takes
            # what was looked up there out of the kernel's cache, as its last thread does: while that one is kept
            # from running, the other spins, for milliseconds.
            options = lib.PTRACE_O_EXITKILL | lib.PTRACE_O_TRACESYSGOOD | lib.PTRACE_O_TRACEEXIT
            lib.lr_set_options(self.pid, options | lib.PTRACE_O_TRACECLONE)
        except OSError as error:
            raise RestoreError(f"process {self.pid}", "enter program", errno=error.errno) from error
        self._must(lib.lr_continue(self.pid, 0), "start program")

    def reach_stop(self) -> None:
        self._next(self.pid, 0, lib.LR_STOP_ASKED, resume=False)

    def run_to_end(self) -> None:
        """The rest of the leader's list, then each thread's list."""
        self._next(self.pid, 0, lib.LR_STOP_END)
        self.tids = [self.pid, *self._started]
        for tid in self.tids[1:]:
            self._must(lib.lr_wait(tid, self._status), f"wait for thread {tid}")
            self._must(lib.lr_continue(tid, 0), f"start thread {tid}")
        for number, tid in enumerate(self.tids[1:], 1):
            self._next(tid, number, lib.LR_STOP_END, resume=False)

    def take(self, pidfd: int, number: int) -> int:
        return self._must(lib.lr_pidfd_getfd(pidfd, number), "pidfd_getfd")

    def contents(self) -> Iterator[Piece]:
        """What cannot be lazy: the main stack and its like."""
        try:
            for v in self.prepared.manifest.vmas:
                for start, end in v.written:
                    if v.kind in ("file", "shared"):  # zeros are not stored, and a file shows through
                        yield v, start, bytes(end - start)
                    for at, data in self.prepared.image.contents(start, end):
                        yield v, at, data
        except OSError as error:
            raise RestoreError(f"process {self.pid}", "read contents", errno=error.errno) from error

    def write(self, contents: Iterable[Piece]) -> None:
        try:
            memory = os.open(f"/proc/{self.pid}/mem", os.O_WRONLY | os.O_CLOEXEC)
            try:
                for v, at, data in contents:
                    if os.pwrite(memory, data, at) != len(data):
                        raise RestoreError(v.label, "write contents", "short write")
            finally:
                os.close(memory)
        except OSError as error:
            raise RestoreError(f"process {self.pid}", "write contents", errno=error.errno) from error
        attributes.restore_outside(self.prepared.manifest.attributes, self.pid)

    def let_go(self, *, parked: bool) -> None:
        """Remove what is ours from the address space, set every thread's state, detach."""
        self._fetch_futex_words()
        linked = self.compiled.linked
        here = self._registers(self.pid)
        syscall = linked.base + linked.image.index(spawn.SYSCALL)
        if self.compiled.trap_action:
            self._remote(here, syscall, lib.SYS_rt_sigaction, lib.SIGTRAP, self.compiled.trap_action, 0, 8)
        self._remote(here, syscall, lib.SYS_munmap, linked.base, self.compiled.end - linked.base)
        leader, *others = self.prepared.manifest.threads
        order = [*self.tids[1:], self.tids[0]]
        for tid, thread in zip(order, [*others, leader], strict=True):
            registers = ffi.from_buffer("struct lr_registers *", thread.registers)
            self._must(lib.lr_set_registers(tid, registers), f"set registers of thread {tid}")
            error = lib.lr_set_xstate(tid, ffi.from_buffer(thread.xstate), len(thread.xstate))
            self._must(error, f"set extended state of thread {tid}")
            self._must(lib.lr_set_signal_mask(tid, thread.signal_mask), f"set signal mask of thread {tid}")
        if parked or self.prepared.manifest.attributes.stopped:  # it takes effect before any of its own instructions
            os.kill(self.pid, signal.SIGSTOP)
        for tid in order:
            self._must(lib.lr_detach(tid, 0), f"detach thread {tid}")

    def _fetch_futex_words(self) -> None:
        """The kernel changes some futex words in a way that cannot wait for a pager: bring their pages first."""
        buffer, failed = ffi.new("char[4]"), ffi.new("uint64_t *")
        for thread in self.prepared.manifest.threads:
            for address in threads.futex_words(thread):
                lib.lr_copy_runs(self.pid, ffi.new("struct lr_run *", (address, 0, 4)), 1, buffer, 1, failed)

    # -- underneath ----------------------------------------------------------------------------------------------------

    def _next(self, tid: int, number: int, want: int, *, resume: bool = True) -> None:
        stop = self._status, self._index, self._why, self._result
        error = lib.lr_next_stop(tid, resume, *stop, self._started, len(self._started))
        if error:
            status = self._status[0]
            if status >> 16 or not os.WIFSTOPPED(status):
                raise self._ended("run program")
            raise RestoreError(f"thread {tid}", "run program", f"unexpected stop (status {status:#x})", errno=-error)
        if self._why[0] != want:
            self._surprise(number, self._index[0], self._result[0])

    def _surprise(self, number: int, index: int, result: int) -> None:
        ops = self.compiled.program.lists[number]
        op = ops.op(index) if index < len(ops) else Op(0, (), 0, 0, "program", "")
        step = op.name + (f" ({op.note})" if op.note else "")
        if -4096 < result < 0:
            advice = "`lazyrestore doctor` tells which privilege is missing" if result == -errno.EPERM else ""
            raise RestoreError(op.resource, step, advice=advice, errno=-result)
        raise RestoreError(op.resource, step, f"returned {result:#x} and not {op.want:#x}")

    def _remote(self, base: Registers, syscall: int, number: int, *values: int) -> None:
        arguments = ffi.new("uint64_t[6]", [*values, *[0] * (6 - len(values))])
        packed = ffi.from_buffer("struct lr_registers *", base.pack())
        self._must(lib.lr_remote_syscall(self.pid, packed, syscall, number, arguments, self._result), "finish")
        if self._result[0] < 0:
            raise RestoreError(f"process {self.pid}", "finish", errno=-self._result[0])

    def _registers(self, tid: int) -> Registers:
        registers = ffi.new("struct lr_registers *")
        self._must(lib.lr_get_registers(tid, registers), "read registers")
        return Registers.unpack(bytes(ffi.buffer(registers)))

    def _ended(self, step: str) -> RestoreError:
        return RestoreError(f"process {self.pid}", step, "somebody ended it")

    def _must(self, result: int, step: str) -> int:
        if result < 0:
            raise RestoreError(f"process {self.pid}", step, errno=-result)
        return int(result)


def _kill(pid: int, pidfd: int) -> None:
    """End a process that did not come up, and collect it: its other threads first, which we trace too."""
    lib.lr_pidfd_send_signal(pidfd, lib.SIGKILL)
    with suppress(ChildProcessError, NoSuchProcess):  # a failed step has collected it, or the kernel (SIGCHLD ignored)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        for tid in sorted(procfs.threads(pid), key=lambda tid: tid == pid):
            status = ffi.new("int32_t *", STOPPED)
            while os.WIFSTOPPED(status[0]):
                lib.lr_continue(tid, 0)  # from the stop in which a step met it
                if lib.lr_wait(tid, status) < 0:
                    break
    os.close(pidfd)
