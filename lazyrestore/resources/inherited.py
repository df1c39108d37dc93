"""Memory of a restored process that is still what its parent snapshot holds: it is referred to and not read.

Facts. A lazily restored page is one of four things. The process's own: it was written, and pagemap shows an anonymous
or swapped page. The kernel's zero page: it is zero (the pager put it there, or KSM did). A page of the template. Or
absent: touched never, or not since it was dropped. The last two show what the pager's interval for the address says:
the image, or zero. The pager's word holds as long as the process stands still, because every call that changes it waits
for the pager to hear of it.
Consequence. Whether a page is the process's own is the kernel's to say, what the others show is the pager's; neither
suffices alone. A mapping that the pager does not serve (the kernel says so, in its VmFlags) is none of these.
Choice. Pages are *inherited* when both agree, and the mapping's own file offset says the same; where any of the three
does not fit, the page is read, which is always right. A chunk of the parent of which all pages are inherited, at one
distance, or not there any more (unmapped, or mapped by what takes nothing from the image) is referred to; of any other
chunk, the inherited pages are read. What is inherited and in no chunk is zero.
Shared memory is written in place: of it, only what nobody has touched counts.
Cost. Three scans of the page tables for each mapping.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import msgspec
from msgspec.structs import replace

from lazyrestore._native import _core
from lazyrestore.kernel.procfs import Mapping

lib = _core.lib

Ranges = list[tuple[int, int]]  # (start, end), end exclusive; sorted and apart
Scan = Callable[[int, int, int], Ranges]  # start, end, lib.LR_PAGES_…: the ranges of such pages

OBJECT_SPAN = 1 << 47  # image addresses per shared object
TEMPLATE, HUGETLB, SHARED = 0, 1, 2  # the pager's numbers of its backings; shared object k is SHARED + k
SERVED = {"um", "ui"}  # VmFlags of a mapping whose absent pages a pager brings: registered MISSING and MINOR


class Interval(Protocol):
    """What addresses [start, end) show where they were never written: the image from `image` on, or zero."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def image(self) -> int: ...
    @property
    def backing(self) -> int:
        """TEMPLATE, HUGETLB, or SHARED + k: shared object k."""

    @property
    def zero(self) -> bool: ...


class Chunks(Protocol):
    """Where the parent has something; addresses are image addresses."""

    def at(self, address: int) -> tuple[int, int] | None:
        """Start and end of the chunk that holds `address`."""

    def stored(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, end) that lie in chunks."""


class Piece(msgspec.Struct, frozen=True):
    """`length` inherited bytes at `address` of the process, which the new snapshot will have at image address `image`
    and the parent has at `source`."""

    image: int
    address: int
    length: int
    source: int
    mapping: Mapping

    @property
    def end(self) -> int:
        """Image address, exclusive."""
        return self.image + self.length

    @property
    def huge(self) -> bool:
        return "ht" in self.mapping.flags

    @property
    def distance(self) -> tuple[int, bool]:
        """From image addresses of the new snapshot to those of the parent, and whether in huge pages: pieces that
        agree on both can lie in one chunk."""
        return self.source - self.image, self.huge

    def part(self, start: int, end: int) -> Piece:
        """What of it lies at image addresses [start, end)."""
        low, high = max(start, self.image), min(end, self.end)
        by = low - self.image
        return replace(self, image=low, address=self.address + by, source=self.source + by, length=high - low)


class Origin:
    """What is known of where a process, which stands still, came from.

    templates: (device, inode) of the parent's template and hugetlb template; intervals: sorted by start.
    """

    def __init__(self, chunks: Chunks, templates: Sequence[tuple[int, int]], intervals: Sequence[Interval]) -> None:
        self.chunks = chunks
        self._templates = templates
        self._intervals = intervals
        self._ends = [interval.end for interval in intervals]

    def serves(self, m: Mapping) -> bool:
        """Whether the pager answers for this mapping."""
        if not set(m.flags) >= SERVED:
            return False
        return m.shared or m.file in self._templates

    def divide(self, m: Mapping, start: int, end: int, shift: int, scan: Scan) -> tuple[Ranges, list[Piece]]:
        """What of addresses [start, end) of a mapping that is served must be read, and what is inherited; the rest is
        zero. shift: from addresses to image addresses of the new snapshot."""
        inherited: Ranges = []
        unclear: Ranges = []
        source = {}
        for low, high, at, interval in self._in(start, end):
            if interval.zero:
                continue
            if self._fits(m, interval, low, at):
                inherited.append((low, high))
                source[low] = at
            else:
                unclear.append((low, high))
        if m.shared:
            read, pages = without([(start, end)], inherited), inherited
        else:
            strange = without(scan(start, end, lib.LR_PAGES_OF_FILE), inherited)
            read = union(unclear, scan(start, end, lib.LR_PAGES_OWN), strange)
            pages = without(inherited, union(read, scan(start, end, lib.LR_PAGES_ZERO)))
        begins = [low for low, _ in inherited]
        pieces = []
        for low, high in pages:
            begin = begins[bisect_right(begins, low) - 1]
            pieces.append(Piece(low + shift, low, high - low, source[begin] + low - begin, m))
        return read, pieces

    def _in(self, start: int, end: int) -> Iterator[tuple[int, int, int, Interval]]:
        """(start, end, image address of it) of each interval's part, and the interval."""
        for number in range(bisect_right(self._ends, start), len(self._intervals)):
            interval = self._intervals[number]
            if interval.start >= end:
                break
            low, high = max(start, interval.start), min(end, interval.end)
            yield low, high, interval.image + low - interval.start, interval

    def _fits(self, m: Mapping, interval: Interval, address: int, image: int) -> bool:
        """Whether the mapping's file and offset say what the interval says: offsets into a template are image
        addresses."""
        if m.shared:
            expected, base = interval.backing >= SHARED, (interval.backing - SHARED + 1) * OBJECT_SPAN
        else:
            expected, base = interval.backing == (HUGETLB if "ht" in m.flags else TEMPLATE), 0
        return expected and image - base == m.offset + address - m.start


