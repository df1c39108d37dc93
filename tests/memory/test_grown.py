"""One thread unmaps a range, a neighbour grows over it in place, which no event tells, and the next call raises an
event or a fault: what it grew by reads zero."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from helpers import Builder, Victims
from helpers_lazy_twin import twins_in

import lazyrestore

numbers = itertools.count()


@pytest.mark.xfail(
    strict=True,
    reason="a defect, open: while the window of the munmap is open, what was unmapped may still be there, and the grown"
    " neighbour, which is registered, is taken for it: old bytes, or SIGBUS (window.h)",
)
@pytest.mark.parametrize("what", ["fork", "moved"])
def test_what_a_mapping_grew_by_reads_zero(
    victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, what: str
) -> None:
    program = build.c("grown")
    with twins_in(victims, store, run / f"g{next(numbers)}", lambda control: [program, control]) as twins:
        twins.restore()
        assert twins.both(what) == "0"
