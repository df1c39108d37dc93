"""From runs of copied memory to chunks: cut at multiples of the chunk size, gaps filled with zeros, zero pages off the
ends."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lazyrestore._native import _core
from lazyrestore.store.address import contents_of
from lazyrestore.store.format import PAGE

lib, ffi = _core.lib, _core.ffi

Run = tuple[int, int, int]  # image address, offset in the buffer, length; bytes, multiples of PAGE


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
    """The buffer that the runs point into. Held until close()."""

    def __init__(self, buffer: memoryview) -> None:
        self._view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer[:]

    def contents(self, batch: Sequence[Span]) -> list[tuple[int, memoryview]]:
        """(image address, bytes) of each chunk without zero pages at its ends, except those that are all zero.

        A huge page stays whole: it can only arrive in one piece.
        """
        views = [self._whole(span) for span in batch]
        pieces = contents_of(views)
        before = pieces[::2]
        with ffi.from_buffer("struct lr_content[]", pieces) as found:
            lib.lr_trim_zeros(found, len(batch))
        result = []
        for number, (span, view) in enumerate(zip(batch, views, strict=True)):
            first, length = pieces[2 * number] - before[number], pieces[2 * number + 1]
            if length:
                result.append((span.start + first, view[first : first + length]))
        return result

    def _whole(self, span: Span) -> memoryview:
        """A chunk's bytes, with zeros where no run is."""
        if len(span.runs) == 1:
            _, offset, length = span.runs[0]
            return self._view[offset : offset + length]
        start = span.start
        gathered = bytearray(span.end - start)
        for address, offset, length in span.runs:
            gathered[address - start : address - start + length] = self._view[offset : offset + length]
        return memoryview(gathered)

    def close(self) -> None:
        self._view.release()
