"""Clones of tests/victims/reporter.py: ask one for its report."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import Victim, Victims, open_descriptors, until

if TYPE_CHECKING:
    import lazyrestore


def reporter(run: Path, victims: Victims, megabytes: int = 8) -> Victim:
    victim = victims.python("reporter.py", run, str(megabytes))
    victim.until((run / "ready").exists, "a ready reporter")
    # It has said so; now it must wait, so that its report is its own answer to the signal.
    victim.until(lambda: "S (" in Path(f"/proc/{victim.pid}/status").read_text(), "a waiting reporter")
    return victim


def report(run: Path, pid: int, number: int = signal.SIGUSR1) -> list[str]:
    """[count, digest, pid inside] of the reporter with process id `pid`, which sends it a signal first."""
    path = run / f"report-{os.stat(f'/proc/{pid}/ns/pid').st_ino}"
    path.unlink(missing_ok=True)
    os.kill(pid, number)
    return awaited(path).split()


def awaited(path: Path) -> str:
    return until(lambda: path.read_text() if path.exists() else None, f"{path}")


def init_of(process: lazyrestore.RestoredProcess) -> int:
    """The process id of the init of a clone's namespace."""
    assert process._namespace is not None
    return process._namespace.pid


def descriptors() -> int:
    """How many this process has open."""
    return len(open_descriptors())
