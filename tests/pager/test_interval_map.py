"""interval_map.c against a dictionary of pages."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

SOURCE = Path(__file__).parents[2] / "lazyrestore/_native/pager/interval_map.c"
PAGES = 64
MORE = int(os.environ.get("LAZYRESTORE_FUZZ", "1"))  # times as many examples
IMAGE = 1 << 20
BLOCK, SMALL_BLOCK = 1024, 128  # bytes; of 128, one holds 4 intervals or 8 entries


class Interval(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("image", ctypes.c_uint64),
        ("backing", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class Map(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ["capacity", "used", "free", "levels", "count"]),
    )


# Memory that can be refused.
ALLOCATE = """
#include <stddef.h>
int refuse;
void *__real_malloc(size_t size);
void *__real_realloc(void *old, size_t size);
void *__wrap_malloc(size_t size) { return refuse ? NULL : __real_malloc(size); }
void *__wrap_realloc(void *old, size_t size) { return refuse ? NULL : __real_realloc(old, size); }
"""


def build(folder: Path, block: int) -> ctypes.CDLL:
    """The map with blocks of so many bytes."""
    (folder / "allocate.c").write_text(ALLOCATE)
    sources, target = [SOURCE, folder / "allocate.c"], folder / "interval_map.so"
    flags = ["-Wall", "-Wextra", "-Werror", f"-DINTERVAL_MAP_BLOCK={block}", "-Wl,--wrap=malloc,--wrap=realloc"]
    subprocess.run(["cc", "-O1", "-g", "-std=gnu11", *flags, "-shared", "-fPIC", *sources, "-o", target], check=True)
    lib = ctypes.CDLL(str(target))
    u64, pointer = ctypes.c_uint64, ctypes.POINTER(Map)
    lib.interval_map_insert.argtypes = [pointer, Interval]
    lib.interval_map_erase.argtypes = [pointer, u64, u64]
    lib.interval_map_move.argtypes = [pointer, u64, u64, u64]
    for name in ("find", "before", "next"):
        function = getattr(lib, f"interval_map_{name}")
        function.argtypes = [pointer, u64, ctypes.POINTER(Interval)]
        function.restype = ctypes.c_bool
    lib.interval_map_flagged.argtypes = [pointer, u64, ctypes.c_uint32, ctypes.POINTER(Interval)]
    lib.interval_map_flagged.restype = ctypes.c_bool
    return lib


@pytest.fixture(scope="session", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    Machine.lib = build(tmp_path_factory.mktemp("interval_map"), BLOCK)
    MachineOfSmallBlocks.lib = build(tmp_path_factory.mktemp("small_blocks"), SMALL_BLOCK)
    return Machine.lib


def blocks(map_: Map, size: int) -> int:
    """How many blocks of `size` bytes the tree has, each as its entry says; none is lost."""
    memory = ctypes.string_at(map_.blocks, map_.used * size)

    def check(entry: tuple[int, int, int, int], level: int) -> int:
        start, block, count, flags = entry
        leaf = level == map_.levels
        layout = struct.Struct("QQQII" if leaf else "QIHH")
        items = list(layout.iter_unpack(memory[block * size : block * size + count * layout.size]))
        assert len(items) == count
        assert count > (0 if level else map_.levels > 0)
        assert start == items[0][0]
        assert [item[0] for item in items] == sorted({item[0] for item in items})
        union = 0
        for item in items:
            union |= item[-1]
        assert flags == union
        if leaf:
            return 1
        return 1 + sum(check(item, level + 1) for item in items)

    root = struct.unpack_from("QIHH", memory)
    found = check(root, 0) if map_.count else 1
    free, chained = map_.free, 0
    while free:
        (free,) = struct.unpack_from("I", memory, free * size + 8)
        chained += 1
    assert 1 + found + chained == map_.used <= map_.capacity
    return found


Page = tuple[int, int, int]  # image page, backing, flags


class Machine(RuleBasedStateMachine):
    """The model maps each page to what its interval says of it."""

    lib: ctypes.CDLL
    block = BLOCK

    @initialize()
    def begin(self) -> None:
        self.map = Map()
        self.lib.interval_map_init(ctypes.byref(self.map))
        self.model: dict[int, Page] = {}

    def teardown(self) -> None:
        if hasattr(self, "map"):
            self.lib.interval_map_deinit(ctypes.byref(self.map))

    @rule(
        start=st.integers(0, PAGES - 1),
        length=st.integers(1, 12),
        image=st.one_of(st.none(), st.integers(0, 5)),
        backing=st.integers(0, 1),
        flags=st.integers(0, 1),
    )
    def insert(self, start: int, length: int, image: int | None, backing: int, flags: int) -> None:
        first = start if image is None else image * PAGES
        interval = Interval(start, start + length, IMAGE + first, backing, flags)
        assert self.lib.interval_map_insert(ctypes.byref(self.map), interval) == 0
        self.model |= {start + i: (IMAGE + first + i, backing, flags) for i in range(length)}

    @rule(start=st.integers(0, PAGES), length=st.integers(1, 20))
    def erase(self, start: int, length: int) -> None:
        assert self.lib.interval_map_erase(ctypes.byref(self.map), start, start + length) == 0
        for page in range(start, start + length):
            self.model.pop(page, None)

    @rule(old=st.integers(0, PAGES), new=st.integers(0, PAGES), length=st.integers(1, 20))
    def move(self, old: int, new: int, length: int) -> None:
        assert self.lib.interval_map_move(ctypes.byref(self.map), old, new, length) == 0
        moved = {new + i: self.model.pop(old + i) for i in range(length) if old + i in self.model}
        for page in range(new, new + length):
            self.model.pop(page, None)
        self.model |= moved

    @rule(start=st.integers(0, PAGES), stride=st.integers(2, 3), flags=st.integers(0, 3))
    def comb(self, start: int, stride: int, flags: int) -> None:
        """Enough intervals for blocks to part."""
        for page in range(start, PAGES, stride):
            self.insert(page, 1, 0, 0, flags)

    @rule(start=st.integers(0, PAGES), length=st.integers(1, 12), to=st.integers(0, PAGES))
    def refuse_memory(self, start: int, length: int, to: int) -> None:
        """Whole, or not begun."""
        copy = Map()
        self.lib.interval_map_init(ctypes.byref(copy))
        refuse = ctypes.c_int.in_dll(self.lib, "refuse")
        refuse.value = 1
        copied = self.lib.interval_map_copy(ctypes.byref(self.map), ctypes.byref(copy))
        moved = self.lib.interval_map_move(ctypes.byref(self.map), start, to, length)
        erased = self.lib.interval_map_erase(ctypes.byref(self.map), start, start + length)
        if erased == 0:
            for page in range(start, start + length):
                self.model.pop(page, None)
        interval = Interval(start, start + length, IMAGE, 0, 0)
        inserted = self.lib.interval_map_insert(ctypes.byref(self.map), interval)
        if inserted == 0:
            self.model |= {start + i: (IMAGE + i, 0, 0) for i in range(length)}
        refuse.value = 0
        assert moved == errno.ENOMEM
        assert {erased, inserted} <= {0, errno.ENOMEM}
        assert copied == (errno.ENOMEM if self.map.capacity else 0)
        assert copy.count == 0 and not copy.blocks

    @rule()
    def copy(self) -> None:
        """Goes on with a copy; the original is gone, so nothing may be shared."""
        copy = Map()
        self.lib.interval_map_init(ctypes.byref(copy))
        assert self.lib.interval_map_copy(ctypes.byref(self.map), ctypes.byref(copy)) == 0
        self.lib.interval_map_deinit(ctypes.byref(self.map))
        self.map = copy

    @rule(start=st.integers(0, PAGES))
    def refuse(self, start: int) -> None:
        count = self.map.count
        assert self.lib.interval_map_erase(ctypes.byref(self.map), start, start) != 0
        assert self.lib.interval_map_insert(ctypes.byref(self.map), Interval(start + 1, start, 0, 0, 0)) != 0
        assert self.lib.interval_map_move(ctypes.byref(self.map), start, 2**64 - 1, 2) != 0
        assert self.map.count == count

    def ask(self, name: str, address: int) -> Interval | None:
        found = Interval()
        function = getattr(self.lib, f"interval_map_{name}")
        return found if function(ctypes.byref(self.map), address, ctypes.byref(found)) else None

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "map"):
            return
        intervals: list[Interval] = []
        while found := self.ask("next", intervals[-1].end if intervals else 0):
            intervals.append(found)
        assert all(one.end <= two.start for one, two in pairwise(intervals))
        assert self.map.count == len(intervals)
        if self.map.used:
            blocks(self.map, self.block)
        assert self.model == {
            page: (interval.image + page - interval.start, interval.backing, interval.flags)
            for interval in intervals
            for page in range(interval.start, interval.end)
        }
        for page in range(0, PAGES + 40, 7):
            assert (self.ask("find", page) is not None) == (page in self.model)
            before = self.ask("before", page)
            ends = [interval.end for interval in intervals if interval.end <= page]
            assert (before.end if before else None) == max(ends, default=None)
            for flags in (1, 2, 3):
                flagged = Interval()
                there = self.lib.interval_map_flagged(ctypes.byref(self.map), page, flags, ctypes.byref(flagged))
                starts = [interval.start for interval in intervals if interval.end > page and interval.flags & flags]
                assert (flagged.start if there else None) == min(starts, default=None)


class MachineOfSmallBlocks(Machine):
    """They part, join and vanish at every other step."""

    block = SMALL_BLOCK


TestIntervalMap = Machine.TestCase
TestSmallBlocks = MachineOfSmallBlocks.TestCase
TestIntervalMap.settings = settings(max_examples=150 * MORE, stateful_step_count=40, deadline=None)
TestSmallBlocks.settings = TestIntervalMap.settings


def test_inserted_in_order_joins_to_one(library: ctypes.CDLL) -> None:
    map_ = Map()
    library.interval_map_init(ctypes.byref(map_))
    for page in range(1000):
        assert library.interval_map_insert(ctypes.byref(map_), Interval(page, page + 1, IMAGE + page, 0, 0)) == 0
    assert map_.count == 1
    for page in range(0, 1000, 2):
        assert library.interval_map_erase(ctypes.byref(map_), page, page + 1) == 0
    assert map_.count == 500
    assert map_.capacity < 4096
    library.interval_map_deinit(ctypes.byref(map_))


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
@pytest.mark.parametrize("machine", [Machine, MachineOfSmallBlocks])
def test_blocks_follow_the_intervals(machine: type[Machine], order: str) -> None:
    """They come and go with them; in any order they are half full, and a quarter after any half was dropped."""
    map_, n, draw = Map(), 5000, random.Random(4)
    machine.lib.interval_map_init(ctypes.byref(map_))
    room = machine.block / ctypes.sizeof(Interval)
    pages = [2 * i for i in range(n)]
    for _ in range(2):
        if order == "random":
            draw.shuffle(pages)
        for page in reversed(pages) if order == "descending" else pages:
            interval = Interval(page, page + 1, IMAGE, 0, page & 2)
            assert machine.lib.interval_map_insert(ctypes.byref(map_), interval) == 0
        assert map_.count == n
        assert blocks(map_, machine.block) < 1.4 * n / (room / 2)
        for page in pages[: n // 2]:
            assert machine.lib.interval_map_erase(ctypes.byref(map_), page, page + 1) == 0
        assert map_.count == n - n // 2
        assert blocks(map_, machine.block) < 1.4 * map_.count / (room / 4)
        assert machine.lib.interval_map_erase(ctypes.byref(map_), 3, 2 * n - 3) == 0
        assert blocks(map_, machine.block) == 1
        assert machine.lib.interval_map_erase(ctypes.byref(map_), 0, 2 * n) == 0
        assert (map_.count, map_.levels) == (0, 0)
    machine.lib.interval_map_deinit(ctypes.byref(map_))
