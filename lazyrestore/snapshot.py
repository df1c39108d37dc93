"""Taking a snapshot: look, refuse what cannot be restored, freeze, capture, copy the memory, thaw, compress and store.

What a restored process never wrote is not read at all: its snapshot refers to the one that it was restored from
(resources/inherited.py). The process is frozen while its state is read and its populated pages are copied to a buffer;
hashing, compressing and writing come after it runs again (with kill=True it stays frozen until the snapshot is safely
stored, so nothing it does afterwards is lost). When the copy would take more than half of the available memory, the
memory is copied, compressed and stored piece by piece while it is frozen. Whatever fails, leaving the `Frozen` block
lets the process go on, and the store's writer leaves nothing visible.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import msgspec
from msgspec.structs import replace

from lazyrestore import manifest as manifests
from lazyrestore import origin, stored_plan
from lazyrestore._native import _core
from lazyrestore.errors import (
    AlreadyTraced,
    KernelThread,
    NoSuchProcess,
    NotPermitted,
    OutOfMemory,
    OwnProcess,
    SnapshotFailed,
    UnsupportedResources,
    WrongArchitecture,
    ZombieProcess,
)
from lazyrestore.kernel import capabilities, host, procfs
from lazyrestore.kernel.tracee import Frozen, check
from lazyrestore.manifest import Manifest
from lazyrestore.resources import attributes, descriptors, posix_timers, signals, threads, vma
from lazyrestore.resources.inherited import Origin
from lazyrestore.resources.memory_plan import Plan, Planner, Run
from lazyrestore.restore_plan import Host
from lazyrestore.store import HUGE_CHUNK, ImageStore, ImageWriter, Parent, Reference

lib, ffi = _core.lib, _core.ffi

PIECE = 256 << 10  # bytes copied by one call: small enough that all cores get their share
# Bytes copied at a time, and 2 MiB more, when the whole does not fit, or need not: with kill=True nobody waits for the
# thaw. While one half of the buffer is compressed, the other is filled.
STREAM = 16 << 20
HALF = STREAM + (4 << 20)
XFEATURES_AT = 464  # offset of XCR0 in the software part of the XSAVE area that ptrace gives

Progress = Callable[[int, int], None]


class Taken(msgspec.Struct, frozen=True):
    """What a snapshot cost: the pause in ms, the whole in seconds."""

    pause_ms: float
    seconds: float


def take(
    store: ImageStore,
    pid: int,
    name: str,
    *,
    kill: bool = False,
    replace: bool = False,
    level: int = 1,
    progress: Progress | None = None,
    committing: Callable[[], None] | None = None,
) -> Taken:
    """Snapshot process `pid` into `store` under `name`. Raises what `errors` lists for processes and stores; what
    `committing` raises, which is called right before the snapshot becomes visible."""
    began = time.monotonic()
    _check_target(pid)
    store.check_new(name, replace=replace)  # before all the trouble; the writer looks again
    pidfd = check(lib.lr_pidfd_open(pid), pid, "pidfd_open")
    try:
        _refuse_unsupported(pid, pidfd)
        with ExitStack() as owned, store.writer(name, replace=replace, level=level, progress=progress) as writer:
            identities = _identify_files(pid)
            ancestor = owned.enter_context(closing(found)) if (found := origin.find(store, writer, pid)) else None
            parent = ancestor.parent if ancestor else None
            buffer = _Buffer(0 if kill else _to_copy(pid, restored=parent is not None))
            stopped = procfs.parse_stat(procfs.read(pid, "stat")).state == "T"
            frozen = Frozen(pid)
            paused = time.monotonic()
            with frozen:
                came_from = ancestor.origin(pidfd) if ancestor else None
                capture = _capture(frozen, pidfd, identities, came_from, stopped=stopped)
                try:
                    if parent:
                        _refer(writer, parent, capture.plan)
                    fits = buffer.make_room(capture.plan.bytes, all_at_once=not kill)
                    for batch in [capture.plan.runs] if fits else _batches(capture.plan.runs):
                        runs = buffer.fill(pid, frozen.memory, batch)
                        if not fits:
                            buffer.store_soon(writer, runs)
                finally:
                    capture.planner.close()
                if kill:
                    if fits:
                        buffer.store(writer, runs)
                    pause = (time.monotonic() - paused) * 1e3
                    _commit(writer, capture, pause, committing)
                    frozen.kill()
            if not kill:
                pause = (time.monotonic() - paused) * 1e3
                if fits:
                    buffer.store(writer, runs)
                _commit(writer, capture, pause, committing)
        return Taken(pause, time.monotonic() - began)
    finally:
        os.close(pidfd)


# -- before the freeze -------------------------------------------------------------------------------------------------


def _check_target(pid: int) -> None:
    what = f"process {pid}"
    host.require_own_proc()
    if pid <= 0:
        raise NoSuchProcess(what, "snapshot", "not a process id")
    stat = procfs.parse_stat(procfs.read(pid, "stat"))
    status = procfs.parse_status(procfs.read(pid, "status"))
    if int(status["Tgid"]) != pid:
        raise NoSuchProcess(
            what, "snapshot", f"it is a thread of process {status['Tgid']}", f"snapshot {status['Tgid']}"
        )
    if pid == os.getpid():
        raise OwnProcess(what, "snapshot", "a process cannot snapshot itself", "run lazyrestore from another process")
    if stat.kernel_thread:
        raise KernelThread(what, "snapshot", f"{stat.comm} is a kernel thread")
    if stat.state in "ZX":
        raise ZombieProcess(what, "snapshot", "it has exited and waits for its parent to collect it")
    tracer = int(status.get("TracerPid", "0"))
    if tracer:
        raise AlreadyTraced(what, "snapshot", f"already traced by process {tracer}", "detach that tracer first")
    try:
        with open(f"/proc/{pid}/exe", "rb") as file:
            head = file.read(20)
    except PermissionError as error:
        raise _not_permitted(what, status) from error
    except FileNotFoundError as error:
        raise NoSuchProcess(what, "snapshot", "it is ending") from error
    if head[:4] == b"\x7fELF" and (head[4] != 2 or struct.unpack_from("<H", head, 18)[0] != 62):
        raise WrongArchitecture(what, "snapshot", "it is not an x86-64 program")
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as error:
        raise NotPermitted(
            what, "snapshot", "its memory may not be read", "run as root or as its owner with CAP_SYS_PTRACE"
        ) from error


def _not_permitted(what: str, status: dict[str, str]) -> NotPermitted:
    """Why ptrace(2), "Ptrace access mode checking", does not let us at the process of that /proc/PID/status."""
    owner, user = int(status["Uid"].split()[0]), os.geteuid()
    held = int(procfs.parse_status(procfs.read(os.getpid(), "status"))["CapEff"], 16)
    missing = capabilities.names(int(status["CapPrm"], 16) & ~held)
    if owner != user and user != 0:
        reason, advice = f"it belongs to user {owner}", "run as root or as that user with CAP_SYS_PTRACE"
    elif held & capabilities.SYS_PTRACE:
        also = f" (it also has what you lack: {', '.join(missing)})" if missing else ""
        reason = f"a security module, a sandbox or a user namespace guards it, in spite of your CAP_SYS_PTRACE{also}"
        advice = "run lazyrestore outside of that"
    elif owner != user:
        reason, advice = f"it belongs to user {owner}, and you lack CAP_SYS_PTRACE", "run with CAP_SYS_PTRACE"
    elif missing:
        reason = f"it has capabilities that you lack: {', '.join(missing)}"
        advice = "run with CAP_SYS_PTRACE, or with all of these"
    else:
        reason, advice = "it lets nobody look (PR_SET_DUMPABLE), and you lack CAP_SYS_PTRACE", "run with CAP_SYS_PTRACE"
    return NotPermitted(what, "snapshot", reason, advice)


def _refuse_unsupported(pid: int, pidfd: int) -> None:
    """UnsupportedResources with everything that cannot be restored."""
    items = _unsupported_attributes(pid)
    mappings = procfs.parse_maps(procfs.read(pid, "smaps"))
    items += vma.unsupported(mappings) + vma.out_of_reach(pid, mappings)
    items += descriptors.lasting_complaints(pid, pidfd)
    if items:
        raise UnsupportedResources(f"process {pid}", items)


def _unsupported_attributes(pid: int) -> list[str]:
    items = []
    for child in procfs.children(pid):
        try:
            comm = procfs.read(child, "comm").decode(errors="replace").strip()
        except NoSuchProcess:
            continue
        items.append(f"child process {child} ({comm})")
    for kind in ("mnt", "net", "ipc", "uts", "user", "cgroup", "time", "pid"):
        try:
            if os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"):
                items.append(f"{kind} namespace of its own")
        except FileNotFoundError:
            continue
    return items + posix_timers.unsupported(pid) + attributes.out_of_place(pid) + threads.unsupported(pid)


def _identify_files(pid: int) -> dict[str, vma.FileIdentity]:
    paths = {
        mapping.path
        for mapping in procfs.parse_maps(procfs.read(pid, "maps"))
        if mapping.path.startswith("/") and not mapping.deleted
    }
    found = {path: vma.identify(path, "") for path in paths if not path.startswith("/memfd:")}
    return {path: identity for path, identity in found.items() if identity is not None}


def _to_copy(pid: int, *, restored: bool) -> int:
    """About how many bytes will be copied: what is resident, of a restored process what it wrote."""
    resident, of_files = (int(word) for word in procfs.read(pid, "statm").split()[1:3])
    return (resident - of_files if restored else resident) * mmap.PAGESIZE


# -- while it is frozen ------------------------------------------------------------------------------------------------


class _Capture(msgspec.Struct):
    planner: Planner
    plan: Plan
    manifest: Manifest


def _capture(
    frozen: Frozen,
    pidfd: int,
    identities: dict[str, vma.FileIdentity],
    came_from: Origin | None,
    *,
    stopped: bool,
) -> _Capture:
    pid = frozen.pid
    mappings = procfs.parse_maps(procfs.read(pid, "smaps"))
    items = _unsupported_attributes(pid) + vma.unsupported(mappings) + vma.out_of_reach(pid, mappings)
    table = descriptors.survey(pid, pidfd)
    if items or table.unsupported:
        raise UnsupportedResources(f"process {pid}", items + table.unsupported)
    host = _host(frozen, mappings)
    planner = Planner(pid, identities, came_from)
    try:
        plan = planner.build(mappings)
        frozen.begin_calls()
        timers = posix_timers.capture(frozen)
        captured = [threads.capture(frozen, tid) for tid in frozen.tids]
        handlers = signals.capture(frozen)
        pending = [*handlers.pending, *(info for thread in captured for info in thread.pending)]
        timers = posix_timers.ask_again(frozen, timers, pending)
        handlers = replace(handlers, pending=posix_timers.without_dropped(handlers.pending, timers))
        captured = [replace(each, pending=posix_timers.without_dropped(each.pending, timers)) for each in captured]
        whole = attributes.capture(frozen, stopped=stopped)
        plan.runs = [_read_unreadable(frozen, run) if run.forced and run.lazy else run for run in plan.runs]
        frozen.end_calls()
    except BaseException:
        planner.close()
        raise
    plan.runs = _without_overlap(plan.runs)
    xfeatures = struct.unpack_from("<Q", captured[0].xstate, XFEATURES_AT)[0]
    manifest = Manifest(
        version=manifests.VERSION if timers else manifests.WITHOUT_POSIX_TIMERS,
        pid=pid,
        comm=os.fsdecode(captured[0].name),
        created=time.time(),
        host=replace(host, xfeatures=xfeatures),
        attributes=whole,
        signals=handlers,
        threads=captured,
        vmas=plan.vmas,
        files=plan.files,
        shared=plan.shared,
        descriptors=table,
        pause_ms=0.0,
        posix_timers=timers,
    )
    return _Capture(planner, plan, manifest)


def _refer(writer: ImageWriter, parent: Parent, plan: Plan) -> None:
    """What the process has inherited is the parent's."""
    for ranges, huge in ((plan.references, False), (plan.huge_references, True)):
        writer.refer(parent, [Reference(*each) for each in ranges], hugetlb=huge)


