"""From runs of copied memory to chunks: cut at multiples of the chunk size, gaps filled with zeros, zero pages off the
ends."""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lazyrestore.store.address import address_of
from lazyrestore.store.format import HUGE_CHUNK, PAGE

Run = tuple[int, int, int]  # image address, offset in the buffer, length; bytes, multiples of PAGE

_memcmp = ctypes.CDLL(None).memcmp  # CDLL lets other threads run meanwhile
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_ZEROS = ctypes.create_string_buffer(HUGE_CHUNK)
_ZEROS_AT = ctypes.addressof(_ZEROS)


class Span(NamedTuple):
    """A chunk before its zeros are off: runs that lie between two multiples of the chunk size, sorted, not empty."""

    runs: tuple[Run, ...]

    @property
    def start(self) -> int:
        return self.runs[0][0]

    @property
    def end(self) -> int:
        """Image address, exclusive."""
        return self.runs[-1][0] + self.runs[-1][2]


def check_runs(runs: Sequence[Run], size: int) -> int:
    """The bytes in `runs`, which must be sorted, apart, of whole pages and inside a buffer of `size` bytes; else
    ValueError."""
    end = total = 0
    for address, offset, length in runs:
        if address % PAGE or length % PAGE or length <= 0 or address < end or address + length > 1 << 64:
            raise ValueError(f"run at image address {address:#x}, {length} bytes: not whole pages, or not sorted")
        if offset < 0 or offset + length > size:
            raise ValueError(f"run at image address {address:#x}: outside the buffer")
        end = address + length
        total += length
    return total


def cut(runs: Sequence[Run], chunk_size: int, apart: Sequence[int] = ()) -> Iterator[Span]:
    """The runs, cut at multiples of `chunk_size` and grouped between them. Runs that adjoin in both places are joined.

    apart: image addresses, sorted, at which something lies that is in no run: runs on both sides of it stay apart.
    """
    group: list[Run] = []
    border = 0  # end of the group's chunk
    for address, offset, length in runs:
        while length:
            if address >= border or (group and _between(apart, group[-1][0] + group[-1][2], address)):
                if group:
                    yield Span(tuple(group))
                    group = []
                border = (address // chunk_size + 1) * chunk_size
            part = min(length, border - address)
            if group and group[-1][0] + group[-1][2] == address and group[-1][1] + group[-1][2] == offset:
                group[-1] = (group[-1][0], group[-1][1], group[-1][2] + part)
            else:
                group.append((address, offset, part))
            address, offset, length = address + part, offset + part, length - part
    if group:
        yield Span(tuple(group))


def _between(places: Sequence[int], low: int, high: int) -> bool:
    """Whether one of the sorted `places` lies in [low, high)."""
    if low == high or not places:
        return False
    at = bisect_left(places, low)
    return at < len(places) and places[at] < high


class Source:
    """The buffer that the runs point into. Held until close(); a context manager."""

    def __init__(self, buffer: memoryview) -> None:
        self._view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer[:]
        self._address = address_of(self._view)

    def content(self, span: Span) -> tuple[int, memoryview | bytes]:
        """(image address, bytes) of a chunk without zero pages at its ends; no bytes if it is all zero.

        A huge page stays whole: it can only arrive in one piece.
        """
        if len(span.runs) == 1:
            address, offset, length = span.runs[0]
            first, last = self._nonzero(offset, length)
            if last and length == HUGE_CHUNK:
                first, last = 0, length
            return address + first, self._view[offset + first : offset + last]
        start = span.start
        gathered = bytearray(span.end - start)
        for address, offset, length in span.runs:
            gathered[address - start : address - start + length] = self._view[offset : offset + length]
        content = bytes(gathered)
        first = (len(content) - len(content.lstrip(b"\0"))) // PAGE * PAGE
        last = -(-len(content.rstrip(b"\0")) // PAGE) * PAGE
        if last and len(content) == HUGE_CHUNK:
            first, last = 0, len(content)
        return start + first, content[first:last]

    def _nonzero(self, offset: int, length: int) -> tuple[int, int]:
        """Where the first and behind the last page that is not zero lie, from `offset`; (0, 0) if there is none."""
        at = self._address + offset
        first, last = 0, length
        if not _memcmp(at, _ZEROS_AT, PAGE):
            if not _memcmp(at, _ZEROS_AT, length):
                return 0, 0
            first = PAGE
            while not _memcmp(at + first, _ZEROS_AT, PAGE):
                first += PAGE
        while not _memcmp(at + last - PAGE, _ZEROS_AT, PAGE):
            last -= PAGE
        return first, last

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._view.release()
