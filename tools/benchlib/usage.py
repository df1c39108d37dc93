"""What a process has used so far, by the kernel's account.

Facts. A process's CPU clock (clock_getcpuclockid(3)) is exact to the nanosecond and holds threads that have ended; any
process may read any other's. /proc/PID/stat counts the faults of a process, those that a userfaultfd answered too.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path

CACHESTAT = 451  # the system call, Linux 6.5
CPUCLOCK_SCHED = 2


@dataclass(frozen=True)
class Usage:
    """faults: minor and major ones; cpu_ms: of all threads; uss, pss, anonymous, tables (page tables): bytes."""

    faults: int
    cpu_ms: float
    uss: int
    pss: int
    anonymous: int
    tables: int


def of(pid: int) -> Usage:
    """Raises OSError if it has ended."""
    cpu, happened = cpu_ms(pid), faults(pid)
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    lines += Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {
        name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    uss = found["Private_Clean"] + found["Private_Dirty"] + found["Private_Hugetlb"]
    return Usage(happened, cpu, uss, found["Pss"], found["Anonymous"], found["VmPTE"])


def cpu_ms(pid: int) -> float:
    """CPU time of a process so far, also of its threads that have ended. Raises OSError."""
    return time.clock_gettime_ns((~pid << 3) | CPUCLOCK_SCHED) / 1e6


def faults(pid: int) -> int:
    """Minor and major faults of a process so far. Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7]) + int(fields[9])


def evict(folder: Path) -> None:
    """Write all files of a folder to disk and take them out of the page cache. Raises OSError if some of it stays."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if left := _cached_pages(descriptor):
                raise OSError(0, f"{left} pages stay in the page cache", str(path))
        finally:
            os.close(descriptor)


def _cached_pages(descriptor: int) -> int:
    whole, result = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(CACHESTAT, descriptor, whole, result, 0) != 0:
        raise OSError(ctypes.get_errno(), "cachestat")
    return int(result[0])
