"""Processes with 2 MiB pages from the hugetlb pool: the machine's pool is made larger for the test, and put back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Builder, Victims, alive, until
from helpers_hugetlb import FREE, POOL, larger_pool
from helpers_lazy_twin import twins_in

import lazyrestore
from lazyrestore.errors import LazyrestoreError, SnapshotFailed

PAGES = 8  # of the victim
NEEDED = 160  # two victims, templates (pagers linger), what copies and their children write
numbers = itertools.count()


@pytest.fixture(autouse=True)
def pool() -> Iterator[None]:
    with larger_pool(NEEDED):
        yield


def huge_kib(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_Hugetlb:"))


@pytest.mark.parametrize("first", ["digest", "write", "dontneed", "fork"])
def test_private(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, first: str) -> None:
    program = build.c("hugepages")
    with twins_in(victims, store, run / f"huge{next(numbers)}", lambda control: [program, control, "private"]) as twins:
        for _ in range(2):
            twins.restore()
            for request in (first, "dontneed", "write", "fork", "digest"):
                assert twins.both(request).startswith("ok ")


def test_untouched_generations(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path) -> None:
    """A copy of a copy of which nothing had arrived."""
    program = build.c("hugepages")
    with twins_in(victims, store, run / f"huge{next(numbers)}", lambda control: [program, control, "private"]) as twins:
        for _ in range(3):
            twins.restore()
        assert twins.both("digest").startswith("ok ")


def test_mapping_without_content(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path) -> None:
    """It is of huge pages still."""
    program = build.c("hugepages")
    with twins_in(
        victims, store, run / f"huge{next(numbers)}", lambda control: [program, control, "untouched"]
    ) as twins:
        twins.restore()
        for request in ("write", "dontneed", "fork"):
            assert twins.both(request).startswith("ok ")
        assert huge_kib(twins.pids[1]) == huge_kib(twins.pids[0]) > 0


def test_page_that_is_mostly_zero(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path) -> None:
    program = build.c("hugepages")
    with twins_in(victims, store, run / f"huge{next(numbers)}", lambda control: [program, control, "private"]) as twins:
        twins.both("sparse")
        twins.restore()
        assert twins.both("digest").startswith("ok ")


def test_shared_is_refused(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path) -> None:
    """With its own text, and the process goes on."""
    control = run / f"huge{next(numbers)}"
    victim = victims.start([build.c("hugepages"), control, "shared"])
    victim.listens(control)
    with pytest.raises(SnapshotFailed, match="shared hugetlb memory cannot be stored yet"):
        store.snapshot(victim.pid, name="refused", kill=True)
    assert alive(victim.pid)
    victim.kill()


def test_too_few_pages(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path) -> None:
    program = build.c("hugepages")
    with twins_in(victims, store, run / f"huge{next(numbers)}", lambda control: [program, control, "private"]) as twins:
        snapshot = twins.snapshot()
        twins.never.kill()

        def small() -> bool:  # the dead one's pages come back when its memory has gone
            POOL.write_text(str(int(POOL.read_text()) - int(FREE.read_text()) + 2))
            return int(FREE.read_text()) <= 2

        until(small, "a pool with two free pages")
        with pytest.raises(LazyrestoreError, match="huge pages"):
            twins.copy = snapshot.restore()
