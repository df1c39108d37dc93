"""Right bytes, whoever touches what in which order, and whatever the process does to its mappings meanwhile."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
from helpers_pager import CHUNK, PAGE, Image, Victim, crc_of_pages, pages, stats_when

from lazyrestore.pager import PagerClient

pytestmark = pytest.mark.requires("root")

BASE = 0x10_0000_0000
LENGTH = 2 << 20
ELSEWHERE = 0x20_0000_0000

Start = Callable[..., PagerClient]
MakeImage = Callable[..., Image]
MakeVictim = Callable[[], Victim]


@pytest.fixture
def image(make_image: MakeImage) -> Image:
    return make_image()


@pytest.fixture
def client(start: Start, image: Image) -> PagerClient:
    return start(image)


@pytest.fixture
def clone(client: PagerClient, make_victim: MakeVictim) -> Victim:
    victim = make_victim()
    victim.clone(client, BASE, LENGTH)
    return victim


def crc(raw: bytes | bytearray) -> str:
    return str(zlib.crc32(raw))


def test_whole_range(image: Image, clone: Victim) -> None:
    assert clone.ask("crc", BASE, LENGTH) == crc(image.raw(BASE, LENGTH))


@pytest.mark.parametrize("threads", [1, 8])
def test_random_order(image: Image, clone: Victim, threads: int) -> None:
    expected = str(crc_of_pages(image.raw(BASE, LENGTH)))
    assert clone.ask("walk", threads, BASE, LENGTH, 7).split() == [expected] * threads


def test_one_touch_fills_one_chunk(client: PagerClient, clone: Victim) -> None:
    clone.ask("touch", BASE + 3 * CHUNK + 5 * PAGE)
    stats = stats_when(client, lambda stats: stats.faults == 1)
    assert (stats.chunks_filled, stats.bytes_filled) == (1, CHUNK)
    assert stats.counters.pages == CHUNK // PAGE


def test_clones_share_what_one_of_them_touched(
    image: Image, client: PagerClient, clone: Victim, make_victim: MakeVictim
) -> None:
    second = make_victim()
    second.clone(client, BASE, LENGTH)
    assert clone.ask("poke", BASE, 200) == "ok"
    for victim in (clone, second):
        assert victim.ask("crc", BASE + PAGE, LENGTH - PAGE) == crc(image.raw(BASE + PAGE, LENGTH - PAGE))
    assert second.ask("touch", BASE) == str(image.raw(BASE, 1)[0])
    stats = client.stats()
    assert stats.chunks_filled == image.n_chunks == stats.chunks_total
    assert {space.pid for space in stats.spaces} == {clone.pid, second.pid}


def test_fork_of_a_half_touched_clone(image: Image, client: PagerClient, clone: Victim) -> None:
    half = LENGTH // 2
    assert clone.ask("crc", BASE, half) == crc(image.raw(BASE, half))
    assert clone.ask("poke", BASE + 1, 201) == "ok"
    clone.fork()
    assert clone.ask("poke", BASE, 202) == "ok"
    expected = bytearray(image.raw(BASE, LENGTH))
    expected[1] = 201
    assert clone.ask_child("crc", BASE, LENGTH) == crc(expected)
    expected[0] = 202
    assert clone.ask("crc", BASE, LENGTH) == crc(expected)
    assert [space.generation for space in sorted(client.stats().spaces, key=lambda s: s.id)] == [0, 1]


def test_grandchild_and_its_own_changes(image: Image, client: PagerClient, clone: Victim) -> None:
    assert clone.ask("dontneed", BASE, CHUNK) == "ok"
    clone.fork()
    assert clone.ask_child("dontneed", BASE + 3 * CHUNK, CHUNK) == "ok"
    raw = image.raw(BASE, LENGTH)
    mine = bytes(CHUNK) + raw[CHUNK:]
    assert clone.ask("crc", BASE, LENGTH) == crc(mine)
    assert clone.ask_child("crc", BASE, LENGTH) == crc(mine[: 3 * CHUNK] + bytes(CHUNK) + raw[4 * CHUNK :])


@pytest.mark.parametrize("touched", [False, True])
def test_dontneed_reads_zero(image: Image, clone: Victim, touched: bool) -> None:
    start, length = BASE + CHUNK // 2, CHUNK + 3 * PAGE
    if touched:
        clone.ask("crc", BASE, LENGTH)
    assert clone.ask("dontneed", start, length) == "ok"
    expected = bytearray(image.raw(BASE, LENGTH))
    expected[start - BASE : start - BASE + length] = bytes(length)
    assert clone.ask("crc", BASE, LENGTH) == crc(expected)


def test_dontneed_inside_of_dontneed(image: Image, clone: Victim) -> None:
    for start, length in ((CHUNK, 4 * CHUNK), (2 * CHUNK, CHUNK), (0, 6 * CHUNK), (0, PAGE)):
        assert clone.ask("dontneed", BASE + start, length) == "ok"
    assert clone.ask("crc", BASE, LENGTH) == crc(bytes(6 * CHUNK) + image.raw(BASE, LENGTH)[6 * CHUNK :])


def test_written_then_dropped_is_zero_and_writable(clone: Victim) -> None:
    assert clone.ask("poke", BASE, 9) == "ok"
    assert clone.ask("dontneed", BASE, PAGE) == "ok"
    assert clone.ask("touch", BASE) == "0"
    assert clone.ask("poke", BASE, 10) == "ok"
    assert clone.ask("touch", BASE) == "10"


@pytest.mark.parametrize("touched", [False, True])
def test_moved_and_grown(image: Image, clone: Victim, touched: bool) -> None:
    start, length = BASE + CHUNK + PAGE, 6 * CHUNK
    if touched:
        clone.ask("crc", start, 2 * CHUNK)
    assert clone.ask("remap", start, length, 2 * length, ELSEWHERE) == "ok"
    assert clone.ask("crc", ELSEWHERE, 2 * length) == crc(image.raw(start, length) + bytes(length))
    assert clone.ask("touch", start) == "SIGSEGV"
    assert clone.ask("crc", BASE, CHUNK) == crc(image.raw(BASE, CHUNK))


def test_grown_in_place(image: Image, clone: Victim) -> None:
    assert clone.ask("grow", BASE, LENGTH, LENGTH + 4 * CHUNK) == "ok"
    assert clone.ask("crc", BASE, LENGTH + 4 * CHUNK) == crc(image.raw(BASE, LENGTH) + bytes(4 * CHUNK))


def test_unmapped_and_split(image: Image, client: PagerClient, clone: Victim) -> None:
    assert clone.ask("munmap", BASE + 3 * PAGE, PAGE) == "ok"
    assert clone.ask("mprotect", BASE + 5 * PAGE, 2 * PAGE, 1) == "ok"
    assert clone.ask("touch", BASE + 3 * PAGE) == "SIGSEGV"
    assert clone.ask("crc", BASE, 3 * PAGE) == crc(image.raw(BASE, 3 * PAGE))
    rest = 4 * PAGE
    assert clone.ask("crc", BASE + rest, LENGTH - rest) == crc(image.raw(BASE + rest, LENGTH - rest))
    assert client.stats().counters.unmaps == 1


def test_events_beside_faults(image: Image, client: PagerClient, clone: Victim) -> None:
    """One thread's madvise makes installs answer EAGAIN while the other's faults are served."""
    dropped = 8 * CHUNK
    answer = clone.ask("trim", BASE, dropped, 2000, BASE + dropped, LENGTH - dropped)
    assert answer == str(crc_of_pages(image.raw(BASE + dropped, LENGTH - dropped)))
    assert clone.ask("crc", BASE, dropped) == crc(bytes(dropped))
    assert client.stats().counters.removes == 2000


def test_damaged_chunk(image: Image, client: PagerClient, clone: Victim, make_victim: MakeVictim) -> None:
    image.damage(BASE + CHUNK)
    for victim in (clone, make_victim()):
        if victim is not clone:
            victim.clone(client, BASE, LENGTH)
        assert victim.ask("touch", BASE + CHUNK) == "SIGBUS"
        assert victim.ask("touch", BASE + 2 * CHUNK - 1) == "SIGBUS"
        assert victim.ask("crc", BASE, CHUNK) == crc(image.raw(BASE, CHUNK))
        after = 2 * CHUNK
        assert victim.ask("crc", BASE + after, LENGTH - after) == crc(image.raw(BASE + after, LENGTH - after))
    stats = stats_when(client, lambda stats: stats.counters.poisoned == 2)
    assert stats.chunks_bad == 1


def test_chunks_of_all_sizes(make_image: MakeImage, start: Start, make_victim: MakeVictim) -> None:
    sizes = [PAGE, 3 * PAGE, CHUNK, PAGE, 2 << 20, 5 * PAGE]
    chunks, at = {}, BASE + PAGE
    for i, size in enumerate(sizes):
        chunks[at] = pages(i, size)
        at += size + (i % 2) * PAGE
    image = make_image(chunks)
    client = start(image)
    victim = make_victim()
    length = at - BASE + 10 * PAGE
    victim.clone(client, BASE, length)
    assert victim.ask("walk", 2, BASE, length, 3).split() == [str(crc_of_pages(image.raw(BASE, length)))] * 2


def test_stats_are_plausible(image: Image, client: PagerClient, clone: Victim) -> None:
    clone.ask("crc", BASE, LENGTH)
    stats = stats_when(client, lambda s: s.counters.pages + s.counters.zero_pages == LENGTH // PAGE)
    (space,) = stats.spaces
    assert space.pid == clone.pid
    assert space.bytes_registered == LENGTH
    assert space.counters == stats.counters
    assert stats.faults == stats.counters.missing + stats.counters.minor
    assert 0 < stats.faults <= 32  # a walk is served ahead
    assert stats.counters.pages == sum(map(len, image.chunks.values())) // PAGE
    assert stats.counters.pages + stats.counters.zero_pages == LENGTH // PAGE
    assert 0 < stats.service.p50_ns <= stats.service.p99_ns <= stats.service.max_ns <= stats.uptime_ns
    assert 0 < stats.bytes_read < stats.bytes_filled
