"""`lazyrestore snapshot`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from lazyrestore.cli.parameters import Command, ProcessId
from lazyrestore.commands import say, tell_of_waiting, to_json
from lazyrestore.commands.words import size


@click.command("snapshot", cls=Command)
@click.argument("pid", type=ProcessId("`pidof {0}` or `pgrep {0}` may find it"))
@click.option("--name", required=True, help="The snapshot's name: letters, digits, . _ : @ + -")
@click.option("--tree", is_flag=True, hidden=True)  # docs/limits.md
@click.option("--kill", is_flag=True, help="End the process once the snapshot is safely stored.")
@click.option("--replace", is_flag=True, help="Replace a snapshot of that name.")
@click.option("--level", type=click.IntRange(1, 19), default=1, show_default=True, help="Compression level (zstd).")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def snapshot_command(
    store: str, pid: int, name: str, tree: bool, kill: bool, replace: bool, level: int, json_output: bool
) -> None:
    """Snapshot the running process PID.

    The process runs on as if nothing had happened, unless --kill is given. What cannot be restored (an established
    connection, a child process, …) is listed and refused before the process is touched.

    \b
    lazyrestore snapshot 4242 --name worker
    lazyrestore snapshot $(pidof redis-server) --name cache --kill
    """
    from lazyrestore.api import Store

    if tree:
        raise click.UsageError("--tree is not available yet: a process with children is refused.")
    tell_of_waiting()
    with Store.open(store) as opened, _progress(name) as report:
        snapshot = opened.snapshot(
            pid, name=name, kill=kill, replace=replace, level=level, progress=report, committing=_ignore_interrupts
        )
    done = f"snapshot {name} is stored{' and the process ended' if kill else ''}"
    ratio = snapshot.raw_bytes / snapshot.stored_bytes if snapshot.stored_bytes else 0.0
    if json_output:
        fields = {
            "name": name,
            "pid": pid,
            "pages": snapshot.pages,
            "raw_bytes": snapshot.raw_bytes,
            "stored_bytes": snapshot.stored_bytes,
            "ratio": round(ratio, 3),
            "pause_ms": round(snapshot.pause_ms, 3),
            "seconds": round(snapshot.seconds, 3),
            "killed": kill,
        }
        say(to_json(fields), done)
        return
    say(
        f"{name}: {snapshot.pages} pages, {size(snapshot.raw_bytes)} raw, {size(snapshot.stored_bytes)} stored "
        f"(ratio {ratio:.2f}), paused {snapshot.pause_ms:.1f} ms, took {snapshot.seconds:.2f} s",
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
