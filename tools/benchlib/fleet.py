"""What many clones cost: memory of fifty, clones per second, one fault, a second snapshot of the same program."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lazyrestore
from benchlib import usage
from benchlib.measure import Report
from benchlib.product import finish
from benchlib.victims import HERE, WORKER, Kind, Unresponsive, Victim, end, running
from lazyrestore.fleet.pool import Clone, Pool

CLONES = 50
MEMORY_ROUNDS = 5
POOL, POOL_SECONDS, POOL_ROUNDS = 4, 5.0, 3
MIB = 1 << 20
BEYOND = f"{CLONES} clones: beyond the pages written, page tables and the pager's part included, of each"
RATE = "pool: clones per second, 2 threads"
FAULT_ROUNDS = 7
FAULT_MEGABYTES = 64


def fleets(report: Report, kinds: Iterable[Kind], folder: Path) -> None:
    """Of each victim: fifty clones that have answered one request each, and how many a pool gives in a second."""
    for number, kind in enumerate(kinds):
        with running(kind, folder / "fleet.sock") as victim:
            answer = victim.warm_up()
            with _recorded(victim, answer, folder / f"fleet-{number}") as snapshot:
                for _ in range(MEMORY_ROUNDS):
                    _fifty(report, kind.name, snapshot, answer)
                for _ in range(POOL_ROUNDS):
                    with snapshot.pool(POOL) as pool:
                        report.add(f"{kind.name}, {RATE}", _sustained(pool, answer), "1/s")


@contextmanager
def _recorded(victim: Victim, answer: str, folder: Path) -> Iterator[lazyrestore.Snapshot]:
    """A snapshot of the victim, which is ended, with the working set of one first response."""
    with (
        lazyrestore.Store.open(folder) as store,
        store.snapshot(victim.pid, name="w", kill=True) as snapshot,
    ):
        end(victim.pid)
        process = snapshot.restore()
        try:
            same(victim.ask(), answer)
            snapshot.end_recording()
        finally:
            finish(process)
        yield snapshot


def _fifty(report: Report, victim: str, snapshot: lazyrestore.Snapshot, answer: str) -> None:
    """Each one's memory, as the kernel tells, and the host's."""
    with snapshot.pool(1) as pool, pool.take() as clone:
        same(ask_clone(clone), answer)  # what the first one brings, it brings for all
    available, pager = _available(), _pager_bytes(snapshot)
    with snapshot.pool(CLONES) as pool:
        pool.wait_until_full()
        taken = [pool.take() for _ in range(CLONES)]
        for clone in taken:
            same(ask_clone(clone), answer)
        each = (_pager_bytes(snapshot) - pager) / CLONES
        name = f"{victim}, {CLONES} clones"
        report.add(f"{name}: host memory, beside what others do meanwhile", (available - _available()) / 1e6, "MB")
        for clone in taken:
            used = usage.of(clone.pid)
            report.add(f"{name}: USS of each", used.uss / 1e6, "MB")
            report.add(f"{name}: PSS of each", used.pss / 1e6, "MB")
            report.add(f"{name}: pages written by each", used.anonymous / 1e6, "MB")
            report.add(f"{name}: page tables of each", used.tables / 1e6, "MB")
            report.add(f"{victim}, {BEYOND}", (used.uss - used.anonymous + used.tables + each) / MIB, "MiB")


def goals(report: Report, kinds: Iterable[Kind]) -> None:
    """Those of issue 4."""
    for kind in kinds:
        more = report.median(f"{kind.name}, {BEYOND}")
        report.goal(f"{kind.name}: memory per further clone beyond the pages it wrote", more, 1, "MiB")
        if kind is WORKER:
            report.goal(f"{kind.name}, {RATE}", report.median(f"{kind.name}, {RATE}"), 250, "1/s", floor=True)


def _pager_bytes(snapshot: lazyrestore.Snapshot) -> int:
    """The pager's own memory."""
    used = usage.of(snapshot._connect().pids()[0])
    return used.uss + used.tables


def _sustained(parked: Pool, answer: str) -> float:
    """Clones per second, one request each."""
    counts = [0, 0]
    failed: list[BaseException] = []
    until = time.monotonic() + POOL_SECONDS

    def work(thread: int) -> None:
        try:
            while time.monotonic() < until:
                with parked.take() as clone:
                    same(ask_clone(clone), answer)
                counts[thread] += 1
        except BaseException as error:
            failed.append(error)

    began = time.monotonic()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return sum(counts) / (time.monotonic() - began)


def ask_clone(clone: Clone) -> str:
    """What a pool's clone answers to GET /."""
    with clone.connect(timeout=60) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer.rpartition(b"\r\n\r\n")[2].decode()


def same(got: str, answer: str) -> None:
    """Raises Unresponsive if they differ."""
    if got != answer:
        raise Unresponsive("a copy answers wrongly")


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
                    finish(process)
        finally:
            end(victim.pid)
        report.add("fault, bare userfaultfd: round trip", bare, "us")
        report.add("fault: decompression of the chunk alone", alone, "us")
        report.add("fault, chunk not filled: as the thread sees it", served, "us")
        report.add("fault, chunk not filled / (bare round trip + decompression)", served / (bare + alone), "")


def second_snapshot(report: Report, folder: Path) -> None:
    """Another snapshot of the worker after some more requests: what it adds to the store."""
    with (
        running(WORKER, folder / "second.sock") as victim,
        lazyrestore.Store.open(folder / "second") as store,
    ):
        victim.warm_up()
        store.snapshot(victim.pid, name="first").close()
        first = store._images.totals().stored_bytes
        victim.warm_up()
        store.snapshot(victim.pid, name="second").close()
        report.add("second snapshot: added / first", store._images.totals().stored_bytes / first - 1, "")


def _available() -> int:
    """What the host has left, bytes; the page cache, which everybody fills, counts as left."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise Unresponsive("/proc/meminfo without MemAvailable")
