"""Restoring: a new process runs its program, the pager takes its lazy memory, and it is let go.

The steps, each timed as a phase: compile (or take the stored plan), check (this host, what is to be opened), pager
(until it answers), spawn, map (the program up to the userfaultfd; the mapped files are checked meanwhile), attach (the
pager registers the ranges), write (what cannot be lazy), finish (threads, credentials, registers, detach). Whatever
fails, the new process is killed and reaped before the exception leaves.

What a plan (`restore_plan`) does not hold, this file does not know: the manifest, and with it all that knows resources,
is imported only to make a plan, or to say in the terms of resources why something failed.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from lazyrestore import memory_files, spawn, stored_plan
from lazyrestore.errors import MissingFeature, PidTaken, RestoreError
from lazyrestore.mapped_files import FilesHere, OpenFiles
from lazyrestore.new_process import NewProcess, Piece
from lazyrestore.pager.client import PagerClient, PagerGone
from lazyrestore.resources import addresses
from lazyrestore.restore_checks import check_host, check_huge_pages, check_pid_free
from lazyrestore.restore_options import AS_IT_WAS, Options
from lazyrestore.restore_plan import NOTHING, Ahead, OpenedPath, RestorePlan
from lazyrestore.store import HUGE_CHUNK, StoredImage

if TYPE_CHECKING:
    from lazyrestore.manifest import Manifest
    from lazyrestore.own_pages import Run
    from lazyrestore.pid_namespace import Namespace
    from lazyrestore.program import Program

LAST_STREAM = 2
ROOM = 16  # descriptors that may be opened while a plan is made for numbers above all others
PLANS = 16  # that are kept: each has two descriptors, and who waits for READY=1 has other mounts every time
AHEAD = 4 << 20  # bytes of contents that are decompressed while the new process maps its memory
TYPE = 0o170000  # S_IFMT: what kind of file a mode tells


class Started(msgspec.Struct):
    """A restored process that runs: child (its pid is ours, not its namespace's), to be let go; times in ms."""

    child: spawn.Child
    init: Namespace | None
    restore_ms: float
    phases: dict[str, float]


class Ready:
    """A plan, and what every restore by it shares: the program, which new processes map privately, and the ranges that
    the pager serves, in memory files. made_for: the settings and pages ahead that it was made for."""

    __slots__ = ("_lock", "_program", "_ranges", "made_for", "plan")

    def __init__(self, plan: RestorePlan, made_for: object) -> None:
        self.plan, self.made_for = plan, made_for
        self._lock = threading.Lock()  # threads share the first restore
        self._program: memory_files.MemoryFile | None = None
        self._ranges: memory_files.MemoryFile | None = None

    @property
    def program(self) -> int:
        """Its descriptor. Raises RestoreError."""
        with self._lock:
            if self._program is None:
                self._program = memory_files.MemoryFile("lazyrestore-program", self.plan.compiled.linked.image)
            return self._program.descriptor

    @property
    def ranges(self) -> int:
        """Their descriptor. Raises RestoreError."""
        with self._lock:
            if self._ranges is None:
                self._ranges = memory_files.MemoryFile("lazyrestore-ranges", self.plan.ranges)
            return self._ranges.descriptor


class Prepared(msgspec.Struct):
    """A snapshot on this host, to be restored many times. manifest: asked for when a plan is to be made."""

    name: str
    manifest: Callable[[], Manifest]
    image: StoredImage
    plans: dict[object, Ready]  # Options.shape → one that can be used again
    files: FilesHere
    own_pages: tuple[bytes, tuple[Run, ...]] = (b"", ())  # a working set, and where the process wrote in it
    file_pages: tuple[Run, ...] = ()  # that one which was handed out had of mapped files
    pieces: list[Piece] = msgspec.field(default_factory=list)  # what contents() gave, if it is less than AHEAD
    huge_pages: int = 0  # of 2 MiB, with content


class Checked(msgspec.Struct, frozen=True):
    """One restore that nothing speaks against, about to begin."""

    prepared: Prepared
    ready: Ready
    files: OpenFiles | None  # to be handed over, if that is the plan
    options: Options
    ahead: Ahead
    phases: _Phases


class _Phases:
    def __init__(self) -> None:
        self.began = self._last = time.perf_counter()
        self.ms: dict[str, float] = {}

    def done(self, name: str) -> None:
        now = time.perf_counter()
        self.ms[name] = self.ms.get(name, 0.0) + (now - self._last) * 1e3
        self._last = now


def prepare(
    name: str,
    image: StoredImage,
    manifest: Callable[[], Manifest],
    *,
    stored: tuple[stored_plan.Settings, RestorePlan] | None = None,
) -> Prepared:
    """Check what does not change while this host runs: CPU, kernel. Raises CpuMismatch, KernelMismatch.

    stored: the snapshot's own plan and what it is for, if the manifest is its own, too.
    """
    check_host(name, stored[1].host if stored else manifest().host)
    prepared = Prepared(name, manifest, image, {}, FilesHere(lambda: manifest().files))
    if stored:
        settings, plan = stored
        prepared.plans[AS_IT_WAS.shape] = Ready(plan, (settings, NOTHING))
    if image.hugetlb:
        prepared.huge_pages = sum(length == HUGE_CHUNK for _, length, *_ in image.entries())
    return prepared


def listening_elsewhere(manifest: Manifest, ports: Mapping[int, int], reuse_port: bool) -> Manifest:
    """The manifest with TCP listeners on other ports (old → new), all with SO_REUSEPORT if wanted. RestoreError."""
    from lazyrestore.resources import listeners

    table = listeners.rebind(manifest.descriptors, ports, reuse_port=reuse_port)
    return msgspec.structs.replace(manifest, descriptors=table)


def check_given(manifest: Manifest, given: Mapping[int, int]) -> None:
    """RestoreError unless the caller's descriptors are sockets that can take the place of those listening ones."""
    from lazyrestore.resources import listeners

    listeners.check_given(manifest.descriptors, given)


def plan_for(
    prepared: Prepared, options: Options, ahead: Ahead = NOTHING, above: int = 0, *, open_files: bool = True
) -> Ready:
    """The stored plan or that of the last time, if it can be used again.

    Handed-over descriptors get numbers higher than `above`. open_files: they may be those of mapped files, too.
    """
    ready = prepared.plans.get(options.shape)
    now = stored_plan.settings(), ahead
    if ready and ready.made_for == now:
        layout = ready.plan.compiled.layout
        if above < layout.program and (open_files or not layout.files):
            return ready
    from lazyrestore.restore_program import make_plan

    ready = Ready(make_plan(prepared.manifest(), options, ahead, above + 1, open_files=open_files), now)
    if ready.plan.reusable:
        if len(prepared.plans) >= PLANS:
            prepared.plans.pop(next(iter(tuple(prepared.plans))), None)
        prepared.plans[options.shape] = ready
    return ready


def explain(prepared: Prepared, options: Options = AS_IT_WAS) -> list[str]:
    """The restore program, a line per operation; nothing is run."""
    from lazyrestore.restore_program import compile_for

    program, _ = compile_for(prepared.manifest(), options)
    return list(program.explain())


def learn(prepared: Prepared, pid: int) -> None:
    """Have later ones parked with those pages of mapped files that this one, which was handed out, has by now."""
    from lazyrestore.own_pages import file_pages_of

    prepared.file_pages = prepared.file_pages or file_pages_of(prepared.manifest(), pid)


def check(prepared: Prepared, options: Options = AS_IT_WAS, filled: bytes = b"") -> Checked:
    """Make the plan if that is to do, and check what may change between two restores, but for the mapped files: all
    that can be done before the pager answers. `filled`: a working set all of which is in the pager's template; one to
    be parked then gets its own copies of the pages that it is about to write before the pager has to do with them.
    Raises PidTaken, FileChanged and RestoreError."""
    phases = _Phases()
    known, own_pages = prepared.own_pages
    if known != filled:
        from lazyrestore.own_pages import own_pages_of

        prepared.own_pages = filled, (own_pages := own_pages_of(prepared.manifest(), prepared.image, filled))
    ahead = Ahead(own_pages, prepared.file_pages) if options.parked else NOTHING
    ready = plan_for(prepared, options, ahead, open_files=prepared.files.opens)
    plan = ready.plan
    phases.done("compile")
    if not options.new_pid:
        check_pid_free(plan.pid)
    if plan.files.with_content:
        prepared.files.check(plan.files)
    files = None
    if plan.compiled.layout.files:
        files = prepared.files.opened(plan.files, plan.compiled.layout.files.keys())
        if files is None:
            ready = plan_for(prepared, options, ahead, open_files=False)
            plan = ready.plan
    _check_opened(prepared, plan)
    for address in plan.addresses:
        addresses.make_free(address)
    phases.done("check")
    return Checked(prepared, ready, files, options, ahead, phases)


def run(
    checked: Checked, answered: Callable[[], PagerClient], template: int, streams: Sequence[int] = (0, 1, 2)
) -> Started:
    """Restore once.

    answered: gives the pager, and is called when that is needed; template: its template, which the new process maps
    before, or -1. `streams` are the caller's descriptors for the new process's standard streams, where it needs them.
    Raises PagerGone if the pager is another one than that of the template, too.
    """
    prepared, ready, options, phases = checked.prepared, checked.ready, checked.options, checked.phases
    pager = answered() if template < 0 or prepared.image.hugetlb else None
    phases.done("pager")
    with ExitStack() as owned:
        shared = {
            index: memory_files.shared(prepared.name, about, prepared.image, owned)
            for index, about in enumerate(ready.plan.shared)
        }
        hugetlb = pager.hugetlb_fd if pager else None
        if hugetlb is not None:
            check_huge_pages(prepared.name, prepared.huge_pages, hugetlb)
        if pager:
            template = pager.template_fd
        mapped = os.fstat(template)
        streams = [stream if _is_stream(stream) else _nothing(owned) for stream in streams]
        inherited = dict(options.inherited)
        opened = checked.files.descriptors if checked.files else {}
        others = [template, hugetlb or 0, spawn.executable()]
        others += [*shared.values(), *streams, *inherited.values(), *opened.values()]
        while (
            highest := max(ready.program, *others)
        ) >= ready.plan.compiled.layout.program:  # a caller with many descriptors
            ready = plan_for(prepared, options, checked.ahead, highest + ROOM, open_files=bool(opened))
        plan = ready.plan
        layout = plan.compiled.layout
        pairs = [(ready.program, layout.program), (template, layout.template)]
        pairs += [(shared[k], layout.shared[k]) for k in shared]
        pairs += [(streams[k], layout.streams[k]) for k in range(3)]
        pairs += [(inherited[k], layout.inherited[k]) for k in inherited]
        pairs += [(opened[k], layout.files[k]) for k in layout.files]
        # Where there is none, something else: the program takes the number for taken.
        pairs.append((template if hugetlb is None else hugetlb, layout.hugetlb))
        namespace = None
        if options.new_pid:
            from lazyrestore.pid_namespace import new_namespace

            namespace = new_namespace(plan.pid, ends_with_caller=options.ends_with_caller)
        try:
            child = _spawn(plan, pairs, namespace)
        except BaseException:
            if namespace:
                namespace.end()
            raise
        phases.done("spawn")
        try:
            named = partial(_named_program, checked, plan)
            process = NewProcess(plan, prepared.image, named, child.pid, renumbered=options.new_pid)
            process.start()  # it maps its memory meanwhile
            process.set_attributes()
            if not plan.files.with_content:
                prepared.files.check(plan.files)
            contents = process.contents()
            ahead = prepared.pieces or _take(contents, AHEAD)
            first = [piece for piece in ahead if not piece[0].zeros]  # where the pager has nothing to do
            ranges = ready.ranges
            process.reach_stop()
            phases.done("map")
            if pager is None:
                pager = answered()
                if not os.path.samestat(mapped, os.fstat(pager.template_fd)):
                    raise PagerGone(f"pager of {prepared.name}", "connect", "another one has taken its place")
                phases.done("pager")
            userfaultfd = process.take(child.pidfd, plan.compiled.userfaultfd)
            try:
                lazy_shared = {k: fd for k, fd in shared.items() if plan.shared[k].anonymous}
                pager.attach(
                    userfaultfd,
                    child.pidfd,
                    ranges,
                    lazy_shared,
                    record=options.record,
                    own_pages=bool(checked.ahead.own),
                    fill=options.fill,
                    meanwhile=partial(process.write, first),
                )
            finally:
                os.close(userfaultfd)
            phases.done("attach")
            rest = [piece for piece in ahead if piece[0].zeros]
            if rest or not prepared.pieces:
                process.write(rest if prepared.pieces else chain(rest, contents))
            if not prepared.pieces and sum(len(data) for _, _, data in ahead) < AHEAD:
                prepared.pieces = ahead
            phases.done("write")
            process.run_to_end()
            process.let_go(parked=options.parked)
            if namespace:
                namespace.hold() if options.held else namespace.watch()
        except BaseException:
            child.end()
            if namespace:
                namespace.end()
            raise
    phases.done("finish")
    return Started(child, namespace, (time.perf_counter() - phases.began) * 1e3, phases.ms)


# -- pieces of one restore ---------------------------------------------------------------------------------------------


def _check_opened(prepared: Prepared, plan: RestorePlan) -> None:
    """FileChanged if what it is to open or to enter is not there, or of another kind.

    Before that is opened, which might have effects.
    """
    if not all(map(os.path.isdir, plan.folders)):
        from lazyrestore.resources import attributes

        attributes.check_place(prepared.manifest().attributes)
    if not all(map(_is_as_opened, plan.opened)):
        from lazyrestore.resources import descriptors

        descriptors.check_files(prepared.manifest().descriptors)


def _is_as_opened(wanted: OpenedPath) -> bool:
    try:
        found = os.lstat(wanted.path) if wanted.link else os.stat(wanted.path)
    except OSError:
        return False
    return found.st_mode & TYPE == wanted.type and found.st_size >= wanted.least


def _named_program(checked: Checked, plan: RestorePlan) -> Program:
    """A plan's program with the names of what its operations serve, which it lacks."""
    from lazyrestore.restore_program import compile_for

    prepared, layout = checked.prepared, plan.compiled.layout
    program, _ = compile_for(prepared.manifest(), checked.options, checked.ahead, layout)
    return program


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


def _spawn(plan: RestorePlan, pairs: list[tuple[int, int]], namespace: Namespace | None) -> spawn.Child:
    """The new process, stopped at its first instruction."""
    in_namespace = namespace.descriptor if namespace else -1
    try:
        return spawn.start(pairs, wanted_pid=plan.pid, pid_namespace=in_namespace, session=plan.session)
    except OSError as error:
        raise _spawn_failure(plan.pid, error) from error


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
