"""A thread that moves, resizes, unmaps, drops and forks memory of its own at random, and knows what must be in it.

Another sleeps, so that the pager cannot take the events as they come. `tools/soak storms` has more threads and time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Builder
from helpers_storm import ALL_CALLS, storms

import lazyrestore


@pytest.mark.parametrize(("shared", "forks"), [(0, 0), (30, 0), (30, 10)])
def test_no_page_is_wrong(build: Builder, store: lazyrestore.Store, run: Path, shared: int, forks: int) -> None:
    counts = storms(build.c("storm"), store, run / "log", (1, 1200, shared, forks, ALL_CALLS), 6)
    assert {status for _, status in counts} == {0}, (run / "log").read_text()
