"""The soaks of tools/soak, short: what took hours to find is looked for a little with every run of the tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOAK = Path(__file__).parents[2] / "tools" / "soak"


def soaked(*words: object) -> None:
    command = [SOAK, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_restores_leave_nothing_behind() -> None:
    """Also when somebody kills a process of several threads, or its init, while it is being restored."""
    soaked("restores", 100)


def test_every_thread_wakes_up() -> None:
    soaked("faults", 1, 40)
