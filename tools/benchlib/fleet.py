"""What many clones cost: memory of fifty, one fault, a second snapshot of the same program."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import lazyrestore
from benchlib.clones import SIZES, _ask, _recorded, _same
from benchlib.measure import Report
from benchlib.product import _finish
from benchlib.victims import HERE, Unresponsive, end, running

CLONES = 50
MEMORY_ROUNDS = 5
MIB = 1 << 20
BEYOND = f"{CLONES} clones: beyond the pages written, page tables and the pager's part included, of each"
FAULT_ROUNDS = 7
FAULT_MEGABYTES = 64


def memory(report: Report, folder: Path) -> None:
    """Fifty clones that have answered one request each: each one's memory, as the kernel tells, and the host's."""
    with running("worker.py", folder / "fleet.sock", str(SIZES[0])) as victim:
        answer = victim.warm_up()
        with _recorded(victim, answer, folder / "fleet") as snapshot:
            for _ in range(MEMORY_ROUNDS):
                _fifty(report, snapshot, answer)


def _fifty(report: Report, snapshot: lazyrestore.Snapshot, answer: str) -> None:
    with snapshot.pool(1) as pool, pool.take() as clone:
        _same(_ask(clone), answer)  # what the first one brings, it brings for all
    available, pager = _available(), _pager_bytes(snapshot)
    with snapshot.pool(CLONES) as pool:
        pool.wait_until_full()
        taken = [pool.take() for _ in range(CLONES)]
        for clone in taken:
            _same(_ask(clone), answer)
        each = (_pager_bytes(snapshot) - pager) / CLONES
        report.add(
            f"{CLONES} clones: host memory, beside what others do meanwhile", (available - _available()) / 1e6, "MB"
        )
        for clone in taken:
            uss, pss, anonymous, tables = _memory_of(clone.pid)
            report.add(f"{CLONES} clones: USS of each", uss / 1e6, "MB")
            report.add(f"{CLONES} clones: PSS of each", pss / 1e6, "MB")
            report.add(f"{CLONES} clones: pages written by each", anonymous / 1e6, "MB")
            report.add(f"{CLONES} clones: page tables of each", tables / 1e6, "MB")
            report.add(BEYOND, (uss - anonymous + tables + each) / MIB, "MiB")


def _pager_bytes(snapshot: lazyrestore.Snapshot) -> int:
    """The pager's own memory."""
    uss, _, _, tables = _memory_of(snapshot._connect().pids()[0])
    return uss + tables


def faults(report: Report, folder: Path) -> None:
    """A fault on a chunk that nobody has touched yet, beside userfaultfd alone and the chunk's decompression alone."""
    program = folder / "fault"
    native = HERE.parents[1] / "lazyrestore" / "_native"
    command = ["cc", "-O2", "-std=gnu11", "-iquote", str(native), str(HERE / "fault.c"), "-o", str(program), "-lzstd"]
    subprocess.run([*command, "-pthread"], check=True)
    told = folder / "fault.told"
    for number in range(FAULT_ROUNDS):
        done = subprocess.run([program, "bare", str(FAULT_MEGABYTES)], stdout=subprocess.PIPE, text=True, check=True)
        bare, alone = (int(word) / 1000 for word in done.stdout.split())
        victim = subprocess.Popen(
            [program, "restored", str(FAULT_MEGABYTES), str(told)], stdout=subprocess.PIPE, start_new_session=True
        )
        assert victim.stdout
        with victim.stdout:
            victim.stdout.readline()
        victim.returncode = 0
        try:
            with (
                lazyrestore.Store.open(folder / f"fault-{number}") as store,
                store.snapshot(victim.pid, name="f", kill=True) as snapshot,
            ):
                end(victim.pid)
                process = snapshot.restore(record=False)
                try:
                    process.send_signal(signal.SIGUSR1)
                    process.wait()
                    served = int(told.read_text()) / 1000
                finally:
                    _finish(process)
        finally:
            end(victim.pid)
        report.add("fault, bare userfaultfd: round trip", bare, "us")
        report.add("fault: decompression of the chunk alone", alone, "us")
        report.add("fault, chunk not filled: as the thread sees it", served, "us")
        report.add("fault, chunk not filled / (bare round trip + decompression)", served / (bare + alone), "")


def second_snapshot(report: Report, folder: Path) -> None:
    """Another snapshot of the worker after some more requests: what it adds to the store."""
    with (
        running("worker.py", folder / "second.sock", str(SIZES[0])) as victim,
        lazyrestore.Store.open(folder / "second") as store,
    ):
        victim.warm_up()
        store.snapshot(victim.pid, name="first").close()
        first = store._images.totals().stored_bytes
        victim.warm_up()
        store.snapshot(victim.pid, name="second").close()
        report.add("second snapshot: added / first", store._images.totals().stored_bytes / first - 1, "")


def _memory_of(pid: int) -> tuple[int, int, int, int]:
    """USS, PSS, anonymous memory and page tables of a process, bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    lines += Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {
        name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    return found["Private_Clean"] + found["Private_Dirty"], found["Pss"], found["Anonymous"], found["VmPTE"]


def _available() -> int:
    """What the host has left, bytes; the page cache, which everybody fills, counts as left."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise Unresponsive("/proc/meminfo without MemAvailable")
