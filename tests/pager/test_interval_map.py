"""interval_map.c against a dictionary of pages."""

from __future__ import annotations

import ctypes
import os
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
        ("nodes", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ["capacity", "used", "free", "root", "count", "seed"]),
    )


@pytest.fixture(scope="session", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("interval_map") / "interval_map.so"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", "-O1", "-g", "-std=gnu11", *warnings, "-shared", "-fPIC", SOURCE, "-o", target], check=True)
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
    Machine.lib = lib
    return lib


Page = tuple[int, int, int]  # image page, backing, flags


class Machine(RuleBasedStateMachine):
    """The model maps each page to what its interval says of it."""

    lib: ctypes.CDLL

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


TestIntervalMap = Machine.TestCase
TestIntervalMap.settings = settings(max_examples=150 * MORE, stateful_step_count=40, deadline=None)


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
