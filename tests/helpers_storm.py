"""Storms of memory calls in copies of one snapshot; see victims/storm.c."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from helpers import GUARD_SECONDS, until

import lazyrestore

Fill = Literal["none", "idle", "now"]

ALL_CALLS = 0xFFF
GROWTH = 0x408  # of these: in place or moved, RESIZE and GROW
FILLS: tuple[Fill, ...] = ("none", "none", "idle", "now")


def storms(
    program: Path, store: lazyrestore.Store, log: Path, arguments: tuple[int, int, int, int, int], copies: int
) -> Counter[tuple[Fill, int]]:
    """Restore `copies` copies of a new storm, one after the other; how often each fill and exit status came.

    What was wrong stands in `log`. arguments: storm's, without the seed, so that no two copies are alike.
    """
    counts: Counter[tuple[Fill, int]] = Counter()
    with log.open("ab") as output:
        start = log.stat().st_size
        victim = subprocess.Popen(
            [program, *map(str, arguments), "0"], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            until(lambda: log.read_bytes()[start:].startswith(b"ready"), "the storm's blocks", _alive(victim))
            snapshot = store.snapshot(victim.pid, name=f"storm{victim.pid}", replace=True)
        finally:
            victim.kill()
            victim.wait()
    with snapshot:
        for _ in range(copies):
            fill = random.choice(FILLS)
            with snapshot.restore(new_pid=True, record=False, fill=fill) as copy:
                time.sleep(random.choice((0, 0, 0.002, 0.02)))  # nothing, some, or all of it has arrived
                copy.send_signal(signal.SIGUSR1)
                counts[fill, copy.wait(GUARD_SECONDS)] += 1
    return counts


def _alive(victim: subprocess.Popen[bytes]) -> Callable[[], None]:
    def check() -> None:
        if victim.poll() is not None:
            raise AssertionError(f"the storm ended with {victim.returncode}")

    return check
