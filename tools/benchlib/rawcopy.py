"""Copy a process's own memory (the pages that a snapshot must hold) to a plain file, and see what zstd makes of it."""

from __future__ import annotations

import os
import re
import subprocess
from array import array
from pathlib import Path

from benchlib.measure import clock

PAGE = 4096
PRESENT, SWAPPED, FILE_OR_SHARED = 1 << 63, 1 << 62, 1 << 61
NOT_OURS = ("[vvar", "[vdso]", "[vsyscall]")


def copy(pid: int, target: Path) -> int:
    """Write every private page of `pid` that is present and not the page cache's. Returns the bytes written."""
    total = 0
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with (
        open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,
        open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap,
        target.open("wb") as out,
    ):
        for line in maps:
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) (....)", line)
            if not found or found[3][3] != "p" or any(name in line for name in NOT_OURS):
                continue
            start, end = int(found[1], 16), int(found[2], 16)
            for first, last in _runs(pagemap.fileno(), start, end):
                for at in range(first, last, 1 << 24):
                    data = os.pread(memory.fileno(), min(1 << 24, last - at), at)
                    out.write(data)
                    total += len(data)
    return total


def zstd_seconds(raw: Path, compressed: Path) -> float:
    """How long `zstd -1 -T0` takes for the file, including the writing of its output, in seconds."""
    _, ms = clock(
        lambda: subprocess.run(["zstd", "-q", "-1", "-T0", "-f", str(raw), "-o", str(compressed)], check=True)
    )
    return ms / 1000


def _runs(pagemap: int, start: int, end: int) -> list[tuple[int, int]]:
    """The address ranges, end exclusive, of a VMA's own pages."""
    entries = array("Q")
    entries.frombytes(os.pread(pagemap, (end - start) // PAGE * 8, start // PAGE * 8))
    runs: list[tuple[int, int]] = []
    for i, entry in enumerate(entries):
        if entry & (PRESENT | SWAPPED) and not entry & FILE_OR_SHARED:
            address = start + i * PAGE
            if runs and runs[-1][1] == address:
                runs[-1] = (runs[-1][0], address + PAGE)
            else:
                runs.append((address, address + PAGE))
    return runs
