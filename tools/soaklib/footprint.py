"""What processes and the host hold at one moment, by name, for comparison with a later one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

Footprint = dict[str, int]
# Memory: the arenas that malloc makes for threads; a share of what is shared grows when another process ends.
GROWTH = {"readers": 4, "mappings": 64, "anonymous": 4 << 20, "pss": 16 << 20}  # allowed; bytes


def of_process(pid: int) -> Footprint:
    """Counts, and memory in bytes: anonymous (its own), pss (with its share of what it shares)."""
    base = Path(f"/proc/{pid}")
    rollup = dict(line.split(":", 1) for line in (base / "smaps_rollup").read_text().splitlines()[1:])
    return {
        "descriptors": len(os.listdir(base / "fd")) - (pid == os.getpid()),  # the one that lists them
        "threads": len(os.listdir(base / "task")),
        "mappings": len((base / "maps").read_text().splitlines()),
        "anonymous": int(rollup["Anonymous"].split()[0]) << 10,
        "pss": int(rollup["Pss"].split()[0]) << 10,
    }


def files_in(*directories: Path) -> int:
    """How many files and directories there are below."""
    return sum(1 for directory in directories for _ in directory.rglob("*"))


def mounts() -> int:
    return len(Path("/proc/self/mountinfo").read_text().splitlines())


def leaks(before: Mapping[str, Footprint], now: Mapping[str, Footprint]) -> list[str]:
    """What there is more of, a line each; of memory, more than what is allowed."""
    return [
        f"{who}: {what}: {before[who][what]} -> {value}"
        for who, footprint in now.items()
        for what, value in footprint.items()
        if value > before[who][what] + GROWTH.get(what, 0)
    ]


def lower_counts(known: Mapping[str, Footprint], now: Mapping[str, Footprint]) -> None:
    """Make the counts of `known` those of `now` where these are lower: something had not been cleared away then."""
    for who, footprint in now.items():
        for what, value in footprint.items():
            if what not in GROWTH:
                known[who][what] = min(known[who][what], value)
