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


@pytest.mark.parametrize(
    ("what", "threads"), [("fork", []), ("fork", ["two"]), ("moved", []), ("moved", ["two"]), ("beside", [])]
)
def test_what_a_mapping_grew_by_reads_zero(
    victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, what: str, threads: list[str]
) -> None:
    program = build.c("grown")
    with twins_in(victims, store, run / f"g{next(numbers)}", lambda control: [program, control, *threads]) as twins:
        twins.restore()
        assert twins.both(what) == "0"
