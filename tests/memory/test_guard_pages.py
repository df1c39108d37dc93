"""Guard pages (MADV_GUARD_INSTALL): SIGSEGV for whoever touches them; when they are removed, zeros in their place."""

from __future__ import annotations

import ctypes
import mmap

import pytest
from helpers_lazy_twin import InArena
from helpers_twin import ANONYMOUS, ARENA, PAGE, SHARED

DONTNEED, GUARD_INSTALL, GUARD_REMOVE = 4, 102, 103


def has_guard_pages() -> bool:
    """PAGEMAP_SCAN tells of them from Linux 6.15 on, when they could be in mappings of files, too."""
    with open(__file__, "rb") as file:
        of_file = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(of_file))
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), GUARD_INSTALL) == 0


@pytest.mark.requires("root")
def test_guard_pages(in_arena: InArena) -> None:
    if not has_guard_pages():
        pytest.skip("needs Linux 6.15")
    empty = ARENA + 128 * PAGE
    with in_arena() as twins:
        twins.both("map", ARENA, 64 * PAGE, 3, ANONYMOUS, 0, 0)
        twins.both("write", ARENA, 64 * PAGE, 5)
        twins.both("map", empty, 16 * PAGE, 3, ANONYMOUS, 0, 0)
        for first, pages in ((0, 1), (5, 1), (9, 3), (63, 1)):
            assert twins.both("advise", ARENA + first * PAGE, pages * PAGE, GUARD_INSTALL).startswith("0")
        twins.both("advise", empty, 2 * PAGE, GUARD_INSTALL)
        before = twins.both("read", ARENA, 64 * PAGE)
        for _ in range(2):  # a snapshot of the copy, too
            twins.restore()
            assert twins.both("read", ARENA + 4 * PAGE, 3 * PAGE)  # its neighbours first: they lie in one chunk
            assert twins.both("read", ARENA, 64 * PAGE) == before
            twins.both("read", empty, 16 * PAGE)
            twins.both("fork", ARENA, 64 * PAGE, 0)
            twins.both("digest")
        twins.both("advise", ARENA + 8 * PAGE, 2 * PAGE, DONTNEED)  # leaves guards
        twins.both("read", ARENA, 64 * PAGE)
        for start, length in ((ARENA, 64 * PAGE), (empty, 16 * PAGE)):
            twins.both("advise", start, length, GUARD_REMOVE)
            twins.both("read", start, length)
            twins.both("write", start, length, 9)
        twins.restore()
        twins.both("digest")


@pytest.mark.requires("root")
@pytest.mark.parametrize("kind", [ANONYMOUS, SHARED], ids=["private", "shared"])
def test_guards_of_a_copy(in_arena: InArena, kind: int) -> None:
    """A copy makes guard pages of memory that has not arrived, between pages that arrive."""
    if not has_guard_pages():
        pytest.skip("needs Linux 6.15")
    with in_arena() as twins:
        twins.both("map", ARENA, 256 * PAGE, 3, kind, 0, 0)
        twins.both("write", ARENA, 256 * PAGE, 5)
        twins.copy = twins.snapshot().restore(record=False)  # while it records, a fault brings one page
        for first, pages in ((1, 1), (6, 2), (67, 1), (80, 100)):
            assert twins.both("advise", ARENA + first * PAGE, pages * PAGE, GUARD_INSTALL).startswith("0")
        twins.both("fork", ARENA + 254 * PAGE, PAGE, 0)  # the child brings all of it, with the guards
        for page in (0, 4, 64, 200):  # each brings its neighbours
            twins.both("read", ARENA + page * PAGE, PAGE)
        twins.both("read", ARENA, 256 * PAGE)
        twins.both("fork", ARENA, 256 * PAGE, 0)
        twins.both("digest")
        for first, pages in ((1, 1), (7, 1), (66, 3)):
            twins.both("advise", ARENA + first * PAGE, pages * PAGE, GUARD_REMOVE)
            twins.both("read", ARENA + first * PAGE, pages * PAGE)
        if kind == ANONYMOUS:  # a snapshot of that; of shared memory it is refused
            twins.restore()
            twins.both("digest")
        twins.both("advise", ARENA, 256 * PAGE, GUARD_REMOVE)
        twins.both("digest")
