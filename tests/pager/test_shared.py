"""MAP_SHARED memory: one memfd per shared object and restored tree, lazily filled."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator

import pytest
from helpers_pager import CHUNK, PAGE, Image, Victim, pages, shared_address, shared_backing

from lazyrestore.errors import PagerError
from lazyrestore.pager import PagerClient, Range

pytestmark = pytest.mark.requires("root")

NUMBER = 3
AT = 0x30_0000_0000
SIZE = 8 * CHUNK
SHARED = shared_address(NUMBER)


@pytest.fixture
def image(make_image: Callable[..., Image]) -> Image:
    return make_image({SHARED + i * CHUNK: pages(i) for i in (0, 1, 3, 6)} | {0x1000: pages(9, PAGE)})


@pytest.fixture
def client(start: Callable[..., PagerClient], image: Image) -> PagerClient:
    return start(image)


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("shared")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def map_shared(victim: Victim, memfd: int, length: int = SIZE) -> int:
    """Maps the memfd; returns the victim's descriptor."""
    fd = int(victim.ask(f"open /proc/{os.getpid()}/fd/{memfd}"))
    victim.map(AT, length, fd, 0, shared=True)
    return fd


def ranges(length: int = SIZE) -> list[Range]:
    return [Range(AT, AT + length, SHARED, shared_backing(NUMBER))]


@pytest.fixture
def victim(client: PagerClient, memfd: int, make_victim: Callable[[], Victim]) -> Victim:
    victim = make_victim()
    map_shared(victim, memfd)
    victim.attach(client, ranges(), {NUMBER: memfd})
    return victim


@pytest.fixture
def grown(client: PagerClient, memfd: int, make_victim: Callable[[], Victim]) -> Victim:
    """Attached with the first two chunks mapped; the mapping grew since."""
    victim = make_victim()
    map_shared(victim, memfd, 2 * CHUNK)
    victim.attach(client, ranges(2 * CHUNK), {NUMBER: memfd})
    assert victim.ask("grow", AT, 2 * CHUNK, SIZE) == "ok"
    return victim


def crc(raw: bytes | bytearray) -> str:
    return str(zlib.crc32(raw))


def test_contents(image: Image, victim: Victim) -> None:
    assert victim.ask("crc", AT, SIZE) == crc(image.raw(SHARED, SIZE))


def test_two_processes_of_a_tree_share_writes(
    image: Image, client: PagerClient, memfd: int, victim: Victim, make_victim: Callable[[], Victim]
) -> None:
    other = make_victim()
    map_shared(other, memfd)
    other.attach(client, ranges(), {NUMBER: memfd})
    expected = bytearray(image.raw(SHARED, SIZE))
    for at, writer in ((0, victim), (2 * CHUNK + 7, other), (3 * CHUNK, other), (7 * CHUNK, victim)):
        assert writer.ask("poke", AT + at, 250) == "ok"
        expected[at] = 250
    assert victim.ask("crc", AT, SIZE) == other.ask("crc", AT, SIZE) == crc(expected)
    assert client.stats().chunks_filled == 4


def test_forked_child_shares_writes(image: Image, victim: Victim) -> None:
    victim.fork()
    assert victim.ask_child("poke", AT + 3 * CHUNK + 1, 251) == "ok"
    expected = bytearray(image.raw(SHARED, SIZE))
    expected[3 * CHUNK + 1] = 251
    assert victim.ask("crc", AT, SIZE) == victim.ask_child("crc", AT, SIZE) == crc(expected)


def test_dontneed_keeps_contents(image: Image, victim: Victim) -> None:
    expected = bytearray(image.raw(SHARED, SIZE))
    for at in (5, 2 * CHUNK + 5):
        assert victim.ask("poke", AT + at, 252) == "ok"
        expected[at] = 252
    assert victim.ask("dontneed", AT, SIZE) == "ok"
    assert victim.ask("crc", AT, SIZE) == crc(expected)


def test_punched_out_reads_zero(image: Image, victim: Victim) -> None:
    victim.ask("crc", AT, SIZE)
    assert victim.ask("punch", AT + CHUNK, CHUNK) == "ok"
    raw = image.raw(SHARED, SIZE)
    assert victim.ask("crc", AT, SIZE) == crc(raw[:CHUNK] + bytes(CHUNK) + raw[2 * CHUNK :])


