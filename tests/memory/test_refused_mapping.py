"""mmap(MAP_FIXED) and munmap, refused for a limit or a sealed mapping (mseal) in their range, put back what they had
unmapped (Linux 6.12), but tell that it was unmapped."""

from __future__ import annotations

import errno
import re
import resource
from pathlib import Path

import pytest
from helpers_lazy_twin import InArena
from helpers_twin import ADVICE, ANONYMOUS, ARENA, PAGE, SHARED

SPARE = 8 << 20  # what the process itself may still map


def mapped(pid: int, limit: int) -> int:
    """Bytes that count against a limit."""
    name = "VmSize" if limit == resource.RLIMIT_AS else "VmData"
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


@pytest.mark.parametrize("limit", [resource.RLIMIT_AS, resource.RLIMIT_DATA], ids=["as", "data"])
def test_what_it_would_have_covered_is_still_there(in_arena: InArena, limit: int) -> None:
    end = ARENA + 16384 * PAGE
    with in_arena(end) as twins:
        for kind, first in ((ANONYMOUS, 16), (SHARED, 100), (ANONYMOUS, 200)):
            twins.both("map", ARENA + first * PAGE, 64 * PAGE, 3, kind, 0, 0)
            twins.both("write", ARENA + first * PAGE, 64 * PAGE, 5)
        twins.copy = twins.snapshot().restore(record=False)
        twins.both("read", ARENA + 200 * PAGE, PAGE)
        twins.both("advise", ARENA + 210 * PAGE, 4 * PAGE, ADVICE["DONTNEED"])
        before = [resource.prlimit(pid, limit) for pid in twins.pids]
        for pid in twins.pids:
            resource.prlimit(pid, limit, (mapped(pid, limit) + SPARE, resource.RLIM_INFINITY))
        for first in (0, 20, 150, 205, 220):
            assert twins.both("map", ARENA + first * PAGE, end - ARENA - first * PAGE, 3, ANONYMOUS, 0, 1) == "-1 12 0"
        for pid, old in zip(twins.pids, before, strict=True):
            resource.prlimit(pid, limit, old)
        twins.both("fork", ARENA + 200 * PAGE, PAGE, 7)
        twins.both("unmap", ARENA + 230 * PAGE, PAGE)
        twins.both("digest")


def test_for_a_sealed_mapping_in_the_range(in_arena: InArena) -> None:
    sealed, length = ARENA + 80 * PAGE, 80 * PAGE
    with in_arena() as twins:
        twins.both("map", ARENA + 16 * PAGE, 64 * PAGE, 3, ANONYMOUS, 0, 0)
        twins.both("write", ARENA + 16 * PAGE, 64 * PAGE, 5)
        twins.copy = twins.snapshot().restore(record=False)
        twins.both("map", sealed, PAGE, 1, SHARED, 0, 0)
        if twins.both("seal", sealed, PAGE).startswith(f"-1 {errno.ENOSYS} "):
            pytest.skip("needs mseal(2), Linux 6.10")
        assert twins.both("unmap", ARENA + 20 * PAGE, length).startswith(f"-1 {errno.EPERM} ")
        assert twins.both("map", ARENA + 30 * PAGE, length, 3, ANONYMOUS, 0, 1).startswith(f"-1 {errno.EPERM} ")
        twins.both("digest")
