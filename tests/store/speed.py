"""How fast the writer is, as a ratio to `zstd -1 -T0` on the same bytes, in one run. Not a test: run it.

Two inputs: the memory of a real CPython process with numpy and modules loaded, and 1 GiB of that mixed with arrays,
text, noise and zero pages. Each is compressed by zstd from a file in /dev/shm, to /dev/null and to a file with fsync,
and stored by ImageWriter into an empty store on the same disk. Wall time is that of the machine, with all that others
do on it; CPU time (all threads, user and system) tells the work. An argument names the folder to write to.
"""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lazyrestore.store import ImageStore

ROUNDS = 3
VICTIM = """
import numpy, http.server, json, email, asyncio, unittest, sqlite3, sys
rows = [{"id": i, "name": f"user {i}", "score": i * 7 % 1013} for i in range(150_000)]
table = numpy.arange(4_000_000, dtype="float64").reshape(2000, 2000)
print("ready", flush=True)
sys.stdin.read()
"""


def process_memory() -> bytes:
    """All readable private memory of a warm worker."""
    worker = subprocess.Popen([sys.executable, "-c", VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdout is not None and worker.stdout.readline() == b"ready\n"
    parts = []
    with open(f"/proc/{worker.pid}/maps") as maps, open(f"/proc/{worker.pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, access = line.split()[:2]
            start, end = (int(part, 16) for part in span.split("-"))
            if "r" in access and "[v" not in line:
                memory.seek(start)
                parts.append(memory.read(end - start))
    worker.communicate()
    return b"".join(parts)


def mixed(process: bytes) -> bytes:
    rng = np.random.default_rng(1)
    arrays = np.cumsum(rng.normal(size=12 << 20)).astype("float32").tobytes()
    text = b"".join(b'{"id": %d, "value": "%x"}\n' % (i, i * 2654435761 % 2**32) for i in range(2_000_000))
    noise = rng.bytes(64 << 20)
    parts = [process, arrays, text, noise, bytes(64 << 20)]
    result = b"".join(parts)
    rolled = bytes(np.frombuffer(result, "uint8") ^ 1)  # the same again, but new to deduplication
    return (result + rolled + result[::-1])[: 1 << 30].ljust(1 << 30, b"\0")


def cpu() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def timed(action: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds, the median of each."""
    walls, cpus = [], []
    for _ in range(ROUNDS):
        wall, work = time.perf_counter(), cpu()
        action()
        walls.append(time.perf_counter() - wall)
        cpus.append(cpu() - work)
    return statistics.median(walls), statistics.median(cpus)


def zstd(source: Path, target: str) -> None:
    subprocess.run(["zstd", "-1", "-T0", "-q", "-f", "-o", target, str(source)], check=True)
    if target != "/dev/null":
        with open(target) as file:
            os.fsync(file.fileno())


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="lazyrestore-speed-", dir=sys.argv[1] if len(sys.argv) > 1 else None))
    shm = Path(tempfile.mkdtemp(prefix="lazyrestore-speed-", dir="/dev/shm"))
    try:
        process = process_memory()
        for name, data in (("process", process), ("mixed", mixed(process))):
            measure(name, data[: len(data) // 4096 * 4096], folder, shm)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(shm)


def measure(name: str, data: bytes, folder: Path, shm: Path) -> None:
    source = shm / "source"
    source.write_bytes(data)
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    stored: list[int] = []

    def store() -> None:
        shutil.rmtree(folder / "store", ignore_errors=True)
        with ImageStore.open(folder / "store") as images:
            with images.writer("speed") as writer:
                writer.add(memoryview(buffer), [(1 << 40, 0, len(data))])
                writer.commit(b"")
            stored.append(images.show("speed").stored_bytes)

    null = timed(lambda: zstd(source, "/dev/null"))
    synced = timed(lambda: zstd(source, str(folder / "image.zst")))
    ours = timed(store)
    packed = (folder / "image.zst").stat().st_size
    print(f"{name}: {len(data) / 2**20:.0f} MiB; zstd {packed / 2**20:.1f} MiB, stored {stored[0] / 2**20:.1f} MiB")
    for label, (wall, work) in (("zstd to /dev/null", null), ("zstd, fsync", synced), ("lazyrestore, synced", ours)):
        print(f"  {label:20} {len(data) / wall / 1e9:5.2f} GB/s wall {len(data) / work / 1e9:5.2f} GB/s of one CPU")
    for label, (wall, work) in (("/dev/null", null), ("fsync", synced)):
        print(f"  lazyrestore to zstd ({label}): {wall / ours[0]:.2f} wall, {work / ours[1]:.2f} CPU")


if __name__ == "__main__":
    main()
