"""CRIU, as brought by tools/peers: dump, eager restore, lazy restore."""

from __future__ import annotations

import contextlib
import re
import resource
import select
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchlib import usage
from benchlib.measure import Report, clock
from benchlib.victims import PATIENCE, Unresponsive, Victim, end, reap

WRAPPER = Path(__file__).resolve().parents[2] / ".cache" / "peers" / "criu"
EAGER, LAZY = "CRIU, eager", "CRIU, lazy-pages"


class CriuFailed(Exception):
    """CRIU's exit status was not 0; the message holds its log's errors."""


def measure(report: Report, name: str, victim: Victim, folder: Path, answer: str, whole: str) -> None:
    """Dump a warmed-up victim, then restore it eagerly and lazily; and how small zstd makes the image.

    The victim is ended. Raises CriuFailed, Unresponsive.
    """
    images = folder / "criu"
    images.mkdir()
    output, dump_ms = clock(lambda: _run("dump", images, "-t", str(victim.pid), "--display-stats"))
    reap(victim.pid)
    report.add(f"{name}: CRIU's dump", dump_ms, "ms")
    report.add(f"{name}: CRIU's dump: frozen", _microseconds(output, "Frozen time") / 1000, "ms")

    def restored(contender: str, *options: str, daemon: int = 0) -> None:
        before = _children_ms() + (usage.cpu_ms(daemon) if daemon else 0)
        started = time.perf_counter()
        try:
            _run("restore", images, "--restore-detached", *options)
            resumed = time.perf_counter()
            first = victim.ask()
            done = time.perf_counter()
            used = usage.of(victim.pid)
            others = _children_ms() + (usage.cpu_ms(daemon) if daemon else 0) - before
            if first != answer or victim.ask("/all") != whole:
                raise Unresponsive(f"{name}, {contender}: the copy answers wrongly")
        finally:
            end(victim.pid)
        report.contend(name, contender, (resumed - started) * 1000, (done - started) * 1000, used, others)

    restored(EAGER)
    with _lazy_pages(images) as daemon:
        restored(LAZY, "--lazy-pages", daemon=daemon)

    archive = folder / "criu.tar.zst"
    report.add(f"{name}: CRIU's image", sum(f.stat().st_size for f in images.glob("*.img")) / 1e6, "MB")
    _compress(images, archive)
    report.add(f"{name}: CRIU's image through zstd -3", archive.stat().st_size / 1e6, "MB")
    archive.unlink()
    shutil.rmtree(images)


def _children_ms() -> float:
    """CPU time of the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1000


@contextlib.contextmanager
def _lazy_pages(images: Path) -> Iterator[int]:
    """The pid of the daemon that serves the pages; it ends by itself with the restored process."""
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
        yield daemon.pid
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