def _read_unreadable(frozen: Frozen, run: Run) -> Run:
    """Content of a restored process that is behind PROT_NONE and may not have arrived: only a page fault brings it, so
    the range is made readable for a moment. /proc/PID/mem, which ignores protection, does not wait for a pager."""
    with frozen.calls(frozen.pid) as call:
        check(call(lib.SYS_mprotect, run.address, run.length, lib.PROT_READ), frozen.pid, "mprotect")
        data = frozen.read(run.address, run.length)
        check(call(lib.SYS_mprotect, run.address, run.length, run.protection), frozen.pid, "mprotect")
    return replace(run, data=data)


def _commit(writer: ImageWriter, capture: _Capture, pause: float, committing: Callable[[], None] | None) -> None:
    manifest = replace(capture.manifest, pause_ms=pause)
    encoded = manifests.encode(manifest)
    writer.commit(encoded, stored_plan.made_of(manifest, encoded), manifest.created, committing)


def _host(frozen: Frozen, mappings: list[procfs.Mapping]) -> Host:
    kernel = [mapping for mapping in mappings if mapping.path in host.KERNEL_MAPPINGS]
    vdso = next((mapping for mapping in kernel if mapping.path == "[vdso]"), None)
    if vdso is None:
        raise SnapshotFailed(f"process {frozen.pid}", "capture", "it has no vdso")
    return Host(
        kernel=os.uname().release,
        machine=os.uname().machine,
        vdso=[(mapping.path, mapping.start, mapping.size) for mapping in kernel],
        vdso_hash=host.vdso_hash(frozen.read(vdso.start, vdso.size)),
        cpu_model="",
        cpu_flags=sorted(host.cpu_flags()),
        xfeatures=0,
    )


