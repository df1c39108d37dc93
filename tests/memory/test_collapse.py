"""MADV_COLLAPSE, which would map a huge page of the template over what was dropped: zeros stay zeros."""

from __future__ import annotations

import pytest
from helpers_lazy_twin import InArena
from helpers_twin import ADVICE, ANONYMOUS, ARENA, PAGE, SHARED

COLLAPSE = 25
HUGE = 512 * PAGE  # a huge page's length, and ARENA lies at the start of one


@pytest.mark.parametrize("kind", [ANONYMOUS, SHARED], ids=["private", "shared"])
def test_collapse(in_arena: InArena, kind: int) -> None:
    with in_arena(ARENA + 2 * HUGE) as twins:
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
