"""Go's heap: reservations without access, arenas, spans that the scavenger returns, and a collector that walks all
of it while goroutines run. The oracles: every block holds its pattern, what make() gives is zero, live blocks are
a twin's."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from helpers import Builder, Victims, until
from helpers_lazy_twin import lazily_freed, resident, twins_in

import lazyrestore

pytestmark = pytest.mark.requires("program:go")

numbers = itertools.count()
SLACK = 8 << 20  # bytes by which two processes that do the same may differ: when they collect is a matter of chance


@pytest.mark.parametrize("first", [("work", "deep"), ("fault", "empty")], ids="-".join)
@pytest.mark.parametrize("lazily", [False, True], ids=["dontneed", "free"])
def test_heap(
    victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, lazily: bool, first: tuple[str, str]
) -> None:
    """first: what each restored process does before anything else, with nothing of its memory there; lazily: memory is
    returned with MADV_FREE, which restored memory refuses."""
    program = build.go("goheap")
    environment = {"GODEBUG": f"madvdontneed={int(not lazily)}"}
    with twins_in(victims, store, run / f"go{next(numbers)}", lambda control: [program, control], environment) as twins:

        def both(*words: object) -> str:
            answer = twins.both(*words)
            assert answer.startswith("0 wrong, ")
            return answer

        both("work", 1, 400)
        both("empty")
        both("work", 2, 300)
        for generation, name in enumerate(first):
            both("churn", 1)
            copy = twins.restore()  # in the middle of a collection, more often than not
            both(name, 100 + generation, 100)
            ticks = int(twins.ask("restored", "ticks"))
            both("deep", 20000)
            assert both("fault").endswith("nil pointer dereference")
            both("work", 20 + generation, 200)
            both("churn", 0)
            both("check")
            dropped, full = copy.stats().counters.removes, resident(copy.pid)
            both("empty")
            until(lambda copy=copy, dropped=dropped: copy.stats().counters.removes > dropped, "an event to be counted")
            if not lazily:
                assert resident(copy.pid) < min(full, resident(twins.never.pid) * 1.25 + SLACK)
            elif not generation:
                assert lazily_freed(twins.never.pid)
            until(lambda before=ticks: int(twins.ask("restored", "ticks")) > before, "a timer that goes on")
            both("work", 30 + generation, 300)
            both("check")