def _without_overlap(runs: list[Run]) -> list[Run]:
    """Runs by image address; what two mappings of one shared object both cover is kept once."""
    result: list[Run] = []
    end = 0
    for run in sorted(runs, key=lambda run: run.image):
        skip = max(0, end - run.image)
        if skip >= run.length:
            continue
        result.append(replace(run, image=run.image + skip, address=run.address + skip, length=run.length - skip))
        end = run.image + run.length
    return result


def _batches(runs: list[Run]) -> Iterator[list[Run]]:
    """Runs in groups of STREAM bytes and at most 2 MiB more.

    They are cut at borders of 2 MiB, so that no chunk is in two groups.
    """
    border = 2 << 20
    batch: list[Run] = []
    size = 0
    for run in runs:
        at, end = run.image, run.image + run.length
        while at < end:
            stop = min(end, (at // border + 1) * border)
            into = at - run.image
            data = run.data[into : into + stop - at] if run.data is not None else None
            piece = replace(run, image=at, address=run.address + into, length=stop - at, data=data)
            if (
                size + piece.length > STREAM
                and batch
                and at // border != (batch[-1].image + batch[-1].length - 1) // border
            ):
                yield batch
                batch, size = [], 0
            batch.append(piece)
            size += piece.length
            at = stop
    if batch:
        yield batch


_Placed = tuple[tuple[int, int, int], bool]  # (image address, offset in the buffer, length), whether of huge pages


class _Buffer:
    """Memory for copies, populated before the freeze so that the freeze does not pay for its page faults."""

    def __init__(self, expected: int) -> None:
        self._map: mmap.mmap | None = None
        self._start = 0  # of the half to be filled
        self._other = 0  # the writer's number for the other half
        self.limit = _available_memory() // 2
        if 0 < expected <= self.limit:
            self._allocate(expected + (4 << 20))

    def _allocate(self, size: int) -> None:
        size = -(-size // (2 << 20)) * (2 << 20)
        try:
            self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            advice = "free some memory, or raise the limit on it (ulimit -v)"
            raise OutOfMemory("copy buffer", "mmap", advice=advice, errno=error.errno) from error
        self._map.madvise(mmap.MADV_HUGEPAGE)
        with suppress(OSError):  # before Linux 5.14, or too little memory: it is populated on use
            self._map.madvise(lib.MADV_POPULATE_WRITE)

    @property
    def memory(self) -> memoryview:
        assert self._map is not None
        return memoryview(self._map)

    def make_room(self, needed: int, *, all_at_once: bool) -> bool:
        """Whether `needed` bytes fit at once, if that is wanted.

        If not, there is room for two batches.
        """
        if all_at_once and self._map is not None and len(self._map) >= needed:
            return True
        self._map = None
        fits = (all_at_once and needed <= self.limit) or needed <= STREAM
        self._allocate(max(needed, 1) if fits else 2 * HALF)
        return fits

    def fill(self, pid: int, memory: int, runs: list[Run]) -> list[_Placed]:
        """Copy the runs; returns where each lies in the buffer."""
        placed = []
        pieces = array("Q")
        offset = self._start
        assert self._map is not None and offset + sum(run.length for run in runs) <= len(self._map)
        view = memoryview(self._map)
        for run in runs:
            placed.append(((run.image, offset, run.length), run.huge))
            if run.data is not None:
                view[offset : offset + run.length] = run.data
            elif run.descriptor >= 0 or run.forced:
                _read_fully(
                    run.descriptor if run.descriptor >= 0 else memory, view[offset : offset + run.length], run.address
                )
            else:
                for at in range(0, run.length, PIECE):
                    pieces.extend((run.address + at, offset + at, min(PIECE, run.length - at)))
            offset += run.length
        failed = ffi.new("uint64_t *")
        count = len(pieces) // 3
        error = lib.lr_copy_runs(
            pid,
            ffi.from_buffer("struct lr_run[]", pieces) if count else ffi.NULL,
            count,
            ffi.from_buffer(view),
            os.cpu_count() or 1,
            failed,
        )
        if error:
            raise SnapshotFailed(f"process {pid}", f"read memory at {failed[0]:#x}", errno=-error)
        return placed

    def store(self, writer: ImageWriter, placed: list[_Placed]) -> None:
        """Hand the copies to the store."""
        writer.settle(self._hand_over(writer, placed))

    def store_soon(self, writer: ImageWriter, placed: list[_Placed]) -> None:
        """The same while the next fill() goes on, to the other half of the buffer."""
        mine = self._hand_over(writer, placed)
        writer.settle(self._other)
        self._start, self._other = HALF - self._start, mine

    def _hand_over(self, writer: ImageWriter, placed: list[_Placed]) -> int:
        """Huge pages in chunks of their size."""
        number = writer.add_soon(self.memory, [run for run, huge in placed if not huge])
        if any(huge for _, huge in placed):
            number = writer.add_soon(self.memory, [run for run, huge in placed if huge], chunk_size=HUGE_CHUNK)
        return number


def _read_fully(descriptor: int, target: memoryview, address: int) -> None:
    done = 0
    while done < len(target):
        got = os.preadv(descriptor, [target[done:]], address + done)
        if got <= 0:
            target[done:] = bytes(len(target) - done)  # behind the end of a memory file
            return
        done += got


def _available_memory() -> int:
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 30
