"""What a snapshot of a copy reads, refers to and takes for zero, against a model that looks at one page at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from lazyrestore._native import _core
from lazyrestore.kernel.procfs import Mapping
from lazyrestore.pager import BACKING_HUGETLB, BACKING_SHARED, BACKING_TEMPLATE, Interval
from lazyrestore.resources.inherited import HUGETLB, SHARED, TEMPLATE, Origin, Ranges, settle, union, within, without

lib = _core.lib

PAGE = 4096
PAGES = 24
ABSENT, OWN, ZERO, FILE = range(4)
KINDS = {lib.LR_PAGES_OWN: OWN, lib.LR_PAGES_ZERO: ZERO, lib.LR_PAGES_OF_FILE: FILE}


def test_the_numbers_are_the_pagers() -> None:
    assert (TEMPLATE, HUGETLB, SHARED) == (BACKING_TEMPLATE, BACKING_HUGETLB, BACKING_SHARED)


@dataclass
class Chunks:
    """The parent's chunks as sets of pages."""

    places: list[tuple[int, int]]

    def stored(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for low, high in self.places:
            if low < end and start < high:
                yield max(start, low), min(end, high)

    def at(self, address: int) -> tuple[int, int] | None:
        return next(((low, high) for low, high in self.places if low <= address < high), None)


@dataclass
class World:
    """A process of a few mappings, its page table, and what the pager and the parent have. All in pages."""

    mappings: list[tuple[int, int, int]] = field(default_factory=list)  # start, end, offset
    intervals: list[tuple[int, int, int, bool]] = field(default_factory=list)  # start, end, image, zero
    table: list[int] = field(default_factory=list)  # of each page
    chunks: list[tuple[int, int]] = field(default_factory=list)

    def parent(self, page: int) -> str:
        return f"p{page}" if any(low <= page < high for low, high in self.chunks) else ""

    def truth(self, page: int, offset: int) -> str:
        """What a read of a mapped page gives; `offset`: of the template, at this page."""
        state = self.table[page]
        if state != ABSENT:
            return {OWN: f"w{page}", ZERO: "", FILE: self.parent(offset)}[state]
        for start, end, image, zero in self.intervals:
            if start <= page < end and not zero:
                return self.parent(image + page - start)
        return ""

    def scan(self, start: int, end: int, kind: int) -> Ranges:
        pages = range(start // PAGE, end // PAGE)
        return union([(p * PAGE, (p + 1) * PAGE) for p in pages if self.table[p] == KINDS[kind]])


def cuts(draw: st.DrawFn, end: int = PAGES) -> list[tuple[int, int]]:
    """Ranges between a few sorted places, some of them left out."""
    places = sorted(draw(st.sets(st.integers(0, end), min_size=2, max_size=8)))
    keep = draw(st.lists(st.integers(0, 3), min_size=len(places), max_size=len(places)))
    return [(a, b) for a, b, kept in zip(places, places[1:], keep, strict=False) if kept]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    world = World(
        table=draw(st.lists(st.sampled_from([ABSENT] * 6 + [OWN, ZERO, FILE]), min_size=PAGES, max_size=PAGES))
    )
    moved = draw(st.sampled_from([0, 0, 0, 1, 4, 7]))
    world.chunks = cuts(draw, PAGES + 8)
    for start, end in cuts(draw):
        shift = draw(st.sampled_from([moved] * 4 + [0]))
        world.intervals.append((start, end, start + shift, draw(st.integers(0, 3)) == 0))
    for start, end in cuts(draw):
        world.mappings.append((start, end, start + draw(st.sampled_from([moved] * 4 + [0]))))
    return world


@settings(max_examples=600, deadline=None)
@given(world=worlds(), elsewhere=st.sets(st.integers(0, PAGES - 1), max_size=3))
def test_every_page_is_what_a_read_would_give(world: World, elsewhere: set[int]) -> None:
    """`elsewhere`: pages in no mapping of the template that hold other content."""
    chunks = Chunks([(low * PAGE, high * PAGE) for low, high in world.chunks])
    intervals = [
        Interval(start * PAGE, end * PAGE, image * PAGE, TEMPLATE, zero) for start, end, image, zero in world.intervals
    ]
    origin = Origin(chunks, [(0, 7)], intervals)
    reads: Ranges = []
    pieces = []
    expected: dict[int, str] = {}
    for start, end, offset in world.mappings:
        m = Mapping(
            start * PAGE, end * PAGE, True, True, False, False, offset * PAGE, "00:00", 7, "/memfd:lazyrestore", True,
            ("rd", "um", "ui"),
        )  # fmt: skip
        assert origin.serves(m)
        read, inherited = origin.divide(m, m.start, m.end, 0, world.scan)
        reads += read
        pieces += inherited
        expected |= {page: world.truth(page, offset + page - start) for page in range(start, end)}
    for page in elsewhere - expected.keys():
        expected[page] = f"e{page}"
        reads.append((page * PAGE, (page + 1) * PAGE))
    used = [(start * PAGE, end * PAGE) for start, end, _ in world.mappings]
    settled = settle(pieces, union(reads), used, chunks)
    image: dict[int, str] = {}
    for low, high in [*reads, *((piece.address, piece.address + piece.length) for piece in settled.pieces)]:
        for page in range(low // PAGE, high // PAGE):
            assert page not in image
            image[page] = expected[page]
    for low, high, source in settled.references:
        for a, b in chunks.stored(source, source + high - low):
            assert chunks.at(a) == (a, b)  # whole
            assert expected.keys() & range((a - source + low) // PAGE, (b - source + low) // PAGE)  # of some use
        for page in range(low // PAGE, high // PAGE):
            assert page not in image
            image[page] = world.parent(source // PAGE + page - low // PAGE)
    assert {p: image.get(p, "") for p in expected} == expected
    assert not settled.huge


def test_nothing_untouched_is_read() -> None:
    chunks = Chunks([(0, 4 * PAGE), (6 * PAGE, 7 * PAGE)])
    origin = Origin(chunks, [(0, 7)], [Interval(0, 9 * PAGE, 0, TEMPLATE, zero=False)])
    halves = [
        Mapping(a * PAGE, b * PAGE, True, w, False, False, a * PAGE, "00:00", 7, "", True, ("um", "ui"))
        for a, b, w in ((0, 2, False), (2, 9, True))
    ]
    pieces = []
    for m in halves:
        read, inherited = origin.divide(m, m.start, m.end, 0, lambda *_: [])
        assert not read
        pieces += inherited
    settled = settle(pieces, [], [(0, 9 * PAGE)], chunks)
    assert (settled.pieces, settled.references) == ([], [(0, 9 * PAGE, 0)])


def test_a_chunk_with_a_hole_is_referred_to_unless_something_else_is_there() -> None:
    """Two of its pages are unmapped: if the image is shown there, to another mapping, it is read."""
    chunks = Chunks([(0, 4 * PAGE)])
    origin = Origin(
        chunks, [(0, 7)], [Interval(a * PAGE, b * PAGE, a * PAGE, TEMPLATE, False) for a, b in ((0, 1), (3, 4))]
    )
    pieces = []
    for a, b in ((0, 1), (3, 4)):
        m = Mapping(a * PAGE, b * PAGE, True, True, False, False, a * PAGE, "00:00", 7, "", True, ("um", "ui"))
        pieces += origin.divide(m, m.start, m.end, 0, lambda *_: [])[1]
    mapped = [(0, PAGE), (3 * PAGE, 4 * PAGE)]
    settled = settle(pieces, [], mapped, chunks)
    assert (settled.pieces, settled.references) == ([], [(0, 4 * PAGE, 0)])
    for taken, used in (([(PAGE, 2 * PAGE)], mapped), ([], union(mapped, [(PAGE, 2 * PAGE)]))):
        settled = settle(pieces, taken, used, chunks)
        assert ([piece.address for piece in settled.pieces], settled.references) == ([0, 3 * PAGE], [])


def test_a_mapping_that_no_pager_serves_has_nothing_inherited() -> None:
    origin = Origin(Chunks([]), [(0, 7)], [])
    for inode, flags in ((7, ("um",)), (7, ("ui",)), (7, ()), (8, ("um", "ui"))):
        assert not origin.serves(Mapping(0, PAGE, True, True, False, False, 0, "00:00", inode, "", True, flags))


RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=6).map(
    lambda pairs: union([(start, start + length) for start, length in pairs])
)


@given(a=RANGES, b=RANGES)
def test_ranges(a: Ranges, b: Ranges) -> None:
    def members(ranges: Ranges) -> set[int]:
        return {n for start, end in ranges for n in range(start, end)}

    assert members(union(a, b)) == members(a) | members(b)
    assert members(without(a, b)) == members(a) - members(b)
    assert members(within(a, 7, 20)) == members(a) & set(range(7, 20))
    assert all(start < end for ranges in (without(a, b), within(a, 7, 20)) for start, end in ranges)
