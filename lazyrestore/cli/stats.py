"""`lazyrestore stats`."""

from __future__ import annotations

import click

from lazyrestore.cli.parameters import Command, ProcessId


@click.command("stats", cls=Command)
@click.argument("pid", type=ProcessId("`lazyrestore stats` shows all, with their snapshots"), required=False)
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def stats_command(store: str, pid: int | None, json_output: bool) -> None:
    """Show what the pagers count, per restored process: all that were restored from this store, also from snapshots
    that were removed since, or only PID, of whatever store.

    \b
    lazyrestore stats
    lazyrestore stats 4242 --json

    Each snapshot has one pager, which brings the memory of all its processes: a line for the pager, and one for each
    process.

    \b
    KIND      restored, or forked by a restored process (how many forks deep)
    FAULTS    touches that waited for the pager: MISSING + MINOR
    MISSING   the page was not there for any process yet
    MINOR     it was, but this process had not touched it
    WRITE     how many of the faults were writes
    PAGES     pages (4 KiB) of stored memory that its faults brought
    AHEAD     pages of the working set that it was given before it touched them
    ZERO      pages of zeros that it was given
    RESIDENT  PAGES, AHEAD and ZERO, as a share of its lazy memory
    P50, P99  how long the pager takes for half, for 99 % of the faults

    A pager's line counts what it did since it began, also for processes that have ended.
    """
    from lazyrestore.commands.stats import stats

    stats(store, pid, json_output)
