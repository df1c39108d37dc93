"""Several clones at once: all of them, or none.

They are started one after the other by the calling thread. Two threads were measured to need 2.4 instead of 3.1 ms per
clone, which is not worth what comes with it: a process whose parent-death signal is set gets that signal when the
*thread* that started it ends (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lazyrestore.fleet.process import Held, Process

P = TypeVar("P", bound=Held)


def start(restore: Callable[[], P], count: int, *, held: bool = False) -> list[P]:
    """What `restore` returned, `count` times, let go unless they shall stay held. If it raises once, those that run
    are ended first."""
    clones: list[P] = []
    try:
        while len(clones) < count:
            clones.append(restore())
        if not held:
            let_go(clones)
    except BaseException:
        end(clones)
        raise
    return clones


def let_go(clones: Sequence[Held]) -> None:
    """From now on they live on when the caller is killed."""
    for clone in clones:
        clone.let_go()


def end(clones: Sequence[Process]) -> None:
    """Kill them all, then collect them."""
    for clone in clones:
        clone.kill()
    for clone in clones:
        clone.wait()
