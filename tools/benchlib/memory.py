"""What a restored process pays for its memory once it runs: calls that raise an event, everything touched, allocators.

Each contender is asked in turn, in every round: other work on the machine comes and goes, so what counts is the ratio
within a round.
"""

from __future__ import annotations

import os
import random
import select
import socket
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import lazyrestore
from benchlib.measure import Report, clock
from benchlib.product import finish
from benchlib.victims import HERE, PATIENCE, Unresponsive, end

VICTIMS = HERE.parents[1] / "tests" / "victims"
JEMALLOC = Path("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2")

KINDS = ("munmap", "MADV_DONTNEED", "mremap", "fork")
ROUNDS = 12
CALLS, CALLS_APART, FORKS = 300, 60, 4  # of one round
APART = 500  # microseconds
STORM = 100_000

ARRAY = 256  # MiB
STEADY_ROUNDS = 20
ALLOCATOR_ROUNDS = 15
ALLOCATOR_STEPS = 1500
JVM_ROUNDS = 12
JVM_GARBAGE = 128  # MB per request

At = TypeVar("At", Path, int)


def memory(report: Report, folder: Path) -> None:
    """All of it. Raises Unresponsive, LazyrestoreError, OSError, CalledProcessError."""
    _events(report, folder)
    _steady(report, folder)
    if JEMALLOC.exists():
        _jemalloc(report, folder)
    else:
        report.notes.append(f"no {JEMALLOC}: tools/setup --test")
    _jvm(report, folder)


def goals(report: Report) -> None:
    """Those of issue 3, "Cost"."""
    for when in ("at the start", f"after {STORM} calls"):
        for kind in KINDS:
            ratio = report.median(f"{kind}, {when}: restored / bare thread")
            report.goal(f"{kind}, {when}: restored / bare round trip", ratio, 1.5, "")
    for work in ("sum", "chase", "update"):
        slower = report.median(f"everything written, {work}: restored / never snapshotted")
        report.goal(f"everything written, {work}: restored / never snapshotted", slower, 1.03, "")


# -- events ------------------------------------------------------------------------------------------------------------


def _events(report: Report, folder: Path) -> None:
    program = _compiled(folder, HERE / "events.c")
    with ExitStack() as stack:
        paths = {
            name: stack.enter_context(_program([program], folder / f"{number}.sock", [mode]))[1]
            for number, (name, mode) in enumerate(
                {"never snapshotted": "plain", "bare thread": "thread", "bare process": "process"}.items()
            )
        }
        paths["restored"], copy = stack.enter_context(_restored([program], folder / "r.sock", ["plain"], folder / "e"))
        _round_trips(report, paths, "at the start")
        for name, path in paths.items():
            failed, ms = clock(lambda path=path: _ask(path, f"storm 4711 {STORM}"))
            report.add(f"{STORM} calls: {name}", ms / 1000, "s")
            if failed.strip() != "failed 0":
                raise Unresponsive(f"{name}: {failed.strip()} of {STORM} calls")
        report.add("intervals in the pager's map then", copy.stats().spaces[0].intervals, "")
        _round_trips(report, paths, f"after {STORM} calls")


def _round_trips(report: Report, paths: Mapping[str, Path], when: str) -> None:
    """One value per round, kind and contender: the median of the round's calls."""
    for number in range(ROUNDS):
        for pause, what in ((0, when), (APART, f"{when}, {APART} us apart")):
            medians: dict[tuple[str, str], float] = {}
            seed = random.getrandbits(40) | 1
            for name in _in_turn(list(paths), number):
                calls = CALLS_APART if pause else CALLS
                answer = _ask(paths[name], f"sample {seed} {calls} {pause}")
                if not pause:
                    answer += _ask(paths[name], f"forks {seed} {FORKS} {pause}")
                times: dict[str, list[int]] = {}
                for line in answer.splitlines():
                    kind, value = line.split()
                    times.setdefault(kind, []).append(int(value))
                for kind in KINDS:
                    if kind in times:
                        medians[kind, name] = statistics.median(times[kind]) / 1000
                        report.add(f"{kind}, {what}: {name}", medians[kind, name], "us")
            for kind in KINDS:
                for rival in ("bare thread", "bare process"):
                    if (kind, rival) in medians:
                        ratio = medians[kind, "restored"] / medians[kind, rival]
                        report.add(f"{kind}, {what}: restored / {rival}", ratio, "")


