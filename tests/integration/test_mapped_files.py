"""Mapped files are opened once for all copies that one Snapshot object makes, and checked for each."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import Builder, Victim, Victims, ask, open_descriptors
from helpers_copies import Copies

import lazyrestore
from lazyrestore import errors

Start = Callable[[], Victim]


@pytest.fixture
def snapshot(run: Path, victims: Victims, copies: Copies, build: Builder) -> lazyrestore.Snapshot:
    """Of a program whose file, run/small, the test may change."""
    shutil.copy2(build.c("small", "-lm"), run / "small")
    victim = victims.start([run / "small", run / "control"], cwd=run)
    victim.listens(run / "control")
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    return snapshot


@pytest.fixture
def soft_limit() -> Iterator[Callable[[int], None]]:
    """Sets this process's limit of descriptors, until the test's end."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(soft: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def opened_below(folder: Path) -> list[str]:
    """What this process has open below it."""
    links = []
    for number in open_descriptors():
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # of the listing itself
            continue
    return sorted(link for link in links if link.startswith(f"{folder}/") and "/store" not in link)


def answers(run: Path, copies: Copies, snapshot: lazyrestore.Snapshot) -> None:
    copy = copies.restore(snapshot)
    assert ask(run / "control", "0") == "1001\n"
    assert {os.readlink(f"/proc/{copy.pid}/fd/{number}") for number in os.listdir(f"/proc/{copy.pid}/fd")}.isdisjoint(
        file.path for file in snapshot.manifest.files
    )
    copy.kill()


def test_they_are_opened_once(run: Path, copies: Copies, snapshot: lazyrestore.Snapshot) -> None:
    mapping = [line for line in snapshot.explain() if " vma " in line]
    assert any("/small)" in line for line in mapping) and not any("openat" in line for line in mapping)
    answers(run, copies, snapshot)
    first = open_descriptors()
    assert opened_below(run) == [f"{run}/small"]
    for _ in range(3):
        answers(run, copies, snapshot)
    assert open_descriptors() == first
    snapshot.close()
    assert opened_below(run) == []


def test_a_file_that_is_replaced(run: Path, copies: Copies, snapshot: lazyrestore.Snapshot) -> None:
    """What is open leads to the old one. One of the same build is as good; the copies then map the new one."""
    answers(run, copies, snapshot)
    shutil.copy2(run / "small", run / "same")
    os.rename(run / "small", run / "old")
    os.rename(run / "same", run / "small")
    answers(run, copies, snapshot)
    answers(run, copies, snapshot)
    assert opened_below(run) == [f"{run}/small"]
    shutil.copy2("/bin/true", run / "other")
    os.rename(run / "other", run / "small")
    for _ in range(2):
        with pytest.raises(errors.FileChanged):
            snapshot.restore()
    os.rename(run / "old", run / "small")
    answers(run, copies, snapshot)


def test_a_file_that_changes_where_it_is(run: Path, copies: Copies, snapshot: lazyrestore.Snapshot) -> None:
    answers(run, copies, snapshot)
    with (run / "small").open("ab") as file:
        file.write(b"x")
    with pytest.raises(errors.FileChanged, match="its size was"):
        snapshot.restore()
    os.truncate(run / "small", (run / "small").stat().st_size - 1)
    answers(run, copies, snapshot)
    answers(run, copies, snapshot)


def test_few_descriptors(
    run: Path, copies: Copies, snapshot: lazyrestore.Snapshot, soft_limit: Callable[[int], None]
) -> None:
    """None is kept unless half of what may be open stays free; the copy opens its files itself."""
    soft_limit(2 * len(open_descriptors()) - 1)
    answers(run, copies, snapshot)
    assert opened_below(run) == []
    soft_limit(1024)
    with lazyrestore.Store.open(run / "store") as store, store.get("x") as other:
        answers(run, copies, other)
        assert opened_below(run) == [f"{run}/small"]


def test_a_file_that_cannot_be_opened_here(
    run: Path, copies: Copies, snapshot: lazyrestore.Snapshot, soft_limit: Callable[[int], None]
) -> None:
    """A caller that runs out of descriptors while it opens them lets go of those it has."""
    soft_limit(1024)
    held = [os.dup(0) for _ in range(500 - len(open_descriptors()))]
    try:
        os.rename(run / "small", run / "away")
        with pytest.raises(errors.FileChanged, match="gone"):
            snapshot.restore()
        assert opened_below(run) == []
        os.rename(run / "away", run / "small")
        answers(run, copies, snapshot)
    finally:
        for descriptor in held:
            os.close(descriptor)


WRITER = """
import ctypes, mmap, os, sys
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 8192, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
file.close()
address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
mprotect = ctypes.CDLL(None).mprotect
mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
assert not mprotect(address, 8192, 1)
os.write(1, b"ready\\n")
sys.stdin.readline()
failed = mprotect(address, 8192, 3)
mapped[0] = 65
os.write(1, b"failed\\n" if failed else b"written\\n")
"""


def test_what_others_write_or_run_is_not_kept_open(run: Path, victims: Victims, copies: Copies) -> None:
    """A file that is open for writing cannot be executed (ETXTBSY)."""
    shutil.copy2("/bin/true", run / "written")
    os.mkfifo(run / "go")
    go = os.open(run / "go", os.O_RDWR)
    victim = victims.start([sys.executable, "-c", WRITER, run / "written"], stdin=go)
    victim.until(lambda: victim.log.read_text() == "ready\n" or None, "mapped")
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    copy = copies.restore(snapshot)
    assert opened_below(run) == [f"{run}/go"] and opened_below(Path(sys.base_prefix) / "bin")
    os.write(go, b"\n")
    assert copy.process.wait(60) == 0
    assert victim.log.read_text() == "ready\nwritten\n"
    assert (run / "written").read_bytes()[:4] == b"AELF"
    shutil.copy2("/bin/true", run / "fresh")
    with (run / "written").open("r+b") as file:
        file.write((run / "fresh").read_bytes())
    subprocess.run([run / "written"], check=True)
    os.close(go)
