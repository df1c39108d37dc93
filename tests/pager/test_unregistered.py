"""Shared memory whose file is complete when a process attaches needs no serving: it is not registered, so that nothing
done to it raises an event or a fault. The oracles: the pager's counters, and the kernel's flags of the mapping."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_pager import CHUNK, PAGE, Image, Victim, pages, shared_address, shared_backing

from lazyrestore.pager import BACKING_TEMPLATE, PagerClient, Range

pytestmark = pytest.mark.requires("root")

AT = 0x30_0000_0000
ELSEWHERE = 0x40_0000_0000
SIZE = 8 * CHUNK
SHARED = shared_address(0)
EMPTY = shared_address(1)
PRIVATE = 0x20_0000_0000


@pytest.fixture
def image(make_image: Callable[..., Image]) -> Image:
    return make_image({SHARED + i * CHUNK: pages(i) for i in (0, 1, 3, 6)} | {PRIVATE: pages(9)})


@pytest.fixture
def client(start: Callable[..., PagerClient], image: Image) -> PagerClient:
    return start(image)


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 2 * SIZE)
    yield fd
    os.close(fd)


Attach = Callable[..., Victim]


@pytest.fixture
def attached(client: PagerClient, memfd: int, make_victim: Callable[[], Victim]) -> Attach:
    """A process with all of the memory file at AT, and private memory beside it."""

    def attach(address: int = SHARED, *, eager: bool = False, fill: str = "none") -> Victim:
        victim = make_victim()
        victim.map(AT, SIZE, victim.open(f"/proc/{os.getpid()}/fd/{memfd}"), 0, shared=True)
        victim.map(PRIVATE, CHUNK, victim.open(f"/proc/{os.getpid()}/fd/{client.template_fd}"), PRIVATE)
        number = address // SHARED - 1
        ranges = [
            Range(PRIVATE, PRIVATE + CHUNK, PRIVATE, BACKING_TEMPLATE),
            Range(AT, AT + SIZE, address, shared_backing(number)),
        ]
        victim.attach(client, ranges, {number: memfd}, eager=eager, fill=fill)
        return victim

    return attach


def registered(victim: Victim, address: int) -> bool:
    """Whether the mapping that begins at `address` has a userfaultfd, by /proc/PID/smaps."""
    lines = Path(f"/proc/{victim.pid}/smaps").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"{address:x}-"))
    flags = next(line for line in lines[first:] if line.startswith("VmFlags:"))
    return bool({"um", "ui"} & set(flags.split()))


def crc(raw: bytes | bytearray) -> str:
    return str(zlib.crc32(raw))


def work_on(victim: Victim, image: Image) -> None:
    """Calls of every kind on the shared memory, with contents compared after each."""
    expected = bytearray(image.raw(SHARED, 2 * SIZE))
    assert victim.ask("punch", AT + 3 * CHUNK, PAGE) == "ok"
    expected[3 * CHUNK : 3 * CHUNK + PAGE] = bytes(PAGE)
    assert victim.ask("poke", AT + 2 * CHUNK, 7) == "ok"
    expected[2 * CHUNK] = 7
    assert victim.ask("crc", AT, SIZE) == crc(expected[:SIZE])
    assert victim.ask("dontneed", AT, SIZE) == "ok"
    assert victim.ask("crc", AT, SIZE) == crc(expected[:SIZE])
    assert victim.ask("remap", AT, SIZE, SIZE, ELSEWHERE) == "ok"
    assert victim.ask("grow", ELSEWHERE, SIZE, SIZE + CHUNK) == "ok"
    assert victim.ask("crc", ELSEWHERE, SIZE + CHUNK) == crc(expected[: SIZE + CHUNK])
    assert victim.ask("munmap", ELSEWHERE + CHUNK, CHUNK) == "ok"
    victim.fork()
    assert victim.ask_child("crc", ELSEWHERE, CHUNK) == crc(expected[:CHUNK])
    assert victim.ask_child("poke", ELSEWHERE, 9) == "ok"
    assert victim.ask("crc", ELSEWHERE, CHUNK) == crc(bytes([9]) + expected[1:CHUNK])


def costs(client: PagerClient) -> list[int]:
    """Faults, remaps, removes, unmaps of the process that was attached."""
    counters = next(space.counters for space in client.stats().spaces if space.generation == 0)
    return [counters.missing + counters.minor, counters.remaps, counters.removes, counters.unmaps]


@pytest.mark.parametrize("how", [{"eager": True}, {"fill": "now"}])
def test_complete_memory_is_not_registered(
    image: Image, client: PagerClient, attached: Attach, how: dict[str, bool | str]
) -> None:
    victim = attached(**how)
    assert not registered(victim, AT)
    assert registered(victim, PRIVATE)
    work_on(victim, image)
    assert costs(client) == [0] * 4
    assert victim.ask("crc", PRIVATE, CHUNK) == crc(image.raw(PRIVATE, CHUNK))


def test_incomplete_memory_is_served(image: Image, client: PagerClient, attached: Attach) -> None:
    """The same calls, so that the counters above are known to count."""
    victim = attached()
    assert registered(victim, AT)
    victim.ask("crc", AT, SIZE)
    work_on(victim, image)
    assert all(cost > 0 for cost in costs(client))


def test_a_second_process_of_a_tree(image: Image, client: PagerClient, attached: Attach) -> None:
    """The first has touched all of it, and goes on to be served; the second does not need to be."""
    first = attached()
    assert first.ask("crc", AT, SIZE) == crc(image.raw(SHARED, SIZE))
    second = attached()
    assert registered(first, AT)
    assert not registered(second, AT)
    assert second.ask("punch", AT, CHUNK) == "ok"
    assert second.ask("poke", AT + 1, 5) == "ok"
    assert first.ask("crc", AT, CHUNK) == second.ask("crc", AT, CHUNK) == crc(bytes([0, 5]) + bytes(CHUNK - 2))


def test_memory_without_content(client: PagerClient, attached: Attach) -> None:
    victim = attached(EMPTY)
    assert not registered(victim, AT)
    assert victim.ask("crc", AT, SIZE) == crc(bytes(SIZE))
    assert costs(client) == [0] * 4


def test_a_damaged_chunk_leaves_it_registered(image: Image, client: PagerClient, attached: Attach) -> None:
    image.damage(SHARED + 3 * CHUNK)
    victim = attached(fill="now")
    assert registered(victim, AT)
    assert victim.ask("touch", AT + 3 * CHUNK) == "SIGBUS"
    assert victim.ask("crc", AT, 3 * CHUNK) == crc(image.raw(SHARED, 3 * CHUNK))
