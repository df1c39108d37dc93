"""The working set: recorded in the order of first touch, brought to later address spaces before they ask."""

from __future__ import annotations

import mmap
import os
import sys
import zlib
from pathlib import Path

import pytest
from helpers import until
from helpers_pager import CHUNK, PAGE, pages, stats_when
from helpers_working_set import (
    BASE,
    FULL,
    LENGTH,
    MakeImage,
    MakeVictim,
    Start,
    anonymous,
    end,
    numbers,
    packed,
    present,
    replayed,
    slot_of,
)

from lazyrestore.pager import BACKING_TEMPLATE, Range
from lazyrestore.pager.wire import INDEX_BLOCK

pytestmark = pytest.mark.requires("root")


def test_order_of_first_touch(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    image = make_image()
    client, victim = start(image), make_victim()
    victim.clone(client, BASE, LENGTH, record=True)
    touched = [20, 3, 30, 3, 0, 20]
    for number in touched:
        victim.ask("touch", BASE + number * CHUNK + 5 * PAGE)
    victim.ask("touch", BASE + 2 * CHUNK)  # a hole is no chunk
    stats_when(client, lambda stats: stats.faults == 5)
    assert numbers(client.working_set()) == tuple(slot_of(image, number) for number in (20, 3, 30, 0))


def test_next_one_needs_no_faults(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    image = make_image()
    client, first, second = start(image), make_victim(), make_victim()
    first.clone(client, BASE, LENGTH, record=True)
    for number in (9, 8, 25):
        first.ask("touch", BASE + number * CHUNK)
    stats_when(client, lambda stats: stats.faults == 3)
    assert len(numbers(client.working_set(end=True))) == 3
    first.ask("touch", BASE)  # after the end of the recording
    second.clone(client, BASE, LENGTH, replay=True)
    replayed(client, 3)
    for number in (8, 9, 25):
        address = BASE + number * CHUNK
        assert second.ask("crc", address, PAGE) == str(zlib.crc32(image.raw(address, PAGE)))
    stats = stats_when(client, lambda stats: stats.faults >= 4)
    assert stats.faults == 4
    assert stats.counters.replayed == 3  # not a page more than was touched
    assert second.ask("crc", BASE, LENGTH) == str(zlib.crc32(image.raw(BASE, LENGTH)))


def test_brought_whole_across_mappings(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    """A chunk over several VMAs, as of a library's read-only and writable data: one CONTINUE cannot have them all."""
    image = make_image(working_set=packed(slot_of(make_image(), 8), slot_of(make_image(), 9)))
    client, victim = start(image), make_victim()
    victim.map(BASE, LENGTH, victim.open(f"/proc/{os.getpid()}/fd/{client.template_fd}"), BASE)
    for page in (3, 4, 11):
        assert victim.ask("mprotect", BASE + 8 * CHUNK + page * PAGE, PAGE, mmap.PROT_READ) == "ok"
    victim.attach(client, [Range(BASE, BASE + LENGTH, BASE, BACKING_TEMPLATE)], replay=True)
    replayed(client, 2 * CHUNK // PAGE)
    address = BASE + 8 * CHUNK
    assert victim.ask("crc", address, 2 * CHUNK) == str(zlib.crc32(image.raw(address, 2 * CHUNK)))
    assert client.stats().faults == 0


def test_recorded_until_the_process_ends(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    client, first, second = start(make_image()), make_victim(), make_victim()
    parked = make_victim()
    parked.clone(client, BASE, LENGTH, record=None)
    parked.ask("touch", BASE + CHUNK)
    end(client, parked, 1)
    assert not client.working_set()  # too little to tell what the process needs
    first.clone(client, BASE, LENGTH, record=None)
    first.ask("crc", BASE, LENGTH)
    end(client, first, 2)
    assert len(numbers(client.working_set())) == FULL
    second.clone(client, BASE, LENGTH, record=None, replay=True)
    replayed(client, FULL * CHUNK // PAGE)


def test_what_was_asked_for_is_kept_however_little(
    start: Start, make_image: MakeImage, make_victim: MakeVictim
) -> None:
    image = make_image()
    client, victim = start(image), make_victim()
    victim.clone(client, BASE, LENGTH, record=True)
    victim.ask("touch", BASE + 9 * CHUNK)
    stats_when(client, lambda stats: stats.faults == 1)
    end(client, victim, 1)
    assert numbers(client.working_set()) == (slot_of(image, 9),)


def test_little_is_kept_and_the_shutdown_is_not(
    tmp_path: Path, start: Start, make_image: MakeImage, make_victim: MakeVictim
) -> None:
    """What a process that needs little has touched is kept when it is quiet; and the next one goes on with it."""
    trace = tmp_path / "recorded"
    program = f"open({str(trace)!r}, 'a').write('kept\\n')"
    image = make_image(recorder=[sys.executable, "-c", program])
    client = start(image)
    known: tuple[int, ...] = ()
    for times, number in enumerate((3, 12), 1):
        victim = make_victim()
        victim.clone(client, BASE, LENGTH, record=None)
        victim.ask("touch", BASE + number * CHUNK)
        known += (slot_of(image, number),)
        until(lambda times=times: trace.exists() and trace.read_text() == "kept\n" * times, "the recorder")
        assert numbers(client.working_set()) == known
        victim.send("touch", BASE + 20 * CHUNK)  # in order to end
        assert victim.process.stdin
        victim.process.stdin.close()
        victim.process.wait()
        stats_when(client, lambda stats, times=times: stats.spaces_ended == times)
        assert numbers(client.working_set()) == known


def test_reading_for_a_snapshot_is_not_recorded(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    image = make_image()
    client, bystander, victim = start(image), make_victim(), make_victim()
    victim.clone(client, BASE, LENGTH, record=None)
    bystander.clone(client, BASE, LENGTH, record=None)
    victim.ask("touch", BASE + 3 * CHUNK)
    for each, recorded in ((bystander, (3, 4)), (victim, (3, 4))):
        with os.fdopen(os.pidfd_open(each.pid)) as pidfd:
            client.intervals(pidfd.fileno())
        victim.ask("touch", BASE + (4 if each is bystander else 9) * CHUNK)
        stats_when(client, lambda stats, each=each: stats.faults == (2 if each is bystander else 3))
        assert numbers(client.working_set()) == tuple(slot_of(image, number) for number in recorded)


def test_recorded_again(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    """What is new comes behind what is known, from a store or from the recording before."""
    client = start(make_image(working_set=packed(7, written=4)))
    for touched in (3, 12):
        victim = make_victim()
        victim.clone(client, BASE, LENGTH, record=True, replay=True)
        replayed(client, CHUNK // PAGE)
        victim.ask("touch", BASE + touched * CHUNK)
        stats_when(client, lambda stats: stats.spaces[0].service.max_ns > 0)  # the newest; counted after the recording
        client.working_set(end=True)
    assert numbers(client.working_set())[0] == 7
    assert len(numbers(client.working_set())) == 3


def test_children_record_too(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    client, victim = start(make_image()), make_victim()
    victim.clone(client, BASE, LENGTH, record=True)
    victim.fork()
    victim.ask_child("touch", BASE + CHUNK)
    stats_when(client, lambda stats: stats.faults == 1)  # a fault is recorded by its own thread, after the toucher woke
    victim.ask("touch", BASE)
    stats_when(client, lambda stats: stats.faults == 2)
    assert numbers(client.working_set()) == (1, 0)


def test_no_record(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    client, victim = start(make_image()), make_victim()
    victim.clone(client, BASE, LENGTH)
    victim.ask("touch", BASE)
    assert client.working_set(end=True) == b""


def test_from_a_store(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    """A new pager fills what the image names; numbers beyond the index are dropped."""
    image = make_image(working_set=packed(5, 4, 10_000, 0xFFFF_FFFF, 11))
    client, victim = start(image), make_victim()
    stats_when(client, lambda stats: stats.chunks_filled == 3)
    victim.clone(client, BASE, LENGTH, replay=True)
    replayed(client, 3 * CHUNK // PAGE)
    assert numbers(client.working_set()) == (5, 4, 11)
    assert victim.ask("crc", BASE, LENGTH) == str(zlib.crc32(image.raw(BASE, LENGTH)))


def test_a_known_set_is_not_extended(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    """Unless it is small: the next process, whatever it goes on to touch, records nothing. Nobody has looked at the
    part of the index that the set is of when its size is asked for."""
    chunks = {BASE + number * PAGE: pages(number, PAGE) for number in range(16 * INDEX_BLOCK)}
    known = packed(*range(5 * INDEX_BLOCK, 8 * INDEX_BLOCK))  # 1.5 MiB
    client, victim = start(make_image(chunks, working_set=known)), make_victim()
    victim.clone(client, BASE, len(chunks) * PAGE, record=None)
    for number in range(9 * INDEX_BLOCK, 12 * INDEX_BLOCK):
        victim.ask("touch", BASE + number * PAGE)
    victim.process.kill()
    stats_when(client, lambda stats: not stats.spaces)
    assert numbers(client.working_set(end=True)) == numbers(known)


def test_damaged_chunk_in_it(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    """It is left out; who touches it is told by SIGBUS, as ever."""
    image = make_image(working_set=packed(0, 1, 3))
    image.damage(BASE + CHUNK)
    client, victim = start(image), make_victim()
    victim.clone(client, BASE, LENGTH, replay=True)
    replayed(client, 2 * CHUNK // PAGE)
    assert victim.ask("crc", BASE, CHUNK) == str(zlib.crc32(image.raw(BASE, CHUNK)))
    assert victim.ask("touch", BASE + CHUNK) == "SIGBUS"


def test_filled_before_it_is_told(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    image = make_image(working_set=packed(5, 4, 11))
    image.damage(sorted(image.chunks)[4])
    client = start(image)
    assert numbers(client.filled_working_set()) == (5, 11)
    filled = sorted(image.chunks)
    for number in (5, 11):
        at = filled[number]
        assert os.pread(client.template_fd, CHUNK, at) == image.raw(at, CHUNK)
    stats = client.stats()
    assert (stats.chunks_filled, stats.chunks_bad) == (2, 1)


def test_not_told_before_it_is_known(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    image = make_image()
    client, victim = start(image), make_victim()
    victim.clone(client, BASE, LENGTH, record=True)
    victim.ask("touch", BASE)
    stats_when(client, lambda stats: stats.faults == 1)
    assert client.filled_working_set() == b""
    assert client.working_set(end=True) == client.filled_working_set() == packed(0, pages=1)


def test_own_pages_are_left_alone(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    """Those that the working set calls written are not brought: the process has them, or else asks for them."""
    image = make_image(working_set=packed(5, written=0b110))
    client, victim = start(image), make_victim()
    victim.clone(client, BASE, LENGTH, replay=True, own_pages=True)
    replayed(client, CHUNK // PAGE - 2)
    at = sorted(image.chunks)[5]
    assert [page for page in range(CHUNK // PAGE) if not present(victim.pid, at + page * PAGE)] == [1, 2]
    assert victim.ask("crc", at, CHUNK) == str(zlib.crc32(image.raw(at, CHUNK)))


def test_written_pages_come_as_copies(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    image = make_image()
    client, first, second, third = start(image), make_victim(), make_victim(), make_victim()
    first.clone(client, BASE, LENGTH, record=True)
    at = BASE + 3 * CHUNK
    first.ask("touch", at)
    for page in (1, 2, 9):  # page 2 comes with page 1, as they follow one another
        first.ask("poke", at + page * PAGE + 17, 255)
    stats_when(client, lambda stats: stats.faults == 3)
    assert client.working_set(end=True) == packed(slot_of(image, 3), written=0b10_0000_0110, pages=0b10_0000_0111)
    second.clone(client, BASE, LENGTH, replay=True)
    replayed(client, 4)
    own = [page for page in range(16) if anonymous(second.pid, at + page * PAGE)]
    assert own == [1, 2, 9]
    expected = str(zlib.crc32(image.raw(at, CHUNK)))
    assert second.ask("crc", at, CHUNK) == expected
    second.ask("poke", at + PAGE, 254)
    assert second.ask("crc", at, CHUNK) != expected
    third.clone(client, BASE, LENGTH, replay=True)
    replayed(client, 8)
    assert third.ask("crc", at, CHUNK) == expected
    assert client.stats().faults == 5  # the rest of the chunk, once each


def test_what_a_process_that_has_ended_had_written(
    start: Start, make_image: MakeImage, make_victim: MakeVictim
) -> None:
    """Nobody could look at its memory afterwards; the last chunk that it touched was not looked at before."""
    image = make_image()
    client, victim = start(image), make_victim()
    victim.clone(client, BASE, LENGTH, record=True)
    for number, page in ((3, 1), (9, 4), (3, 7)):
        victim.ask("poke", BASE + number * CHUNK + page * PAGE, 255)
    victim.ask("touch", BASE + 12 * CHUNK)
    stats_when(client, lambda stats: stats.faults == 4)
    end(client, victim, 1)
    expected = ((3, 0b1000_0010, 0b1000_0010), (9, 0b1_0000, 0b1_0000), (12, 0, 1))
    assert client.working_set() == b"".join(
        packed(slot_of(image, number), written=written, pages=pages) for number, written, pages in expected
    )


def test_moved_memory_is_not_overwritten(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    """What was dropped, moved or written before the replay gets there stays as the process left it."""
    chunks = [n for n in range(32) if n % 8 not in (2, 5)]
    image = make_image(working_set=packed(*range(len(chunks))))
    client = start(image)
    for _ in range(8):
        victim = make_victim()
        victim.clone(client, BASE, LENGTH, replay=True)
        assert victim.ask("dontneed", BASE, 8 * CHUNK) in ("ok", "0")
        assert victim.ask("crc", BASE, 8 * CHUNK) == str(zlib.crc32(bytes(8 * CHUNK)))
        assert victim.ask("crc", BASE + 8 * CHUNK, CHUNK) == str(zlib.crc32(image.raw(BASE + 8 * CHUNK, CHUNK)))


def test_walk_upwards_is_served_ahead(start: Start, make_image: MakeImage, make_victim: MakeVictim) -> None:
    """Each fault brings twice as much as the one before: chunks, or pages where it is recorded which are touched."""
    image = make_image({BASE + i * CHUNK: bytes([i + 1]) * CHUNK for i in range(32)})
    client = start(image)
    before = 0
    for record, faults in (
        (False, 6),
        (True, 14),
    ):  # at chunks 0, 1, 3, 6, 11, 20; at pages 0, 1, 3, 6, 11, 20, 37, 70, 135, 200 ...
        victim = make_victim()
        victim.clone(client, BASE, LENGTH, record=record)
        assert victim.ask("crc", BASE, LENGTH) == str(zlib.crc32(image.raw(BASE, LENGTH)))
        stats = stats_when(client, lambda stats, n=before + faults: stats.faults >= n)
        assert stats.faults == before + faults
        before = stats.faults
    until(lambda: numbers(client.working_set()) == tuple(range(32)), "all 32 chunks in the recording")
    assert client.working_set() == packed(*range(32), pages=0xFFFF)


def test_recorder_is_run_after_each_recording(
    tmp_path: Path, start: Start, make_image: MakeImage, make_victim: MakeVictim
) -> None:
    trace = tmp_path / "recorded"
    program = f"open({str(trace)!r}, 'a').write('kept\\n')"
    client = start(make_image(recorder=[sys.executable, "-c", program]))
    for times, record in ((1, None), (1, None), (2, True)):
        victim = make_victim()
        victim.clone(client, BASE, LENGTH, record=record)
        victim.ask("touch", BASE)
        stats_when(client, lambda stats: stats.spaces[0].service.max_ns > 0)
        client.working_set(end=True)
        expected = "kept\n" * times
        until(lambda expected=expected: trace.exists() and trace.read_text() == expected, "the recorder")


@pytest.mark.parametrize("fill", ["now", "idle"])
def test_all_of_it(start: Start, make_image: MakeImage, make_victim: MakeVictim, fill: str) -> None:
    """All private memory arrives without a fault; what the process does meanwhile stands."""
    image = make_image()
    client, victim = start(image), make_victim()
    victim.clone(client, BASE, LENGTH, replay=True, fill=fill)
    victim.ask("poke", BASE + 17, 255)
    assert victim.ask("dontneed", BASE + CHUNK, CHUNK) == "ok"
    changed = bytearray(image.raw(BASE, LENGTH))
    changed[17] = 255
    changed[CHUNK : 2 * CHUNK] = bytes(CHUNK)
    stored = [at for at in image.chunks if at != BASE + CHUNK]
    until(lambda: all(present(victim.pid, at + CHUNK - PAGE) for at in stored), "all memory")
    stats = client.stats()
    faults = stats.faults
    assert stats.chunks_filled == FULL
    for number in (3, 9, 31):
        victim.ask("touch", BASE + number * CHUNK)
    assert client.stats().faults == faults
    assert victim.ask("crc", BASE, LENGTH) == str(zlib.crc32(changed))
