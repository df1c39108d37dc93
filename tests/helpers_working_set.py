"""What the tests of the working set share: lists, and which pages a process has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers_pager import CHUNK, PAGE, Image, Victim, stats_when

from lazyrestore.pager import PagerClient, wire

BASE = 0x10_0000_0000
LENGTH = 2 << 20
FULL = 24  # chunks of the image; BASE + 2 * CHUNK is a hole

Start = Callable[..., PagerClient]
MakeImage = Callable[..., Image]
MakeVictim = Callable[[], Victim]


def numbers(working_set: bytes) -> tuple[int, ...]:
    return tuple(chunk for chunk, _, _ in wire.TOUCHED.iter_unpack(working_set))


def packed(*chunks: int, written: int = 0, pages: int = 0) -> bytes:
    return b"".join(wire.TOUCHED.pack(chunk, written, pages) for chunk in chunks)


def slot_of(image: Image, number: int) -> int:
    """Position in the index of the chunk that begins `number` chunks after BASE."""
    return sorted(image.chunks).index(BASE + number * CHUNK)


def replayed(client: PagerClient, pages: int) -> None:
    """Waits until so many pages were brought."""
    stats_when(client, lambda stats: stats.counters.replayed >= pages)


def end(client: PagerClient, victim: Victim, ended: int) -> None:
    """Kills it, and waits until the pager knows; it is the `ended`th whose end it sees."""
    victim.kill()
    stats_when(client, lambda stats: stats.spaces_ended == ended)


def pagemap(pid: int, address: int) -> int:
    """The page's entry of /proc/PID/pagemap."""
    with Path(f"/proc/{pid}/pagemap").open("rb") as file:
        file.seek(address // PAGE * 8)
        return int.from_bytes(file.read(8), "little")


def present(pid: int, address: int) -> bool:
    return bool(pagemap(pid, address) >> 63)


def anonymous(pid: int, address: int) -> bool:
    """Whether the page is present and the process's own, not the template's."""
    return pagemap(pid, address) >> 61 & 0b101 == 0b100
