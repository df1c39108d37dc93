"""One of everything that a descriptor can be: seen alike by the process, by /proc, and compared with a twin."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers import Victim, Victims, ask
from helpers_copies import Copies


def start(victims: Victims, directory: Path, *oddities: str) -> Victim:
    directory.mkdir()
    victim = victims.python("fdzoo.py", directory / "control", *oddities, cwd=directory)
    victim.listens(directory / "control")
    return victim


def compare(wanted: str, got: str) -> None:
    """Equal JSON objects; only what differs is shown."""
    left, right = json.loads(wanted), json.loads(got)
    different = {name: (left.get(name), right.get(name)) for name in left | right if left.get(name) != right.get(name)}
    assert not different


@pytest.mark.parametrize("oddity", ["", "half-pipes", "packets", "half-sockets", "path", "sparse"])
def test_descriptors(run: Path, victims: Victims, copies: Copies, oddity: str) -> None:
    twin = start(victims, run / "twin", oddity)
    victim = start(victims, run / "zoo", oddity)
    before = ask(run / "zoo" / "control", "observe")
    copies.replace(victim)
    compare(before, ask(run / "zoo" / "control", "observe"))
    compare(ask(run / "twin" / "control", "drain"), ask(run / "zoo" / "control", "drain"))
    assert ask(run / "zoo" / "control", "timers") == "expired"
    twin.check()


def test_the_original_keeps_its_descriptors(run: Path, victims: Victims, copies: Copies) -> None:
    """What a snapshot looks at (queued bytes, counters, signals) is still there afterwards."""
    start(victims, run / "twin")
    victim = start(victims, run / "zoo")
    before = ask(run / "zoo" / "control", "observe")
    for number in range(3):
        copies.snapshot(victim.pid, f"x{number}")
    compare(before, ask(run / "zoo" / "control", "observe"))
    compare(ask(run / "twin" / "control", "drain"), ask(run / "zoo" / "control", "drain"))
    assert ask(run / "zoo" / "control", "timers") == "expired"


def test_no_descriptor_is_left(victims: Victims, copies: Copies) -> None:
    """The library's own descriptors, before and after fifty restores."""
    victim = victims.start(["sleep", "1000000"])
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()

    def once() -> None:
        process = snapshot.restore()
        process.kill()
        assert process.wait() == -signal.SIGKILL

    once()
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(50):
        once()
    assert sorted(os.listdir("/proc/self/fd")) == before
