"""`lazyrestore snapshot`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lazyrestore.commands import say, tell_of_waiting, to_json
from lazyrestore.commands.words import size


def snapshot(store: str, pid: int, name: str, *, kill: bool, replace: bool, json_output: bool, level: int = 1) -> None:
    """Take it, and say what it is and was."""
    from lazyrestore.api import Store

    tell_of_waiting()
    with Store.open(store) as opened, _progress(name) as report:
        taken = opened.snapshot(
            pid, name=name, kill=kill, replace=replace, level=level, progress=report, committing=_ignore_interrupts
        )
    done = f"snapshot {name} is stored{' and the process ended' if kill else ''}"
    ratio = taken.raw_bytes / taken.stored_bytes if taken.stored_bytes else 0.0
    if json_output:
        fields = {
            "name": name,
            "pid": pid,
            "pages": taken.pages,
            "raw_bytes": taken.raw_bytes,
            "stored_bytes": taken.stored_bytes,
            "ratio": round(ratio, 3),
            "pause_ms": round(taken.pause_ms, 3),
            "seconds": round(taken.seconds, 3),
            "killed": kill,
        }
        say(to_json(fields), done)
        return
    say(
        f"{name}: {taken.pages} pages, {size(taken.raw_bytes)} raw, {size(taken.stored_bytes)} stored "
        f"(ratio {ratio:.2f}), paused {taken.pause_ms:.1f} ms, took {taken.seconds:.2f} s",
        done,
    )


def _ignore_interrupts() -> None:
    """From now on Ctrl-C comes too late: what is stored must not be reported as interrupted."""
    import signal

    signal.signal(signal.SIGINT, lambda number, frame: None)  # one that is pending is raised first


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    with Progress(
        "[progress.description]{task.description}",
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(f"storing {name}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
