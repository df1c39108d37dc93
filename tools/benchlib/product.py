"""lazyrestore itself: snapshot, first and further restores, size independence, zeros, the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import lazyrestore
from benchlib import rawcopy
from benchlib.measure import Report, clock
from benchlib.victims import Unresponsive, Victim, end, running

COMMAND = Path(sys.executable).parent / "lazyrestore"
CLI_ROUNDS = 10
SMALL, BIG = 128, 4096  # MiB
ZEROS = 2048  # MiB


def worker(report: Report, victim: Victim, folder: Path, tmpfs: Path, answer: str, whole: str) -> None:
    """Snapshot a warmed-up worker beside zstd on the same bytes, then restore it twice. The victim is ended.

    Raises Unresponsive, LazyrestoreError.
    """
    raw, packed = tmpfs / "raw", folder / "raw.zst"
    copied = rawcopy.copy(victim.pid, raw)
    zstd_s = rawcopy.zstd_seconds(raw, packed)
    report.add("zstd -1 -T0 on the same bytes", copied / zstd_s / 1e6, "MB/s")
    report.add("zstd -1 -T0: stored", packed.stat().st_size / 1e6, "MB")
    raw.unlink()
    packed.unlink()

    rss = _resident(victim.pid)
    report.add("worker: VMAs", len(Path(f"/proc/{victim.pid}/maps").read_text().splitlines()), "")
    report.add("worker: resident", rss / 1e6, "MB")
    store = lazyrestore.Store.open(folder / "store")
    snapshot, wall = clock(lambda: store.snapshot(victim.pid, name="worker", kill=True))
    end(victim.pid)
    report.add("snapshot: call", wall, "ms")
    report.add("snapshot: paused", snapshot.pause_ms, "ms")
    report.add("snapshot: raw", snapshot.raw_bytes / 1e6, "MB")
    report.add("snapshot: stored", snapshot.stored_bytes / 1e6, "MB")
    report.add("snapshot: throughput", snapshot.raw_bytes / snapshot.seconds / 1e6, "MB/s")
    report.add("snapshot: throughput / zstd's", (snapshot.raw_bytes / snapshot.seconds) / (copied / zstd_s), "")

    for name in ("1st restore", "2nd restore"):
        _restore(report, name, store, victim, answer, whole, rss)


def size(report: Report, folder: Path) -> None:
    """Restore the same process with little and with much memory, one after the other, once each. Raises as `worker`."""
    for megabytes in (SMALL, BIG):
        path = folder / "hoard.sock"
        with running("hoard.py", path, str(megabytes), "filled") as victim:
            answer = victim.ask()
            store = lazyrestore.Store.open(folder / f"store-{megabytes}")
            snapshot = store.snapshot(victim.pid, name="hoard", kill=True)
            end(victim.pid)
            report.add(f"{megabytes} MiB: snapshot", snapshot.seconds, "s")
            report.add(f"{megabytes} MiB: paused", snapshot.pause_ms, "ms")
            report.add(f"{megabytes} MiB: snapshot throughput", snapshot.raw_bytes / snapshot.seconds / 1e6, "MB/s")
            for name in ("1st", "2nd", "3rd"):
                process, wall = clock(snapshot.restore)
                first, response = clock(victim.ask)
                _finish(process)
                if first != answer:
                    raise Unresponsive(f"{megabytes} MiB, {name} restore: the copy answers wrongly")
                kind = "1st restore" if name == "1st" else "further restores"
                report.add(f"{megabytes} MiB, {kind}: resumed", wall, "ms")
                report.add(f"{megabytes} MiB, {kind}: first response", wall + response, "ms")


def zeros(report: Report, folder: Path) -> None:
    """Snapshot a process with much memory that is zero or was never touched. Raises as `worker`."""
    for megabytes, mode in ((1, "zero"), (ZEROS, "zero")):
        with running("hoard.py", folder / "zeros.sock", str(megabytes), mode) as victim:
            answer = victim.ask()
            store = lazyrestore.Store.open(folder / f"zeros-{megabytes}")
            snapshot = store.snapshot(victim.pid, name="zeros", kill=True)
            end(victim.pid)
            report.add(f"zeros, {megabytes} MiB: stored", snapshot.stored_bytes / 1e6, "MB")
            report.add(f"zeros, {megabytes} MiB: snapshot", snapshot.seconds, "s")
            report.add(f"zeros, {megabytes} MiB: paused", snapshot.pause_ms, "ms")
            process = snapshot.restore()
            try:
                if victim.ask() != answer:
                    raise Unresponsive("zeros: the copy answers wrongly")
            finally:
                _finish(process)


def command_line(report: Report, folder: Path) -> None:
    """Start-up of the command line, interleaved with the bare interpreter's. Raises CalledProcessError."""
    base = [str(COMMAND), "--store", str(folder / "cli")]
    with running("worker.py", folder / "cli.sock", "1") as victim:
        answer = victim.warm_up()
        _run([*base, "snapshot", str(victim.pid), "--name", "worker", "--kill"])
        end(victim.pid)
        for _ in range(CLI_ROUNDS):
            report.add("python -c pass", clock(lambda: _run([sys.executable, "-c", "pass"]))[1], "ms")
            report.add("lazyrestore --help", clock(lambda: _run([str(COMMAND), "--help"]))[1], "ms")
            report.add("lazyrestore ls", clock(lambda: _run([*base, "ls"]))[1], "ms")
            output, ms = clock(lambda: _run([*base, "restore", "worker", "--detach", "--json"]))
            pid = int(json.loads(output)["pid"])
            try:
                if victim.ask() != answer:
                    raise Unresponsive("restore --detach: the copy answers wrongly")
            finally:
                end(pid)
            report.add("lazyrestore restore --detach", ms, "ms")


def _restore(
    report: Report, name: str, store: lazyrestore.Store, victim: Victim, answer: str, whole: str, rss: int
) -> None:
    """One restore of the snapshot `worker`, with its first response, and the whole data set compared afterwards."""
    snapshot = store.get("worker")
    started = time.perf_counter()
    process = snapshot.restore()
    resumed = time.perf_counter()
    try:
        first = victim.ask()
        responded = time.perf_counter()
        resident = _resident(process.pid)
        stats = process.stats()
        if first != answer or victim.ask("/all") != whole:
            raise Unresponsive(f"{name}: the copy answers wrongly")
    finally:
        _finish(process)
    report.add(f"{name}: resumed", (resumed - started) * 1000, "ms")
    report.add(f"{name}: resumed, by its own account", process.restore_ms, "ms")
    for phase, ms in getattr(process, "phases", {}).items():
        report.add(f"{name}: phase {phase}", ms, "ms")
    report.add(f"{name}: first response", (responded - started) * 1000, "ms")
    report.add(f"{name}: resident after it / before the snapshot", resident / rss, "")
    _lazy(report, name, stats)


def _lazy(report: Report, name: str, stats: object) -> None:
    """What the pager did until the first response."""
    report.add(f"{name}: stats", len(str(stats)), "characters")


def _finish(process: lazyrestore.RestoredProcess) -> None:
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
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
