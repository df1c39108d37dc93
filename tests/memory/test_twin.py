"""Random memory operations on two identical victims, one of which is snapshotted and restored: nobody can tell which.

A failing program is shrunk, printed, and belongs into regressions/ then. $LAZYRESTORE_TWIN_SEEDS says how many programs
are tried, $LAZYRESTORE_TWIN_FIRST which seed is the first; tools/soak goes on for as long as one likes.
"""

from __future__ import annotations

import itertools
import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from helpers import Builder, Victims, until
from helpers_twin import (
    ARENA,
    PAGE,
    Difference,
    Pair,
    Step,
    from_text,
    pair_in,
    random_program,
    run_program,
    shrink,
    to_text,
)

import lazyrestore
from lazyrestore.pager.client import Counters

SEEDS = int(os.environ.get("LAZYRESTORE_TWIN_SEEDS", "300"))
FIRST = int(os.environ.get("LAZYRESTORE_TWIN_FIRST", "1"))
STEPS = 60
REGRESSIONS = sorted((Path(__file__).parent / "regressions").glob("*.txt"))
RACE_PAGES = 64
numbers = itertools.count()


class Bench:
    """Everything a program needs to run."""

    def __init__(self, victims: Victims, build: Builder, store: lazyrestore.Store, run: Path) -> None:
        self._parts = victims, build, store
        self._run = run

    def pair(self) -> AbstractContextManager[Pair]:
        return pair_in(*self._parts, self._run / f"t{next(numbers)}")

    def difference(self, program: list[Step]) -> str:
        """What the twins did not agree on, "" if they did."""
        try:
            with self.pair() as pair:
                run_program(pair, program)
        except Difference as error:
            return str(error)
        return ""


def request_of(difference: str) -> str:
    """The request that was answered differently: shrinking must not drift to another difference."""
    return difference.partition(" at '")[2].partition(" ")[0].partition("'")[0]


@pytest.fixture(scope="session")
def bench(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path) -> Bench:
    return Bench(victims, build, store, run)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_random_program(bench: Bench, seed: int) -> None:
    program = random_program(seed, STEPS)
    if first := bench.difference(program):
        shortest = shrink(program, lambda shorter: request_of(bench.difference(shorter)) == request_of(first))
        shown = bench.difference(shortest) or f"(not every time) {first}"
        pytest.fail(f"seed {seed}: {shown}\n\nas a regression case:\n{to_text(shortest)}", pytrace=False)


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_regression(bench: Bench, path: Path) -> None:
    assert not (shown := bench.difference(from_text(path.read_text()))), shown


def counted(pair: Pair, **least: int) -> Counters:
    """The pager's counters when these are as high as that: it counts an event after it has let its caller go on."""

    def enough() -> Counters | None:
        found = pair.stats().counters
        return found if all(getattr(found, name) >= count for name, count in least.items()) else None

    return until(enough, f"the last events to be counted: {least}")


@pytest.mark.parametrize("touched", [0, RACE_PAGES // 2])
def test_threads_race(bench: Bench, touched: int) -> None:
    """Readers, MADV_DONTNEED and fork at the same time: every page is what it was or zero, in every child too."""
    size = RACE_PAGES * PAGE
    with bench.pair() as pair:
        pair.send("map", ARENA, size, 3, 0, 0, 0)
        pair.send("write", ARENA, size, 77)
        replayed = 0
        for times in (4, 4, 4):
            pair.restore()
            if touched:
                pair.send("read", ARENA, touched * PAGE)
            pair.send("race", ARENA, size, times, 77)
            stats = counted(pair, removes=4 * RACE_PAGES, forks=times)
            if pair.replays:  # what is never touched is brought in the end
                stats = counted(pair, replayed=1)
            assert stats.forks == times
            assert not stats.replayed or pair.replays
            replayed += stats.replayed
            pair.send("write", ARENA, size, 77)
        assert replayed
        pair.send("digest")


def test_moves_into_what_is_being_unmapped(bench: Bench) -> None:
    """One thread unmaps, another is given the range at once, others read and fork: what was moved is all there."""
    size = RACE_PAGES * PAGE
    with bench.pair() as pair:
        for _ in range(3):
            pair.send("map", ARENA, 3 * size, 3, 0, 0, 1)
            pair.send("write", ARENA, 3 * size, 78)
            pair.restore()
            assert pair.send("swap", ARENA, size, 6, 78).startswith("0 ")
            stats = counted(pair, remaps=RACE_PAGES // 2, unmaps=RACE_PAGES, forks=6)
            assert (stats.remaps, stats.forks) == (RACE_PAGES // 2, 6)
        pair.send("digest")
