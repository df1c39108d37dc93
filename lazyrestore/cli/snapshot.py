"""`lazyrestore snapshot`."""

from __future__ import annotations

import click

from lazyrestore.cli.parameters import Command, ProcessId
from lazyrestore.stand_ins import bring


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
    if tree:
        raise click.UsageError("--tree is not available yet: a process with children is refused.")
    bring("socket")
    bring("concurrent.futures.thread")
    from lazyrestore.commands.snapshot import snapshot

    snapshot(store, pid, name, kill=kill, replace=replace, json_output=json_output, level=level)
