"""Several clones at once: all of them, or none.

They are started one after the other by the calling thread. Two threads were measured to need 2.4 instead of 3.1 ms per
clone, which is not worth what comes with it: a process whose parent-death signal is set gets that signal when the
*thread* that started it ends (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lazyrestore.fleet.process import Process

P = TypeVar("P", bound=Process)


def start(restore: Callable[[], P], count: int) -> list[P]:
    """What `restore` returned, `count` times. If it raises once, those that run are ended first."""
    clones: list[P] = []
    try:
        while len(clones) < count:
            clones.append(restore())
    except BaseException:
        end(clones)
        raise
    return clones


def end(clones: list[P]) -> None:
    """Kill them all, then collect them."""
    for clone in clones:
        clone.kill()
    for clone in clones:
        clone.wait()