@pytest.mark.parametrize(("at", "length"), [(CHUNK, CHUNK), (CHUNK + PAGE, PAGE), (PAGE, 5 * CHUNK), (0, SIZE)])
def test_punched_out_before_the_first_touch(image: Image, victim: Victim, at: int, length: int) -> None:
    """Its event looks like that of MADV_DONTNEED, which keeps contents."""
    assert victim.ask("punch", AT + at, length) == "ok"
    raw = image.raw(SHARED, SIZE)
    assert victim.ask("crc", AT, SIZE) == crc(raw[:at] + bytes(length) + raw[at + length :])


def test_dontneed_before_the_first_touch(image: Image, victim: Victim) -> None:
    assert victim.ask("dontneed", AT + CHUNK, 3 * CHUNK) == "ok"
    assert victim.ask("crc", AT, SIZE) == crc(image.raw(SHARED, SIZE))


def test_punched_out_after_a_move(image: Image, victim: Victim) -> None:
    there = AT + 4 * SIZE
    assert victim.ask("remap", AT, 2 * CHUNK, 2 * CHUNK, there) == "ok"
    assert victim.ask("punch", there + CHUNK, CHUNK) == "ok"
    raw = image.raw(SHARED, 2 * CHUNK)
    assert victim.ask("crc", there, 2 * CHUNK) == crc(raw[:CHUNK] + bytes(CHUNK))


def test_punched_out_where_the_mapping_grew(image: Image, grown: Victim) -> None:
    assert grown.ask("punch", AT + 3 * CHUNK, PAGE) == "ok"
    raw = image.raw(SHARED, SIZE)
    assert grown.ask("crc", AT, SIZE) == crc(raw[: 3 * CHUNK] + bytes(PAGE) + raw[3 * CHUNK + PAGE :])


def test_punched_out_by_a_forked_child(image: Image, victim: Victim) -> None:
    victim.fork()
    assert victim.ask_child("punch", AT + 3 * CHUNK + PAGE, PAGE) == "ok"
    raw = image.raw(SHARED, SIZE)
    expected = crc(raw[: 3 * CHUNK + PAGE] + bytes(PAGE) + raw[3 * CHUNK + 2 * PAGE :])
    assert victim.ask("crc", AT, SIZE) == victim.ask_child("crc", AT, SIZE) == expected


def test_punches_beside_faults(image: Image, client: PagerClient, make_victim: Callable[[], Victim]) -> None:
    raw = image.raw(SHARED, SIZE)
    kept = b"".join(bytes(PAGE) if i % 2 == 0 else raw[i * PAGE : (i + 1) * PAGE] for i in range(SIZE // PAGE))
    for _ in range(30):
        memfd = os.memfd_create("shared")
        try:
            os.ftruncate(memfd, SIZE)
            victim = make_victim()
            map_shared(victim, memfd)
            victim.attach(client, ranges(), {NUMBER: memfd})
        finally:
            os.close(memfd)
        assert victim.ask("punches", AT, SIZE) == f"{crc(kept)} {sum(kept[PAGE :: 2 * PAGE])}"


def test_mapping_that_grows_shows_the_file(image: Image, grown: Victim) -> None:
    assert grown.ask("crc", AT, SIZE) == crc(image.raw(SHARED, SIZE))


def test_eager_fills_before_anybody_reads_the_descriptor(
    image: Image, client: PagerClient, memfd: int, make_victim: Callable[[], Victim]
) -> None:
    victim = make_victim()
    fd = map_shared(victim, memfd)
    victim.attach(client, ranges(), {NUMBER: memfd}, eager=True)
    assert client.stats().chunks_filled == 4
    assert victim.ask("readfd", fd, 0, SIZE) == crc(image.raw(SHARED, SIZE))
    assert victim.ask("crc", AT, SIZE) == crc(image.raw(SHARED, SIZE))


def test_eager_with_a_damaged_chunk_is_refused(
    image: Image, client: PagerClient, memfd: int, make_victim: Callable[[], Victim]
) -> None:
    image.damage(SHARED + 3 * CHUNK)
    victim = make_victim()
    map_shared(victim, memfd)
    with pytest.raises(PagerError, match="filling a shared memory file"):
        victim.attach(client, ranges(), {NUMBER: memfd}, eager=True)
    assert not client.stats().spaces


def test_unknown_backing_is_refused(client: PagerClient, memfd: int, make_victim: Callable[[], Victim]) -> None:
    victim = make_victim()
    map_shared(victim, memfd)
    with pytest.raises(PagerError, match=f"{AT:#x}.*unknown backing"):
        victim.attach(client, ranges(), {NUMBER + 1: memfd})
