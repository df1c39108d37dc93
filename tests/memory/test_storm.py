"""A thread that moves, resizes, unmaps, drops and forks memory of its own at random, and knows what must be in it.

It is the only one (0), so that the pager takes the events as they come; or another sleeps (1); or others come and go,
each of which inherits the memory of the last (-1). `tools/soak storms` has more threads and time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Builder
from helpers_storm import ALL_CALLS, storms

import lazyrestore

PASSED_ON = 0x86  # mremap that leaves its source, mremap over other memory, MADV_DONTNEED


@pytest.mark.parametrize(
    ("threads", "shared", "forks", "calls"),
    [(threads, *mix, ALL_CALLS) for threads in (0, 1) for mix in ((0, 0), (30, 0), (30, 10))] + [(-1, 0, 0, PASSED_ON)],
)
def test_no_page_is_wrong(
    build: Builder, store: lazyrestore.Store, run: Path, threads: int, shared: int, forks: int, calls: int
) -> None:
    counts = storms(
        build.c("storm"), store, run / "log", (threads, 1200, shared, forks, calls), 40 if threads < 0 else 6
    )
    assert {status for _, status in counts} == {0}, (run / "log").read_text()
