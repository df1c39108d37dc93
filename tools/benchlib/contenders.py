"""Every way to a first response, for every victim: cold start, fork(), CRIU, a plain template, lazyrestore.

Of each: to resumed, to the first response, faults, CPU time, memory. CPU time is that of all who take part up to the
first response: the new process; the pager or the daemon behind it; the restorer until the process is resumed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lazyrestore
from benchlib import criu, usage
from benchlib.fleet import ask_clone, same
from benchlib.measure import RESUMED, Report, clock
from benchlib.product import finish, stop_pager
from benchlib.victims import WORKER, Kind, Victim, end, reap, running
from lazyrestore import restore
from lazyrestore.api import RestoredProcess
from lazyrestore.pager import wire
from lazyrestore.pager.client import BACKING_SHARED, PagerClient
from lazyrestore.store import StoredImage

BIG = 1 << 30  # bytes of a victim's memory, above which only the last contender of a round has all of it compared
COLD, FORK = "cold start", "fork() of the live process"
TEMPLATE = "populated MAP_PRIVATE template"
UNRECORDED, RECORDED = "1st restore, nothing recorded", "1st restore"
COLD_CACHE = "1st restore, cold page cache"
CLONE, PLAIN_CLONE, POOL = "2nd clone", "2nd clone, without working set", "pool hand-out"
OWN = "warm, response after 20 ms of idling"
HAND_OUTS = 4  # of each round
IDLE_SECONDS = 0.02  # of the live process before a request: CPUs halt and caches cool as while a clone is parked


def one_round(report: Report, kind: Kind, folder: Path, *, with_criu: bool) -> None:
    """Every contender once, the pool some times more, for one victim. Raises Unresponsive, LazyrestoreError."""
    with running(kind, folder / "victim.sock") as victim:
        answer, whole = _live(report, kind, victim)
        _lazyrestore(report, kind, victim, folder / "store", answer, whole)
    if not with_criu:
        return
    with running(kind, folder / "criu.sock") as victim:
        answer, whole = _live(report, kind, victim)
        try:
            criu.measure(report, kind.name, victim, folder, answer, whole)
        except criu.CriuFailed as error:
            report.note(f"{kind.name}: {error}")


def _live(report: Report, kind: Kind, victim: Victim) -> tuple[str, str]:
    """The victim's own start, and a fork() of it. Returns its answers to / and to /all."""
    _, cold_ms = clock(victim.ask)
    report.contend(kind.name, COLD, None, cold_ms, usage.of(victim.pid))
    answer, whole = victim.warm_up(), victim.ask("/all")
    report.add(f"{kind.name}: warm, response", clock(victim.ask)[1], "ms")
    for _ in range(HAND_OUTS):
        time.sleep(IDLE_SECONDS)
        report.add(f"{kind.name}: {OWN}", clock(victim.ask)[1], "ms")
    report.add(f"{kind.name}: resident", usage.of(victim.pid).uss / 1e6, "MB")
    if kind.forks:
        before, began = usage.cpu_ms(victim.pid), time.perf_counter()
        with victim.asking("/fork") as got:
            ms = (time.perf_counter() - began) * 1000
            child = _only_child(victim.pid)
            report.contend(kind.name, FORK, None, ms, usage.of(child), usage.cpu_ms(victim.pid) - before)
        reap(child)  # a process with a child is not snapshotted
        same(got, answer)
    else:
        report.contend_not(kind.name, FORK, "n/a: the child would have one of its threads, and could not answer")
    return answer, whole


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


# -- lazyrestore -------------------------------------------------------------------------------------------------------


def _lazyrestore(report: Report, kind: Kind, victim: Victim, folder: Path, answer: str, whole: str) -> None:
    """Snapshots the victim, which is ended, and restores it in all ways."""
    big = usage.of(victim.pid).uss > BIG
    always = "" if big else whole
    with lazyrestore.Store.open(folder) as store, store.snapshot(victim.pid, name="v", kill=True) as snapshot:
        end(victim.pid)
        report.add(f"{kind.name}: image", snapshot.stored_bytes / 1e6, "MB")

        def contend(name: str, action: Callable[[], RestoredProcess], compared: str = always) -> None:
            _contend(report, kind.name, name, action, snapshot, victim, answer, compared)

        contend(UNRECORDED, snapshot.restore, "")
        snapshot.end_recording()
        with _populated(snapshot._image) as template:  # as a further clone: the program is compiled
            contend(TEMPLATE, lambda: _restored_by(snapshot, template))
        contend(PLAIN_CLONE, lambda: _restored_by(snapshot, _Unhelpful(snapshot._connect())))
        contend(CLONE, snapshot.restore)
        _hand_outs(report, kind.name, snapshot, answer)
        gone = stop_pager(snapshot)
    gone()
    for name, compared in ((RECORDED, always), (COLD_CACHE, whole)):
        if name == COLD_CACHE:
            usage.evict(folder)
        with lazyrestore.Store.open(folder) as store, store.get("v") as snapshot:
            _contend(report, kind.name, name, snapshot.restore, snapshot, victim, answer, compared)
            gone = stop_pager(snapshot)
        gone()


def _contend(
    report: Report,
    victim_name: str,
    name: str,
    action: Callable[[], RestoredProcess],
    snapshot: lazyrestore.Snapshot,
    victim: Victim,
    answer: str,
    whole: str,
) -> None:
    """One restore with its first response; whole: what /all must answer afterwards, empty: it is not asked."""
    pager, ours, began = _pager_cpu_ms(snapshot), time.process_time(), time.perf_counter()
    process = action()
    resumed, ours = time.perf_counter(), time.process_time() - ours
    try:
        got = victim.ask()
        responded = time.perf_counter()
        used, others = usage.of(process.pid), ours * 1000 + _pager_cpu_ms(snapshot) - pager
        same(got, answer)
        if whole:
            same(victim.ask("/all"), whole)
    finally:
        finish(process)
    report.contend(victim_name, name, (resumed - began) * 1000, (responded - began) * 1000, used, others)


