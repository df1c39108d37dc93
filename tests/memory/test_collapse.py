"""MADV_COLLAPSE, which would map a huge page of the template over what was dropped: zeros stay zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Builder, Victims
from helpers_lazy_twin import twins_in
from helpers_twin import ADVICE, ANONYMOUS, ARENA, PAGE, SHARED

import lazyrestore

COLLAPSE = 25
HUGE = 512 * PAGE  # a huge page's length, and ARENA lies at the start of one


@pytest.mark.parametrize("kind", [ANONYMOUS, SHARED], ids=["private", "shared"])
def test_collapse(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, kind: int) -> None:
    program = build.c("twin")
    with twins_in(
        victims, store, run / f"collapse-{kind}", lambda control: [program, control, hex(ARENA), hex(ARENA + 2 * HUGE)]
    ) as twins:
        twins.both("map", ARENA, 2 * HUGE, 3, kind, 0, 0)
        twins.both("write", ARENA, 2 * HUGE, 5)
        twins.copy = twins.snapshot().restore(record=False)
        twins.both("read", ARENA, HUGE)  # of the second half nothing has arrived
        twins.both("advise", ARENA + 7 * PAGE, PAGE, ADVICE["DONTNEED"])
        for start in (ARENA, ARENA + HUGE):
            for name in ("never", "restored"):  # as the kernel likes: it is a wish
                twins.ask(name, "advise", start, HUGE, COLLAPSE)
        twins.both("fork", ARENA, PAGE, 7)
        twins.both("digest")
