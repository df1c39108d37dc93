"""lazyrestore itself: snapshot, first and further restores, size independence, zeros, the command line."""

from __future__ import annotations

import compileall
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import lazyrestore
import lazyrestore.restore
import lazyrestore.snapshot
from benchlib import rawcopy
from benchlib.measure import Report, clock
from benchlib.victims import Unresponsive, Victim, end, hoard, running, worker
from lazyrestore.pager.launch import connect_existing

COMMAND = Path(sys.executable).parent / "lazyrestore"
CLI_ROUNDS = 10
SMALL, BIG = 128, 4096  # MiB
SIZE_ROUNDS = 7
ZEROS = 2048  # MiB


def restores(report: Report, victim: Victim, folder: Path, tmpfs: Path, answer: str, whole: str) -> None:
    """Snapshot a warmed-up worker beside zstd on the same bytes, then restore it twice. The victim is ended.

    Raises Unresponsive, LazyrestoreError.
    """
    nothing = victim.ask("/empty")
    raw, packed = tmpfs / "raw", folder / "raw.zst"
    copied = rawcopy.copy(victim.pid, raw)
    zstd_s, zstd_cpu = rawcopy.zstd_seconds(raw, packed)
    report.add("zstd -1 -T0: CPU", zstd_cpu * 1000, "ms")
    for step, cpu in rawcopy.cpu_by_step(raw).items():
        report.add(f"{step} the same bytes in chunks, one thread: CPU", cpu * 1000, "ms")
    report.add("zstd -1 -T0 on the same bytes", copied / zstd_s / 1e6, "MB/s")
    report.add("zstd -1 -T0: stored", packed.stat().st_size / 1e6, "MB")
    raw.unlink()
    packed.unlink()

    rss = _resident(victim.pid)
    report.add("worker: VMAs", len(Path(f"/proc/{victim.pid}/maps").read_text().splitlines()), "")
    report.add("worker: resident", rss / 1e6, "MB")
    with lazyrestore.Store.open(folder / "live") as store:
        live = store.snapshot(victim.pid, name="worker")
        if victim.ask() != answer:
            raise Unresponsive("the original answers wrongly after its snapshot")
        report.add("snapshot, worker goes on: paused", live.pause_ms, "ms")
        report.add("snapshot, worker goes on: all", live.seconds * 1000, "ms")

    with lazyrestore.Store.open(folder / "store") as store:
        cpu = time.process_time()
        taken, wall = clock(lambda: store.snapshot(victim.pid, name="worker", kill=True))
        cpu = time.process_time() - cpu
        end(victim.pid)
        report.add("snapshot: call", wall, "ms")
        report.add("snapshot: CPU", cpu * 1000, "ms")
        report.add("snapshot: raw", taken.raw_bytes / 1e6, "MB")
        report.add("snapshot: stored", taken.stored_bytes / 1e6, "MB")
        report.add("snapshot: throughput", taken.raw_bytes / taken.seconds / 1e6, "MB/s")
        report.add("snapshot: throughput / zstd's", (taken.raw_bytes / taken.seconds) / (copied / zstd_s), "")
        taken.close()

        first, opened = clock(lambda: store.get("worker"))
        report.add("store.get()", opened, "ms")
        with first:
            _restore(report, "1st restore", first, victim, answer, whole, rss)
            _restore(report, "2nd restore", first, victim, answer, whole, rss)
            _restore(report, "3rd restore", first, victim, answer, whole, rss)
            with store.get("worker") as other:
                _restore(report, "restore by another caller", other, victim, answer, whole, rss)
            gone = stop_pager(first)
        gone()
        with store.get("worker") as again:
            report.add("working set", again.working_set_bytes / 1e6, "MB")
            _restore(report, "1st restore, recorded", again, victim, answer, whole, rss)
            gone = stop_pager(again)
        gone()
        with store.get("worker") as again:
            _resume(report, "1st restore, recorded, empty request", again, victim, "/empty", nothing)


def size(report: Report, folder: Path) -> None:
    """Restore the same process with little and with much memory, in turn. Raises as `restores`."""
    answers: dict[int, tuple[Victim, str]] = {}
    with ExitStack() as stack:
        for megabytes in (SMALL, BIG):
            path = folder / f"hoard-{megabytes}.sock"
            victim = stack.enter_context(running(hoard(megabytes, "filled"), path))
            answers[megabytes] = victim, victim.ask()
            with (
                lazyrestore.Store.open(folder / f"store-{megabytes}") as store,
                store.snapshot(victim.pid, name="hoard", kill=True) as taken,
            ):
                end(victim.pid)
                report.add(f"{megabytes} MiB: VMAs", len(taken.manifest.vmas), "")
                report.add(f"{megabytes} MiB: raw", taken.raw_bytes / 1e6, "MB")
                report.add(f"{megabytes} MiB: stored", taken.stored_bytes / 1e6, "MB")
                report.add(f"{megabytes} MiB: snapshot", taken.seconds, "s")
                report.add(f"{megabytes} MiB: snapshot throughput", taken.raw_bytes / taken.seconds / 1e6, "MB/s")
        for _ in range(SIZE_ROUNDS):
            for megabytes, (victim, answer) in answers.items():
                with (
                    lazyrestore.Store.open(folder / f"store-{megabytes}") as store,
                    store.get("hoard") as snapshot,
                ):
                    for kind in ("1st restore", "2nd restore"):
                        _resume(report, f"{megabytes} MiB, {kind}", snapshot, victim, "/", answer)
                    gone = stop_pager(snapshot)
                gone()


