"""The machine a run is made on, and how to bring it into a steady state."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
from pathlib import Path

GIB = 1 << 30


def describe() -> dict[str, str]:
    """What a reader needs to compare runs: kernel, CPU, cores, memory, interpreter."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "Linux": platform.release(),
        "cpu": model,
        "cores": str(os.cpu_count()),
        "memory": f"{_meminfo('MemTotal') / GIB:.0f} GiB",
        "Python": platform.python_version(),
        "commit": _commit(),
        "load at the start": load(),
    }


def load() -> str:
    """The load average of the last minute: more than the bench itself makes is somebody else's noise."""
    return f"{os.getloadavg()[0]:.1f}"


def first_touch() -> int:
    """Touch and free half of the available memory, at most 8 GiB, so that the host backs it. Returns the bytes touched.

    A virtual machine that returns freed memory to its host pays a fault on the host's side for the first touch.
    """
    size = min(8 * GIB, _meminfo("MemAvailable") // 2) & ~((1 << 21) - 1)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass
    return size


def _commit() -> str:
    """What was measured; "-dirty" if files differ from the commit."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _meminfo(field: str) -> int:
    """One field of /proc/meminfo, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise KeyError(field)