# -- everything touched ------------------------------------------------------------------------------------------------


def _steady(report: Report, folder: Path) -> None:
    """CPU time of the same work in both; first with everything read, where a copy maps the template's pages, then with
    everything written, where it has its own."""
    program = _compiled(folder, HERE / "steady.c")
    with ExitStack() as stack:
        paths = {}
        for pages in ("small", "huge"):
            arguments = [str(ARRAY), pages]
            twin = stack.enter_context(_program([program], folder / f"{pages}.sock", arguments))[1]
            copy = stack.enter_context(
                _restored([program], folder / f"{pages}-r.sock", arguments, folder / f"steady-{pages}")
            )[0]
            paths[pages] = twin, copy
        for state, works in (("read", ("sum", "chase")), ("written", ("sum", "chase", "update"))):
            for pair in paths.values():
                for path in pair:
                    _ask(path, "sum" if state == "read" else "fill 5")
            for number in range(STEADY_ROUNDS):
                for pages, pair in paths.items():
                    what = f"everything {state}" + (", MADV_HUGEPAGE" if pages == "huge" else "")
                    for work in works:
                        _compare(report, f"{what}, {work}", pair, f"{work} {number}", number)


def _compare(report: Report, what: str, pair: Sequence[Path], request: str, number: int) -> None:
    names = ("never snapshotted", "restored")
    took: dict[str, float] = {}
    results = set()
    for name in _in_turn(names, number):
        ns, result = _ask(pair[names.index(name)], request).split()
        results.add(result)
        took[name] = int(ns) / 1e6
        report.add(f"{what}: {name}", took[name], "ms of CPU")
    if len(results) != 1:
        raise Unresponsive(f"{what}: the copy computes something else")
    report.add(f"{what}: restored / never snapshotted", took["restored"] / took["never snapshotted"], "")


# -- allocators --------------------------------------------------------------------------------------------------------


def _jemalloc(report: Report, folder: Path) -> None:
    """jemalloc that returns what is free at once: MADV_DONTNEED again and again."""
    program = _compiled(folder, VICTIMS / "allocator.c")
    environment = {"LD_PRELOAD": str(JEMALLOC), "MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0"}
    with ExitStack() as stack:
        twin = stack.enter_context(_program([program], folder / "je.sock", [], environment))[1]
        _ask(twin, f"work 1 {ALLOCATOR_STEPS}")
        path, copy = stack.enter_context(
            _restored([program], folder / "je-r.sock", [], folder / "je", environment, f"work 1 {ALLOCATOR_STEPS}")
        )
        for number in range(ALLOCATOR_ROUNDS):
            before = _counts(copy)
            request = f"work {number + 2} {ALLOCATOR_STEPS}"
            _clocked(report, "jemalloc, dirty_decay_ms:0", lambda at, r=request: _ask(at, r), (twin, path), number)
            _counted(report, "jemalloc, dirty_decay_ms:0", before, _counts(copy))


def _jvm(report: Report, folder: Path) -> None:
    """Requests that make garbage and collect it."""
    classes = folder / "classes"
    subprocess.run(["javac", "-d", classes, VICTIMS / "Server.java"], check=True)
    for collector in ("-XX:+UseSerialGC", "-XX:+UseG1GC"):
        name = collector.removeprefix("-XX:+Use")
        command = ["java", collector, "-Xmx256m", "-cp", str(classes), "Server"]
        with ExitStack() as stack:
            ports, copy = [], None
            for number in range(2):
                file = folder / f"{name}-{number}.port"
                pid = stack.enter_context(_program(command, file, []))[0]
                ports.append(int(file.read_text()))
                for _ in range(3):
                    _get(ports[-1], f"/garbage?n={JVM_GARBAGE}")
                if number:
                    copy = stack.enter_context(_replaced(pid, folder / f"jvm-{name}"))
            assert copy
            for number in range(JVM_ROUNDS):
                before = _counts(copy)
                _clocked(report, f"JVM, {name}", lambda port: _get(port, f"/garbage?n={JVM_GARBAGE}"), ports, number)
                _counted(report, f"JVM, {name}", before, _counts(copy))


