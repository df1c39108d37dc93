"""How many faults it takes to walk through memory that holds nothing: few, in either direction."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
from helpers_pager import CHUNK, PAGE, Image, Victim, pages, stats_when

from lazyrestore.pager import PagerClient

pytestmark = pytest.mark.requires("root")

BASE = 0x10_0000_0000
LENGTH = 64 << 20
PAGES = LENGTH // PAGE


@pytest.fixture
def client(make_image: Callable[..., Image], start: Callable[..., PagerClient]) -> PagerClient:
    return start(make_image({BASE - CHUNK: pages(1)}))


@pytest.fixture
def clone(client: PagerClient, make_victim: Callable[[], Victim]) -> Victim:
    victim = make_victim()
    victim.clone(client, BASE, LENGTH)
    return victim


def faults_of(client: PagerClient, victim: Victim, *command: object) -> int:
    """Zero faults that one command took; checks that everything it read was zero."""
    before = client.stats().counters.zero_faults
    assert victim.ask(*command) == "0"
    stats = stats_when(client, lambda stats: stats.faults == stats.counters.missing + stats.counters.minor)
    return stats.counters.zero_faults - before


@pytest.mark.parametrize("step", [PAGE, -PAGE])
def test_a_walk_takes_few_faults(client: PagerClient, clone: Victim, step: int) -> None:
    """64 KiB, 128 KiB, … 2 MiB, and 2 MiB each from then on."""
    first = BASE if step > 0 else BASE + LENGTH - PAGE
    assert faults_of(client, clone, "stride", first, step, PAGES) <= LENGTH // (2 << 20) + 6
    stats_when(client, lambda stats: stats.counters.zero_pages == PAGES)  # the last favour is counted after it is done


@pytest.mark.parametrize("step", [PAGE, -PAGE])
def test_interleaved_walks(client: PagerClient, clone: Victim, step: int) -> None:
    """Two streams at a time, as a copy from one place to another makes them."""
    half = LENGTH // 2
    first = BASE if step > 0 else BASE + half - PAGE
    assert faults_of(client, clone, "stride", first, step, PAGES // 2, half) <= 2 * (half // (2 << 20) + 6)
    stats_when(client, lambda stats: stats.counters.zero_pages == PAGES)  # the last favour is counted after it is done


def test_random_touches_take_a_block_each(client: PagerClient, clone: Victim) -> None:
    """A walk by a step that is odd in pages visits every page, never a neighbour next."""
    step = 2049 * PAGE  # wraps round modulo the length
    faults = faults_of(client, clone, "wrap", BASE, LENGTH, step, PAGES)
    assert LENGTH // (2 << 20) < faults <= LENGTH // CHUNK
    stats_when(client, lambda stats: stats.counters.zero_pages == PAGES)  # the last favour is counted after it is done


def test_a_descending_walk_meets_what_is_there(client: PagerClient, clone: Victim) -> None:
    """Pages that were written before stay, and stop nothing."""
    written = [BASE + (at * 37 % PAGES) * PAGE for at in range(1, 20)]
    for at in written:
        assert clone.ask("poke", at, 9) == "ok"
    assert clone.ask("stride", BASE + LENGTH - PAGE, -PAGE, PAGES) == str(9 * len(written))
    stats = stats_when(client, lambda stats: stats.faults == stats.counters.missing + stats.counters.minor)
    assert stats.counters.zero_faults <= LENGTH // (2 << 20) + 6 * len(written)


def test_holes_between_chunks_stay_inside(
    make_image: Callable[..., Image], start: Callable[..., PagerClient], make_victim: Callable[[], Victim]
) -> None:
    """A run of zeros ends where content begins, on either side."""
    image = make_image({BASE + i * CHUNK + 3 * PAGE: pages(i, 5 * PAGE) for i in range(0, 32, 2)})
    client, length = start(image), 32 * CHUNK
    for step in (PAGE, -PAGE):
        victim = make_victim()
        victim.clone(client, BASE, length)
        first = BASE if step > 0 else BASE + length - PAGE
        raw = image.raw(BASE, length)
        assert victim.ask("stride", first, step, length // PAGE) == str(sum(raw[::PAGE]))
        assert victim.ask("crc", BASE, length) == str(zlib.crc32(raw))
