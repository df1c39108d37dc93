"""One of every kind of memory, against a twin; and what a program may do to memory that has not arrived yet."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from helpers import VICTIMS, Builder, Victim, Victims, ask, until
from helpers_copies import Copies
from helpers_facts import mappings

# Each from a fresh copy, so that each comes first once: on memory of which nothing was touched.
REQUESTS = ["digest", "fork", "dontneed", "remap", "stack", "brk", "protect", "code", "unmap", "write", "share"]


def start(victims: Victims, build: Builder, directory: Path) -> Victim:
    directory.mkdir()
    victim = victims.start([build.c("memzoo"), directory / "control"], cwd=directory)
    victim.listens(directory / "control")
    return victim


@pytest.fixture(autouse=True)
def no_shm_files(victims: Victims) -> None:
    """Victims leave a file in /dev/shm: removed with them."""
    victims.leftovers.append("/dev/shm/lazyrestore-zoo-{pid}")


def test_memory(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    start(victims, build, run / "twin")
    victim = start(victims, build, run / "zoo")
    control, expected = run / "zoo" / "control", ask(run / "twin" / "control", "digest")
    copies.replace(victim)
    assert ask(control, "digest") == expected
    for request in REQUESTS[1:]:
        assert ask(control, request) == "ok", request
        assert ask(run / "twin" / "control", request) == "ok", request
    assert ask(control, "digest") == ask(run / "twin" / "control", "digest")


def test_each_request_first(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    victim = start(victims, build, run / "zoo")
    control = run / "zoo" / "control"
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    for request in REQUESTS[1:]:
        copy = copies.restore(snapshot)
        assert ask(control, request) == "ok", request
        assert ask(control, "fork") == "ok", request
        copy.kill()


def test_generations(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    """Snapshots of the running original change nothing in it, and a copy of a copy has everything."""
    start(victims, build, run / "twin")
    victim = start(victims, build, run / "zoo")
    control, expected = run / "zoo" / "control", ask(run / "twin" / "control", "digest")
    for number in range(3):
        copies.snapshot(victim.pid, f"x{number}")
    assert ask(control, "digest") == expected
    first = copies.replace(victim, "first")
    snapshot = copies.snapshot(first.pid, "second", kill=True)
    first.process.wait(60)
    copies.restore(snapshot)
    assert ask(control, "fork") == "ok"
    assert ask(control, "digest") == expected


def test_a_small_shared_file_that_is_gone_is_made_again(run: Path, victims: Victims, copies: Copies) -> None:
    """As programs leave them in /tmp for others to look at; the copies then share it as ever."""
    shares = (
        "import mmap, os, signal, time\n"
        "file = open('shared', 'w+b'); file.truncate(4096)\n"
        "memory = mmap.mmap(file.fileno(), 4096); file.close(); memory[:5] = b'bytes'\n"
        "def grow(*_): memory[5:6] = b'!'\n"
        "signal.signal(signal.SIGUSR1, grow); open('ready', 'w').close()\n"
        "while True: time.sleep(1)\n"
    )
    victim = victims.start([sys.executable, "-c", shares], cwd=run)
    victim.until((run / "ready").exists, "its mapping")
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    for _ in range(5):
        (run / "shared").unlink()
        copy = copies.restore(snapshot)
        assert (run / "shared").read_bytes()[:6] == b"bytes\0"
        copy.process.send_signal(signal.SIGUSR1)
        until(lambda: (run / "shared").read_bytes()[:6] == b"bytes!", "what the copy writes is in the file")
        copy.kill()


def test_a_written_private_mapping_is_still_one_of_its_file(run: Path, victims: Victims, copies: Copies) -> None:
    """Pages that it never wrote follow the file, as do written ones once they are dropped; of a copy's copy, too."""
    (run / "file").write_bytes(b"f" * (16 * 4096))
    control = run / "control"
    victim = victims.start([sys.executable, VICTIMS / "private_file.py", control, run / "file"])
    victim.listens(control)
    assert ask(control, "bytes") == "wf" * 8
    first = copies.replace(victim)
    assert ask(control, "bytes") == "wf" * 8
    snapshot = copies.snapshot(first.pid, "second", kill=True)
    first.process.wait(60)
    copies.restore(snapshot)
    status = (run / "file").stat()
    with (run / "file").open("r+b") as file:
        file.write(b"c" * (2 * 4096))
    os.utime(run / "file", ns=(status.st_atime_ns, status.st_mtime_ns))  # for the next snapshot's restore
    assert ask(control, "bytes") == "wc" + "wf" * 7
    assert ask(control, "drop") == "cc" + "ff" * 7


@pytest.mark.requires("root")
def test_as_many_mappings_as_there_can_be(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 100_000:
        pytest.skip("takes as many mappings as vm.max_map_count")
    victim = victims.start([build.c("mappings")], cwd=run)
    victim.until((run / "ready").exists, "its mappings")
    before = mappings(victim.pid)
    assert len(Path(f"/proc/{victim.pid}/maps").read_text().splitlines()) >= limit
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    copy = copies.restore(snapshot)
    same = mappings(copy.pid) == before
    assert same
