"""Copy a process's own memory (the pages that a snapshot must hold) to a plain file, and see what zstd makes of it."""

from __future__ import annotations

import mmap
import os
import re
import resource
import subprocess
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import blake3

from benchlib.measure import clock
from lazyrestore.store.compressor import Compressor
from lazyrestore.store.format import CHUNK
from lazyrestore.store.writer import BATCH

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


def zstd_seconds(raw: Path, compressed: Path) -> tuple[float, float]:
    """What `zstd -1 -T0` takes for the file, output included: seconds by the clock, and CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["zstd", "-q", "-1", "-T0", "-f", str(raw), "-o", str(compressed)]
    _, ms = clock(lambda: subprocess.run(command, check=True))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ms / 1000, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_by_step(raw: Path) -> dict[str, float]:
    """CPU seconds that the steps of a snapshot take for these bytes on one thread, in chunks and batches as it does."""
    steps: dict[str, Callable[[list[memoryview]], object]] = {
        "hashing": lambda chunks: [blake3.blake3(chunk).digest() for chunk in chunks],
        "compressing": Compressor(1).compress,
    }
    result = {}
    with raw.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as data:
        for name, step in steps.items():
            began = time.thread_time()
            for start in range(0, len(data), BATCH):
                end = min(start + BATCH, len(data))
                chunks = [data[at : min(at + CHUNK, end)] for at in range(start, end, CHUNK)]
                step(chunks)
                for chunk in chunks:
                    chunk.release()
            result[name] = time.thread_time() - began
    return result


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