def zeros(report: Report, folder: Path) -> None:
    """Snapshot a process with much memory that is zero or was never touched. Raises as `restores`."""
    for name, megabytes, mode in (
        ("nothing", 1, "untouched"),
        ("untouched", ZEROS, "untouched"),
        ("zeros", ZEROS, "zeros"),
    ):
        with running(hoard(megabytes, mode), folder / "zeros.sock") as victim:
            answer = victim.ask()
            store = lazyrestore.Store.open(folder / f"store-{name}")
            snapshot = store.snapshot(victim.pid, name="zeros", kill=True)
            end(victim.pid)
            report.add(f"{name}, {megabytes} MiB: stored", snapshot.stored_bytes / 1e6, "MB")
            report.add(f"{name}, {megabytes} MiB: snapshot", snapshot.seconds, "s")
            report.add(f"{name}, {megabytes} MiB: paused", snapshot.pause_ms, "ms")
            process = snapshot.restore()
            try:
                if victim.ask() != answer:
                    raise Unresponsive("zeros: the copy answers wrongly")
            finally:
                finish(process)
            snapshot.close()
            store.close()


def command_line(report: Report, folder: Path) -> None:
    """Start-up of the command line, interleaved with the bare interpreter's. Raises RuntimeError, Unresponsive.

    The own start-up of `restore` is all of the command but the library's restore call, which has goals of its own. The
    package's bytecode is there, as pip leaves it, also where PYTHONDONTWRITEBYTECODE is set.
    """
    compileall.compile_dir(Path(lazyrestore.__file__).parent, quiet=1)
    base = [str(COMMAND), "--store", str(folder / "cli")]
    with running(worker(1), folder / "cli.sock") as victim:
        answer = victim.warm_up()
        _run([*base, "snapshot", str(victim.pid), "--name", "worker", "--kill"])
        end(victim.pid)
        for _ in range(CLI_ROUNDS):
            report.add("python -c pass", clock(lambda: _run([sys.executable, "-c", "pass"]))[1], "ms")
            report.add("lazyrestore --help", clock(lambda: _run([str(COMMAND), "--help"]))[1], "ms")
            report.add("lazyrestore ls", clock(lambda: _run([*base, "ls"]))[1], "ms")
            output, ms = clock(lambda: _run([*base, "restore", "worker", "--detach", "--json"]))
            told = json.loads(output)
            pid = int(told["pid"])
            try:
                if victim.ask() != answer:
                    raise Unresponsive("restore --detach: the copy answers wrongly")
            finally:
                end(pid)
            report.add("lazyrestore restore --detach", ms, "ms")
            report.add("lazyrestore restore --detach: own start-up", ms - told["restore_ms"], "ms")


def _restore(
    report: Report, name: str, snapshot: lazyrestore.Snapshot, victim: Victim, answer: str, whole: str, rss: int
) -> None:
    """One restore with its first response; the whole data set is compared afterwards."""
    before = snapshot.pager_stats()
    started = time.perf_counter()
    process = snapshot.restore()
    resumed = time.perf_counter()
    try:
        first = victim.ask()
        responded = time.perf_counter()
        resident = _resident(process.pid)
        after = process.stats()
        if before is None:
            snapshot.end_recording()
        if first != answer or victim.ask("/all") != whole:
            raise Unresponsive(f"{name}: the copy answers wrongly")
    finally:
        finish(process)
    report.add(f"{name}: resumed", (resumed - started) * 1000, "ms")
    report.add(f"{name}: resumed, by its own account", process.restore_ms, "ms")
    for phase, ms in process.phases.items():
        report.add(f"{name}: phase {phase}", ms, "ms")
    report.add(f"{name}: first response", (responded - started) * 1000, "ms")
    report.add(f"{name}: resident at first response / before", resident / rss, "")
    report.add(f"{name}: faults until first response", after.faults - (before.faults if before else 0), "")
    if before is None:
        report.add(f"{name}: decompressed until first response", after.bytes_filled / snapshot.raw_bytes, "of raw")
        report.add(f"{name}: fault service, median", after.service.p50_ns / 1000, "us")
        report.add(f"{name}: fault service, p99", after.service.p99_ns / 1000, "us")
        report.add(f"{name}: fault service, longest", after.service.max_ns / 1000, "us")


def _resume(report: Report, name: str, snapshot: lazyrestore.Snapshot, victim: Victim, what: str, answer: str) -> None:
    """One restore with its first response."""
    process, wall = clock(snapshot.restore)
    try:
        first, response = clock(lambda: victim.ask(what))
    finally:
        finish(process)
    if first != answer:
        raise Unresponsive(f"{name}: the copy answers wrongly")
    report.add(f"{name}: resumed", wall, "ms")
    report.add(f"{name}: first response", wall + response, "ms")


def stop_pager(snapshot: lazyrestore.Snapshot) -> Callable[[], None]:
    """Ask the snapshot's pager to exit; the result waits for that and is called when the snapshot is closed."""
    client = connect_existing(snapshot._image.key, snapshot.name)
    if client is None:
        return lambda: None
    with client:
        pidfd = os.pidfd_open(client.pids()[0])
        client.stop()

    def wait() -> None:
        select.select([pidfd], [], [])
        os.close(pidfd)

    return wait


def finish(process: lazyrestore.RestoredProcess) -> None:
    process.kill()
    process.wait()
    end(process.pid)


def _resident(pid: int) -> int:
    """A process's resident bytes of any kind, from /proc/PID/smaps_rollup."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise Unresponsive(f"process {pid} has no memory")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}: {reason}")
    return done.stdout