class Settled(msgspec.Struct, frozen=True):
    """pieces: to be read; references, and those to huge pages: (image address, end, image address in the parent)."""

    pieces: list[Piece]
    references: list[tuple[int, int, int]]
    huge: list[tuple[int, int, int]]


def settle(pieces: Iterable[Piece], taken: Ranges, used: Ranges, chunks: Chunks) -> Settled:
    """What becomes of inherited pieces; what of them is in no chunk is zero.

    Both are image addresses, sorted and apart; taken: what is read anyway; used: what a restored process will be shown
    as it is in the image, so that no chunk may hold anything else there.
    """
    zones = list(_zones(pieces, taken))
    settling = _Settling(chunks, union(taken, used), {})
    for zone in zones:
        settling.alike.setdefault(zone[0].distance, []).append((zone[0].image, zone[-1].end))
    for zone in zones:
        settling.add(zone)
    return settling.settled


class _Settling(msgspec.Struct):
    """Zones, in order, to references. alike: the zones' image addresses by distance; limit: where the last reference
    ends; last: the chunk (image address, end, distance) that it ends with, if that goes beyond its zone."""

    chunks: Chunks
    occupied: Ranges
    alike: dict[tuple[int, bool], Ranges]
    settled: Settled = msgspec.field(default_factory=lambda: Settled([], [], []))
    limit: int = 0
    last: tuple[int, int, tuple[int, bool]] | None = None

    def add(self, zone: list[Piece]) -> None:
        distance = zone[0].distance
        start, end = first, last = zone[0].image, zone[-1].end
        low, high = self._chunk_across(start, distance), self._chunk_across(end, distance)
        if low is not None:
            first = self._take(*low, distance)
            if first > low[0] and self.last != (*low, distance):
                self._read(zone, start, min(first, end))
        if high is not None and high != low:
            last = high[1] if self._is_free(*high, distance) else high[0]
            if last == high[1]:
                self.last = (*high, distance)
            else:
                self._read(zone, last, end)
        elif high is not None:
            last = high[1] if first == high[0] else first
        shift = distance[0]
        if first < last and any(True for _ in self.chunks.stored(first + shift, last + shift)):
            references = self.settled.huge if zone[0].huge else self.settled.references
            references.append((first, last, first + shift))
            self.limit = last

    def _take(self, start: int, end: int, distance: tuple[int, bool]) -> int:
        """Where a zone's references begin that has this chunk across its start: with it, or behind it."""
        if self.last == (start, end, distance) or self.limit > start or not self._is_free(start, end, distance):
            return end
        self.last = (start, end, distance)
        return start

    def _chunk_across(self, address: int, distance: tuple[int, bool]) -> tuple[int, int] | None:
        """The chunk that begins before image address `address` and ends behind it."""
        found = self.chunks.at(address + distance[0])
        if found is None or found[0] == address + distance[0]:
            return None
        return found[0] - distance[0], found[1] - distance[0]

    def _is_free(self, start: int, end: int, distance: tuple[int, bool]) -> bool:
        """Whether the process shows nothing in [start, end) but what is inherited at this distance."""
        return not without(within(self.occupied, start, end), within(self.alike[distance], start, end))

    def _read(self, zone: list[Piece], start: int, end: int) -> None:
        for low, high in within([(piece.image, piece.end) for piece in zone], start, end):
            piece = next(piece for piece in zone if piece.image <= low < piece.end)
            self.settled.pieces.append(piece.part(low, high))


def _zones(pieces: Iterable[Piece], taken: Ranges) -> Iterator[list[Piece]]:
    """Pieces that continue one another, here and in the parent, without what is taken; each image address once."""
    zone: list[Piece] = []
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece.image):
        start = max(piece.image, end)
        end = max(end, piece.end)
        for low, high in without([(start, piece.end)] if start < piece.end else [], taken):
            part = piece.part(low, high)
            if zone and (zone[-1].end, zone[-1].distance) != (part.image, part.distance):
                yield zone
                zone = []
            zone.append(part)
    if zone:
        yield zone


# -- ranges ------------------------------------------------------------------------------------------------------------


def union(*several: Ranges) -> Ranges:
    """All of them."""
    result: Ranges = []
    for start, end in sorted(each for ranges in several for each in ranges):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def within(ranges: Ranges, start: int, end: int) -> Ranges:
    """What of `ranges`, which are sorted and apart, lies in [start, end)."""
    result: Ranges = []
    for number in range(bisect_right(ranges, start, key=lambda each: each[1]), len(ranges)):
        low, high = ranges[number]
        if low >= end:
            break
        result.append((max(low, start), min(high, end)))
    return result


def without(ranges: Ranges, others: Ranges) -> Ranges:
    """What of `ranges` is in none of `others`, which are sorted and apart."""
    result: Ranges = []
    ends = [end for _, end in others]
    for start, end in ranges:
        at = start
        for number in range(bisect_right(ends, start), len(others)):
            low, high = others[number]
            if low >= end:
                break
            if at < low:
                result.append((at, low))
            at = high
        if at < end:
            result.append((at, end))
    return result
