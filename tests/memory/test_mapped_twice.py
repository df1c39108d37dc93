"""mremap with an old size of 0 maps shared memory a second time; its event tells no length."""

from __future__ import annotations

from helpers_lazy_twin import InArena
from helpers_twin import ARENA, PAGE, SHARED

MAYMOVE_FIXED = 3


def test_shared_memory_mapped_twice(in_arena: InArena) -> None:
    second = ARENA + 128 * PAGE
    with in_arena() as twins:
        twins.both("map", ARENA, 64 * PAGE, 3, SHARED, 0, 0)
        twins.both("write", ARENA, 64 * PAGE, 5)
        twins.restore()
        twins.both("remap", ARENA + 16 * PAGE, 0, 32 * PAGE, second, MAYMOVE_FIXED)
        twins.both("write", second + 5 * PAGE, PAGE, 9)  # the first touch of that chunk, through the second mapping
        twins.both("digest")
        twins.restore()
        twins.both("digest")
