"""Clones against fork(): first response at several sizes, memory per clone, clones per second, the pool's hand-out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lazyrestore
from benchlib.measure import Report, clock
from benchlib.product import _finish
from benchlib.victims import Unresponsive, Victim, end, running

SIZES = (70, 450, 1900)  # MiB of data set; with the interpreter and numpy about 128, 512 and 2,048
ROUNDS = 20
POOL = 4
POOL_SECONDS = 5.0


def fork_and_clone(report: Report, folder: Path) -> None:
    """fork() of the live process, then clones with their working set. Raises Unresponsive, LazyrestoreError."""
    for megabytes in SIZES:
        with running("worker.py", folder / f"clone-{megabytes}.sock", str(megabytes)) as victim:
            answer = victim.warm_up()
            for _ in range(ROUNDS):
                report.add(f"{megabytes} MiB: fork() to response", clock(lambda: victim.ask("/fork"))[1], "ms")
            with _recorded(victim, answer, folder / f"clones-{megabytes}") as snapshot:
                for _ in range(ROUNDS):
                    _clone(report, f"{megabytes} MiB, clone", snapshot, victim, answer)


def pool(report: Report, folder: Path) -> None:
    """Hand-out to response of parked clones, and clones per second, each used for one request by two threads."""
    with running("worker.py", folder / "pool.sock", str(SIZES[0])) as victim:
        answer = victim.warm_up()
        with _recorded(victim, answer, folder / "pool") as snapshot, snapshot.pool(POOL) as parked:
            for _ in range(ROUNDS):
                parked.wait_until_full()
                clone, handed = clock(parked.take)
                with clone:
                    report.add("pool: hand-out", handed, "ms")
                    got, response = clock(lambda clone=clone: _ask(clone))
                    _same(got, answer)
                    report.add("pool: hand-out to response", handed + response, "ms")
                    report.add(
                        "pool: response of the same clone again", clock(lambda clone=clone: _ask(clone))[1], "ms"
                    )
            report.add("pool: clones per second, 2 threads", _sustained(parked, answer), "1/s")


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
            _same(victim.ask(), answer)
            snapshot.end_recording()
        finally:
            _finish(process)
        yield snapshot


def _clone(report: Report, name: str, snapshot: lazyrestore.Snapshot, victim: Victim, answer: str) -> None:
    process, resumed = clock(snapshot.restore)
    try:
        got, response = clock(victim.ask)
        _same(got, answer)
        report.add(f"{name}: resumed", resumed, "ms")
        report.add(f"{name}: to response", resumed + response, "ms")
        report.add(f"{name}: anonymous memory and page tables", _own_bytes(process.pid) / 1e6, "MB")
    finally:
        _finish(process)


def _sustained(parked: lazyrestore.fleet.pool.Pool, answer: str) -> float:
    """Clones per second, one request each."""
    counts = [0, 0]
    failed: list[BaseException] = []
    until = time.monotonic() + POOL_SECONDS

    def work(thread: int) -> None:
        try:
            while time.monotonic() < until:
                with parked.take() as clone:
                    _same(_ask(clone), answer)
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


def _ask(clone: lazyrestore.fleet.pool.Clone) -> str:
    with clone.connect(timeout=60) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer.rpartition(b"\r\n\r\n")[2].decode()


def _same(got: str, answer: str) -> None:
    if got != answer:
        raise Unresponsive("a clone answers wrongly")


def _own_bytes(pid: int) -> int:
    """Bytes of anonymous memory and page tables, from /proc/PID/status; what it maps of the template is everybody's."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmPTE"))