def _hand_outs(report: Report, victim_name: str, snapshot: lazyrestore.Snapshot, answer: str) -> None:
    """Parked clones, each asked once and once again, with a pool that refills itself as it does in use: taken in the
    instant in which the pool is full, and IDLE_SECONDS later."""
    with snapshot.pool(2) as pool:
        for number in range(2 * HAND_OUTS):
            pool.wait_until_full()
            idle = number % 2
            if idle:
                time.sleep(IDLE_SECONDS)
            began = time.perf_counter()
            with pool.take() as clone:
                handed = time.perf_counter()
                got = ask_clone(clone)
                responded = time.perf_counter()
                used = usage.of(clone.pid)
                same(got, answer)
                again = clock(lambda clone=clone: ask_clone(clone))[1]
            if idle:
                report.contend(victim_name, POOL, (handed - began) * 1000, (responded - began) * 1000, used)
                report.add(f"{victim_name}, {POOL}: response of the same clone again", again, "ms")
            else:
                report.add(f"{victim_name}, {POOL} as soon as the pool is full", (responded - began) * 1000, "ms")


def _pager_cpu_ms(snapshot: lazyrestore.Snapshot) -> float:
    """CPU time of the snapshot's pager so far; 0 if there is none."""
    stats = snapshot.pager_stats()
    return usage.cpu_ms(snapshot._connect().pids()[0]) if stats else 0.0


def _restored_by(snapshot: lazyrestore.Snapshot, pager: PagerClient) -> RestoredProcess:
    """A restore as the library makes it, with something else in the pager's place."""
    checked = restore.check(snapshot._prepare({}, False))
    return RestoredProcess(snapshot.name, snapshot._image.key, restore.run(checked, lambda: pager, -1))


class _Unhelpful(PagerClient):
    """The snapshot's own pager, which gives the new process nothing ahead."""

    def __init__(self, client: PagerClient) -> None:
        self._client = client

    template_fd = property(lambda self: self._client.template_fd)
    hugetlb_fd = property(lambda self: self._client.hugetlb_fd)

    def attach(self, *arguments: object, **options: object) -> None:  # type: ignore[override]
        self._client.attach(*arguments, **{**options, "replay": False})  # type: ignore[arg-type]


class _Template(PagerClient):
    """In a pager's place: a template with everything in it, and nobody behind it. The kernel does the rest."""

    def __init__(self, image: StoredImage, descriptor: int) -> None:
        self._image, self._descriptor = image, descriptor

    template_fd = property(lambda self: self._descriptor)
    hugetlb_fd = property(lambda self: None)

    def attach(  # type: ignore[override]
        self,
        userfaultfd: int,
        pidfd: int,
        ranges: int,
        shared: dict[int, int],
        *,
        meanwhile: Callable[[], None],
        **options: object,
    ) -> None:
        """Shared memory is each process's own, so it is filled each time."""
        meanwhile()
        packed = os.pread(ranges, os.fstat(ranges).st_size, 0)
        for start, stop, image, backing, _flags in wire.RANGE.iter_unpack(packed):
            if backing >= BACKING_SHARED:
                for at, data in self._image.contents(image, image + stop - start):
                    os.pwrite(shared[backing - BACKING_SHARED], data, at & ((1 << 47) - 1))


@contextmanager
def _populated(image: StoredImage) -> Iterator[_Template]:
    """A template of all private memory, uncompressed, before the clock starts."""
    descriptor = os.memfd_create("bench-template", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, 1 << 47)
        for at, data in image.contents(0, 1 << 47):
            os.pwrite(descriptor, data, at)
        yield _Template(image, descriptor)
    finally:
        os.close(descriptor)


def goals(report: Report, kinds: Sequence[Kind]) -> None:
    """Those of issue 4 that compare contenders."""
    fork_limits = {"numpy, 128 MiB": 1.3, "numpy, 512 MiB": 0.6, "numpy, 2 GiB": 0.2}
    for kind in kinds:
        ratio = report.response_ratio(kind.name, CLONE, FORK)
        if kind.name in fork_limits:
            report.goal(f"{kind.name}: {CLONE} / fork(), first response", ratio, fork_limits[kind.name], "")
        for rival, limit in ((criu.EAGER, 0.1), (criu.LAZY, 0.12), (COLD, 0.02)):
            if rival != COLD or kind.forks:
                ratio = report.response_ratio(kind.name, RECORDED, rival)
                report.goal(f"{kind.name}: {RECORDED} / {rival}, first response", ratio, limit, "")
        image = report.ratio(f"{kind.name}: image", f"{kind.name}: CRIU's image through zstd -3")
        report.goal(f"{kind.name}: image / CRIU's through zstd -3", image, 1, "")
        own = report.median(f"{kind.name}: {OWN}")
        handed = report.response(kind.name, POOL)
        more = None if own is None or handed is None else handed.median - own
        report.goal(f"{kind.name}: {POOL} to response, beyond the worker's own time", more, 1, "ms")
    resumed = report.median(f"{WORKER.name}, {CLONE}: {RESUMED}")
    report.goal(f"{CLONE} to resumed (340 VMAs)", resumed, 2.5, "ms")
