"""Processes with 2 MiB pages from the hugetlb pool: the machine's pool is made larger for the test, and put back."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from helpers import Builder, Victims, alive, until
from helpers_hugetlb import FREE, POOL, larger_pool
from helpers_lazy_twin import twins_in

import lazyrestore
from lazyrestore.errors import LazyrestoreError, SnapshotFailed

PAGES = 8  # of the victim
NEEDED = 160  # two victims, templates (pagers linger), what copies and their children write
PAUSE = "34 "  # the number of the system call
numbers = itertools.count()


@pytest.fixture(autouse=True)
def pool() -> Iterator[None]:
    with larger_pool(NEEDED):
        yield


def huge_kib(pid: int, kind: str = "Private") -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(f"{kind}_Hugetlb:"))


def pool_of(pages: int) -> bool:
    """Whether no more than so many are free; the pages of a dead process come back when its memory has gone."""
    POOL.write_text(str(int(POOL.read_text()) - int(FREE.read_text()) + pages))
    return int(FREE.read_text()) <= pages


@contextmanager
def larger_gigantic_pool() -> Iterator[None]:
    pool = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
    if not pool.exists():
        pytest.skip("no 1 GiB huge pages on this machine")
    before = int(pool.read_text())
    pool.write_text(str(before + 1))
    try:
        if int(pool.with_name("free_hugepages").read_text()) < 1:
            pytest.skip("no free huge page of 1 GiB")
        yield
    finally:
        pool.write_text(str(before))


@pytest.mark.parametrize("first", ["digest", "write", "dontneed", "fork"])
def test_private(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, first: str) -> None:
    program = build.c("hugepages")
    with twins_in(victims, store, run / f"huge{next(numbers)}", lambda control: [program, control, "private"]) as twins:
        for _ in range(2):
            twins.restore()
            for request in (first, "dontneed", "write", "fork", "digest"):
                assert twins.both(request).startswith("ok ")


def test_untouched_generations(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path) -> None:
    """A copy of a copy of which nothing had arrived, nor does for its snapshot."""
    program = build.c("hugepages")
    with twins_in(victims, store, run / f"huge{next(numbers)}", lambda control: [program, control, "private"]) as twins:
        for _ in range(3):
            copy = twins.restore()
            before = copy.stats().bytes_filled
            store.snapshot(copy.pid, name="looked-at").close()
            store.remove("looked-at")
            assert copy.stats().bytes_filled - before < 2 << 20
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


@pytest.mark.parametrize("kind", ["shared", "memfd"])
def test_shared(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, kind: str) -> None:
    """What one mapping or process writes, the others see; a memfd is one file for its descriptor and its mappings."""
    program = build.c("hugepages")
    with twins_in(victims, store, run / f"huge{next(numbers)}", lambda control: [program, control, kind]) as twins:
        twins.both("sparse")
        for first in ("digest", "fork", "write"):
            twins.restore()
            for request in (first, "dontneed", "write", "fork", "digest"):
                assert twins.both(request).startswith("ok ")
        assert huge_kib(twins.pids[1], "Shared") == huge_kib(twins.pids[0], "Shared")
        assert huge_kib(twins.pids[1]) == huge_kib(twins.pids[0])


@pytest.mark.parametrize(
    ("kind", "reason"), [("private", "huge pages"), ("shared", "shared memory needs 8 huge pages")]
)
def test_too_few_pages(
    victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, kind: str, reason: str
) -> None:
    program = build.c("hugepages")
    with twins_in(victims, store, run / f"huge{next(numbers)}", lambda control: [program, control, kind]) as twins:
        snapshot = twins.snapshot()
        twins.never.kill()
        until(lambda: pool_of(2), "a pool with two free pages")
        with pytest.raises(LazyrestoreError, match=reason):
            twins.copy = snapshot.restore()


@pytest.mark.parametrize("left", [1, 2])
def test_none_left_when_it_is_touched(
    victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, left: int
) -> None:
    """Who needs one ends, be it for contents (its second page) or for zeros (its third). A later copy of the same pager
    finds pages again."""
    program = build.c("hugepages")
    with twins_in(victims, store, run / f"huge{next(numbers)}", lambda control: [program, control, "private"]) as twins:
        expected = twins.both("digest")
        snapshot = twins.snapshot()
        twins.never.kill()
        twins.copy = snapshot.restore()
        until(lambda: pool_of(left), f"a pool with {left} free pages")
        with pytest.raises(AssertionError, match="digest"):
            twins.ask("restored", "digest")
        assert twins.copy.wait(60) == -signal.SIGBUS
        POOL.write_text(str(int(POOL.read_text()) + PAGES))
        twins.copy = snapshot.restore()
        assert twins.ask("restored", "digest") == expected


REFUSED = {"memfd-private": "huge pages of a file cannot be stored yet", "huger": "huge pages of 1024 MiB"}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, kind: str) -> None:
    """With a text of its own, and the process goes on."""
    control = run / f"huge{next(numbers)}"
    with larger_gigantic_pool() if kind == "huger" else nullcontext():
        victim = victims.start([build.c("hugepages"), control, kind])
        if kind == "huger":
            call = Path(f"/proc/{victim.pid}/syscall")
            victim.until(lambda: call.read_text().startswith(PAUSE), "a process that has its page of 1 GiB")
        else:
            victim.listens(control)
        with pytest.raises(SnapshotFailed, match=REFUSED[kind]):
            store.snapshot(victim.pid, name="refused", kill=True)
        assert alive(victim.pid)
        victim.kill()
