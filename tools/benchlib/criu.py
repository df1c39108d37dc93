"""CRIU, as brought by tools/peers: dump, eager restore, lazy restore, and the image kept compressed."""

from __future__ import annotations

import contextlib
import re
import select
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchlib.measure import Report, clock
from benchlib.victims import PATIENCE, Unresponsive, Victim, end, reap

WRAPPER = Path(__file__).resolve().parents[2] / ".cache" / "peers" / "criu"


class CriuFailed(Exception):
    """CRIU's exit status was not 0; the message holds its log's errors."""


def available() -> bool:
    return WRAPPER.exists()


def measure(report: Report, victim: Victim, folder: Path, answer: str, whole: str) -> None:
    """Dump a warmed-up worker, then restore it eagerly, lazily, and eagerly from a compressed image.

    The victim is ended. Raises CriuFailed, Unresponsive.
    """
    images = folder / "criu"
    images.mkdir()
    output, dump_ms = clock(lambda: _run("dump", images, "-t", str(victim.pid), "--display-stats"))
    reap(victim.pid)
    report.add("criu: dump", dump_ms, "ms")
    report.add("criu: frozen", _microseconds(output, "Frozen time") / 1000, "ms")
    size = sum(f.stat().st_size for f in images.glob("*.img"))
    report.add("criu: image", size / 1e6, "MB")

    def restored(name: str, before: float = 0.0, *options: str) -> None:
        started = time.perf_counter()
        try:
            _run("restore", images, "--restore-detached", *options)
            resumed = time.perf_counter()
            first = victim.ask()
            done = time.perf_counter()
            if first != answer or victim.ask("/all") != whole:
                raise Unresponsive(f"{name}: the copy answers wrongly")
        finally:
            end(victim.pid)
        report.add(f"{name}: resumed", before + (resumed - started) * 1000, "ms")
        report.add(f"{name}: first response", before + (done - started) * 1000, "ms")

    restored("criu eager")
    with _lazy_pages(images):
        restored("criu lazy-pages", 0.0, "--lazy-pages")

    archive = folder / "criu.tar.zst"
    _, _ = clock(lambda: _compress(images, archive))
    report.add("criu: image, zstd -3", archive.stat().st_size / 1e6, "MB")
    shutil.rmtree(images)
    images.mkdir()
    _, unpack_ms = clock(lambda: _decompress(archive, images))
    restored("criu eager, from zstd -3", unpack_ms)
    archive.unlink()
    shutil.rmtree(images)


@contextlib.contextmanager
def _lazy_pages(images: Path) -> Iterator[None]:
    """The daemon that serves the pages; it ends by itself with the restored process."""
    with (images / "lazy-pages.out").open("wb") as log:
        daemon = subprocess.Popen(
            [str(WRAPPER), "lazy-pages", "-D", str(images), "-o", "lazy-pages.log"], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not (images / "lazy-pages.socket").exists():
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise CriuFailed(f"lazy-pages: {_errors(images / 'lazy-pages.log')}")
            select.select([], [], [], 0.001)
        yield
    finally:
        daemon.kill()
        daemon.wait()


def _run(command: str, images: Path, *options: str) -> str:
    log = f"{command}.log"
    done = subprocess.run(
        [str(WRAPPER), command, "-D", str(images), "--network-lock", "skip", "-v1", "-o", log, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CriuFailed(f"criu {command}: {_errors(images / log) or done.stdout}")
    return done.stdout


def _errors(log: Path) -> str:
    if not log.exists():
        return ""
    return "; ".join(line for line in log.read_text(errors="replace").splitlines() if "Error" in line)


def _microseconds(output: str, name: str) -> float:
    found = re.search(rf"^{name}: (\d+) us", output, re.MULTILINE)
    if not found:
        raise CriuFailed(f"criu --display-stats tells no {name!r}: {output}")
    return float(found[1])


def _compress(images: Path, archive: Path) -> None:
    plain = archive.with_suffix("")
    with tarfile.open(plain, "w") as tar:
        for image in images.glob("*.img"):
            tar.add(image, image.name)
    subprocess.run(["zstd", "-q", "-3", "-T0", "-f", str(plain), "-o", str(archive)], check=True)
    plain.unlink()


def _decompress(archive: Path, images: Path) -> None:
    with subprocess.Popen(["zstd", "-q", "-dc", str(archive)], stdout=subprocess.PIPE) as zstd:
        subprocess.run(["tar", "-xf", "-", "-C", str(images)], stdin=zstd.stdout, check=True)
    if zstd.returncode != 0:
        raise CriuFailed(f"zstd -d: exit status {zstd.returncode}")