def _counts(copy: lazyrestore.RestoredProcess) -> tuple[int, int]:
    """Events and faults so far."""
    counters = copy.stats().counters
    return counters.removes + counters.unmaps + counters.remaps, counters.missing + counters.minor


def _counted(report: Report, what: str, before: tuple[int, int], now: tuple[int, int]) -> None:
    for name, first, last in zip(("events", "faults"), before, now, strict=True):
        report.add(f"{what}: {name} of one request", last - first, "")


def _clocked(report: Report, what: str, ask: Callable[[At], str], pair: Sequence[At], number: int) -> None:
    names = ("never snapshotted", "restored")
    took: dict[str, float] = {}
    answers = set()
    for name in _in_turn(names, number):
        answer, took[name] = clock(lambda name=name: ask(pair[names.index(name)]))
        answers.add(answer)
        report.add(f"{what}: {name}", took[name], "ms")
    if len(answers) != 1:
        raise Unresponsive(f"{what}: the copy answers differently")
    report.add(f"{what}: restored / never snapshotted", took["restored"] / took["never snapshotted"], "")


# -- contenders --------------------------------------------------------------------------------------------------------


def _compiled(folder: Path, source: Path) -> str:
    program = folder / source.stem
    command = [
        "cc",
        "-O2",
        "-std=gnu11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
        "-I",
        VICTIMS,
        source,
        "-o",
        program,
    ]
    subprocess.run(command, check=True)
    return str(program)


@contextmanager
def _program(
    command: Sequence[str], path: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[tuple[int, Path]]:
    """Runs COMMAND PATH ARGUMENTS until its pid's end, whoever has that pid then; `path` is there and answers."""
    path.unlink(missing_ok=True)
    process = subprocess.Popen(
        [*command, str(path), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )
    process.returncode = 0  # reaped by end(), not by Popen's destructor
    try:
        waited = 0.0
        while not path.exists():
            if waited > PATIENCE or not Path(f"/proc/{process.pid}").exists():
                raise Unresponsive(f"{command[0]} does not begin")
            waited += 0.01
            select.select([], [], [], 0.01)
        yield process.pid, path
    finally:
        end(process.pid)


@contextmanager
def _replaced(pid: int, folder: Path) -> Iterator[lazyrestore.RestoredProcess]:
    """Snapshots a process, ends it and restores it."""
    with lazyrestore.Store.open(folder) as store, store.snapshot(pid, name="memory", kill=True) as snapshot:
        end(pid)
        process = snapshot.restore(record=False)
        try:
            yield process
        finally:
            finish(process)


@contextmanager
def _restored(
    command: Sequence[str],
    path: Path,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    first: str = "",
) -> Iterator[tuple[Path, lazyrestore.RestoredProcess]]:
    """As _program, snapshotted and restored after the request `first`."""
    with _program(command, path, arguments, environment) as (pid, _):
        if first:
            _ask(path, first)
        with _replaced(pid, folder) as process:
            yield path, process


def _in_turn(names: Sequence[str], number: int) -> list[str]:
    """Each comes first in some round."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _ask(path: Path, request: str) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        return _exchange(client, request.encode() + b"\n")


def _get(port: int, path: str) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        return _exchange(client, f"GET {path} HTTP/1.0\r\n\r\n".encode()).rpartition("\r\n\r\n")[2]


def _exchange(client: socket.socket, request: bytes) -> str:
    client.sendall(request)
    answer = b""
    while piece := client.recv(1 << 16):
        answer += piece
    if not answer:
        raise Unresponsive(f"no answer to {request!r}")
    return answer.decode()
