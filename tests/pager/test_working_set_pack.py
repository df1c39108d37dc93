"""The working set's pack: pages of its own, damaged ones, and those that each process gets as its own copies."""

from __future__ import annotations

import os
import zlib
from random import Random

import pytest
from helpers_pager import CHUNK, PAGE, stats_when
from helpers_working_set import (
    BASE,
    FULL,
    LENGTH,
    MakeImage,
    MakeVictim,
    Start,
    anonymous,
    numbers,
    packed,
    present,
    replayed,
)

from lazyrestore.errors import PagerError
from lazyrestore.pager import wire

pytestmark = pytest.mark.requires("root")


@pytest.mark.parametrize("damaged", [False, True])
def test_from_its_pack(start: Start, make_image: MakeImage, make_victim: MakeVictim, damaged: bool) -> None:
    """The frames serve, not the chunks, whose stored bytes are damaged here; where a frame is, its chunks do."""
    image = make_image(working_set=packed(5, 4, 11, 0, 3))
    image.add_frames(3, 1)
    for number in (5, 4, 11, 0)[3 if damaged else 0 :]:
        image.damage(sorted(image.chunks)[number])
    if damaged:
        image.flip(image.frames_offset, wire.FRAME.unpack_from(image.frames)[0])
    client, victim = start(image), make_victim()
    stats_when(client, lambda stats: stats.chunks_filled == 5)
    victim.clone(client, BASE, LENGTH, replay=True)
    replayed(client, 5 * CHUNK // PAGE)
    for number in (5, 4, 11, 0, 3):
        address = sorted(image.chunks)[number]
        assert victim.ask("crc", address, CHUNK) == str(zlib.crc32(image.raw(address, CHUNK)))
    stats = client.stats()
    assert (stats.chunks_bad, stats.faults) == (0, 0)
    alone = [image.stored_at[sorted(image.chunks)[number]][1] for number in ((5, 4, 11, 3) if damaged else (3,))]
    frames = [stored for stored, _, _ in wire.FRAME.iter_unpack(image.frames)][1 if damaged else 0 :]
    assert stats.bytes_read == sum(alone) + sum(frames)


def test_single_pages_from_its_pack(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    """Only the touched pages of a chunk are filled; the first touch of another fills the rest, and leaves these."""
    image = make_image(working_set=packed(5, 4, pages=0b1001_0000_0010_0001))
    image.add_frames(2)
    client, victim, other = start(image), make_victim(), make_victim()
    stats = stats_when(client, lambda stats: stats.bytes_filled == 8 * PAGE)
    assert stats.chunks_filled == 2
    victim.clone(client, BASE, LENGTH, replay=True)
    replayed(client, 8)
    at = sorted(image.chunks)[5]
    assert [page for page in range(16) if present(victim.pid, at + page * PAGE)] == [0, 5, 12, 15]
    assert victim.ask("crc", at + 5 * PAGE, PAGE) == str(zlib.crc32(image.raw(at + 5 * PAGE, PAGE)))
    assert client.stats().faults == 0
    other.clone(client, BASE, LENGTH, replay=True)
    assert other.ask("crc", at + 6 * PAGE, PAGE) == str(zlib.crc32(image.raw(at + 6 * PAGE, PAGE)))
    assert client.stats().bytes_filled == 4 * PAGE + CHUNK
    for each in (victim, other):
        assert each.ask("crc", BASE, LENGTH) == str(zlib.crc32(image.raw(BASE, LENGTH)))
    assert client.stats().chunks_filled == FULL


def test_single_pages_of_a_damaged_chunk(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    """Those that a sound pack holds are served; the others cannot be."""
    image = make_image(working_set=packed(5, pages=0b1001))
    image.add_frames(1)
    at = sorted(image.chunks)[5]
    image.damage(at)
    client, victim, other = start(image), make_victim(), make_victim()
    victim.clone(client, BASE, LENGTH, replay=True)
    replayed(client, 2)
    assert victim.ask("touch", at + PAGE) == "SIGBUS"
    other.clone(client, BASE, LENGTH)
    for page in (0, 3):
        assert victim.ask("crc", at + page * PAGE, PAGE) == str(zlib.crc32(image.raw(at + page * PAGE, PAGE)))
        assert other.ask("crc", at + page * PAGE, PAGE) == str(zlib.crc32(image.raw(at + page * PAGE, PAGE)))
    assert client.stats().chunks_bad == 1


@pytest.mark.parametrize("seed", range(6))
def test_random_pages(start: Start, make_image: MakeImage, make_victim: MakeVictim, seed: int) -> None:
    """Any pages in the list, written ones too, any frames, and several processes that touch any pages meanwhile."""
    random = Random(seed)
    entries = [
        wire.TOUCHED.pack(
            number, random.getrandbits(16) & random.getrandbits(16), random.choice((0, random.getrandbits(16)))
        )
        for number in random.sample(range(FULL), FULL)
    ]
    image = make_image(working_set=b"".join(entries))
    image.add_frames(*(1,) * random.randrange(4), *(random.randrange(1, 5),) * random.randrange(4))
    client = start(image)
    victims = [make_victim() for _ in range(3)]
    for victim in victims:
        victim.clone(client, BASE, LENGTH, replay=random.random() < 0.8, record=random.random() < 0.5)
        for _ in range(40):
            address = BASE + random.randrange(LENGTH // PAGE) * PAGE
            right = victim.ask("crc", address, PAGE) == str(zlib.crc32(image.raw(address, PAGE)))
            assert right, hex(address)
    for victim in victims:
        right = victim.ask("crc", BASE, LENGTH) == str(zlib.crc32(image.raw(BASE, LENGTH)))
        assert right


@pytest.mark.parametrize("how", ["list", "file"])
def test_pack_of_other_chunks(start: Start, make_image: MakeImage, make_victim: MakeVictim, how: str) -> None:
    """A frame that is sound, and as long as the right one, but of other chunks: an entry of the list is damaged, or
    another recording has overwritten the pack since it was opened. Nothing is taken from it."""
    chunks = {BASE + n * CHUNK: bytes([n + 1]) * CHUNK for n in range(8)}
    image = make_image(chunks, working_set=packed(0, 1, 2, 3))
    image.add_frames(2, 2)
    if how == "list":
        image.working_set = packed(0, 5, 2, 3)
    else:
        first, second = (wire.FRAME.unpack_from(image.frames, at)[0] for at in (0, wire.FRAME.size))
        assert first == second
        with image.path.open("r+b") as file:
            file.seek(image.frames_offset + first)
            other = file.read(second)
            file.seek(image.frames_offset)
            file.write(other)
    client, victim = start(image), make_victim()
    victim.clone(client, BASE, LENGTH, replay=True)
    stats_when(client, lambda stats: stats.counters.replayed >= 4 * CHUNK // PAGE)
    for n in range(8):
        right = victim.ask("crc", BASE + n * CHUNK, CHUNK) == str(zlib.crc32(bytes([n + 1]) * CHUNK))
        assert right, n


@pytest.mark.parametrize("frames", [(7, 2), (7, 0), (1 << 31, 1), (7, 1 << 31)])
def test_pack_of_impossible_frames(
    start: Start, make_image: MakeImage, make_victim: MakeVictim, frames: tuple[int, int]
) -> None:
    """Bytes that are no frame are passed over; a table that cannot be true is no image to start from."""
    image = make_image(working_set=packed(5, 4))
    image.frames, image.frames_offset = wire.FRAME.pack(*frames, 0), 100
    if frames == (7, 2):
        client, victim = start(image), make_victim()
        victim.clone(client, BASE, LENGTH, replay=True)
        replayed(client, 2 * CHUNK // PAGE)
    else:
        with pytest.raises(PagerError):
            start(image)


def test_written_pages_of_the_pack_are_not_in_the_template(
    start: Start, make_image: MakeImage, make_victim: MakeVictim
) -> None:
    """Each process gets them from the pager's memory; who needs them in the template gets them there."""
    image = make_image(working_set=packed(4, written=0b0110, pages=0b1110) + packed(5, written=1, pages=1))
    image.add_frames(2)
    client, first, second, reader = start(image), make_victim(), make_victim(), make_victim()
    at, after = sorted(image.chunks)[4:6]
    pages = [at + PAGE, at + 2 * PAGE, at + 3 * PAGE, after]
    for victim in (first, second):
        victim.clone(client, BASE, LENGTH, replay=True)
        replayed(client, len(pages) if victim is first else 2 * len(pages))
        assert [anonymous(victim.pid, page) for page in pages] == [True, True, False, True]
        for page in pages:
            assert victim.ask("crc", page, PAGE) == str(zlib.crc32(image.raw(page, PAGE)))
    assert client.stats().faults == 0
    in_template = [os.pread(client.template_fd, PAGE, page) == image.raw(page, PAGE) for page in pages]
    assert in_template == [False, False, True, False]
    reader.clone(client, BASE, LENGTH)
    assert reader.ask("crc", pages[0], PAGE) == str(zlib.crc32(image.raw(pages[0], PAGE)))
    assert numbers(client.filled_working_set()) == (4, 5)
    assert all(os.pread(client.template_fd, PAGE, page) == image.raw(page, PAGE) for page in pages)


def test_pack_of_a_list_that_has_a_chunk_twice(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    image = make_image(working_set=packed(4, written=1, pages=3) + packed(4, written=4, pages=4))
    image.add_frames(1, 1)
    client, victim = start(image), make_victim()
    victim.clone(client, BASE, LENGTH, replay=True)
    replayed(client, 3)
    assert victim.ask("crc", BASE, LENGTH) == str(zlib.crc32(image.raw(BASE, LENGTH)))
