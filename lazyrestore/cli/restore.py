"""`lazyrestore restore`: in the foreground a parent that passes signals and the terminal on, or detached."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TypedDict

import click

from lazyrestore.cli.parameters import Command, complete_name
from lazyrestore.commands import end_like_ctrl_c, say, to_json
from lazyrestore.commands.restore import detached, facts, foreground, streams
from lazyrestore.stand_ins import bring

if TYPE_CHECKING:
    from lazyrestore.api import Snapshot

NET = "same (the default): the network it had. new: a network namespace of its own, with only a loopback interface."
LAST_DESCRIPTOR = (1 << 31) - 1  # a C int


@click.command("restore", cls=Command)
@click.argument("name", shell_complete=complete_name)
@click.option(
    "--detach",
    is_flag=True,
    help="Print the process id and return; the process runs on by itself. On a terminal in a sentence, else alone.",
)
@click.option(
    "--pid",
    "pid_choice",
    type=click.Choice(["same", "new"]),
    help="same (the default): the old process id, which must be free. new (with -n the default): a PID namespace in "
    "which it is.",
)
@click.option(
    "-n",
    "--number",
    "count",
    type=click.IntRange(1),
    metavar="N",
    help="Start N copies, each in a PID namespace of its own, print their process ids and return.",
)
@click.option("--net", type=click.Choice(["same", "new"]), default="same", help=NET)
@click.option(
    "--listen", "ports", multiple=True, metavar="OLD:NEW", help="Listen on TCP port NEW instead of OLD. Repeatable."
)
@click.option("--reuseport", is_flag=True, help="Share the TCP ports with all that do the same (SO_REUSEPORT).")
@click.option(
    "--inherit-fd",
    "inherited",
    multiple=True,
    metavar="N[:M]",
    help="Give the process lazyrestore's descriptor M in place of its listening socket N. Without M: the next one of "
    "systemd's (LISTEN_FDS), else N. Repeatable.",
)
@click.option("--no-record", is_flag=True, help="Do not record which memory it needs first.")
@click.option(
    "--fill",
    type=click.Choice(["none", "idle", "now"]),
    default="none",
    show_default=True,
    help="Bring all of its memory, not just what it touches: when the CPUs have nothing else to do, or at once.",
)
@click.option(
    "--linger",
    type=click.FloatRange(0, 86400),
    metavar="SECONDS",
    help="If this is the first copy: how long what was decompressed stays for others when the last one has ended.  "
    "[default: 2]",
)
@click.option(
    "--keep-pipes",
    is_flag=True,
    help="With --detach or -n: let the copy have pipes that are lazyrestore's own standard streams. Otherwise it gets "
    "/dev/null for them, so that whoever reads the process id from one sees its end.",
)
@click.option(
    "--explain", is_flag=True, help="Print the system calls that would restore it this way, and restore nothing."
)
@click.option("--json", "json_output", is_flag=True, help="Print JSON (to standard error in the foreground).")
@click.pass_obj
def restore(
    store: str,
    name: str,
    detach: bool,
    pid_choice: str | None,
    count: int | None,
    net: str,
    ports: tuple[str, ...],
    reuseport: bool,
    inherited: tuple[str, ...],
    no_record: bool,
    fill: str,
    linger: float | None,
    keep_pipes: bool,
    explain: bool,
    json_output: bool,
) -> None:
    """Restore the snapshot NAME.

    In the foreground, lazyrestore is the parent of the process: it passes signals and the terminal on, and exits with
    the process's exit status (128 + N if signal N ended it).

    \b
    lazyrestore restore worker
    worker=$(lazyrestore restore worker --detach)
    lazyrestore restore worker --detach --json
    lazyrestore restore worker --pid new
    lazyrestore restore worker -n 50 --json
    lazyrestore restore worker --pid new --listen 8000:9000
    lazyrestore restore worker --explain | less
    """
    bring("socket")
    from lazyrestore.api import Store

    if count is not None and pid_choice == "same":
        raise click.UsageError("only one process can have the old process id: -n wants --pid new")
    shape: Shape = {
        "new_net": net == "new",
        "listen": _ports(ports),
        "reuseport": reuseport,
        "inherit_fd": _inherited(inherited),
    }
    choices: Choices = {
        **shape,
        "record": False if no_record else None,
        "fill": fill,
        "streams": streams(pipes=keep_pipes or not (detach or count is not None)),
    }
    new_pid = pid_choice == "new" or count is not None
    with Store.open(store, create=False) as opened, opened.get(name) as snapshot:
        if linger is not None:
            snapshot.linger = linger
        if explain:
            lines = snapshot.explain(new_pid=new_pid, **shape)
            say(to_json(lines) if json_output else "\n".join(lines))
        elif count is not None:
            end_like_ctrl_c()
            _start_clones(snapshot, count, choices, json_output)
        elif detach:
            detached(snapshot, {"new_pid": new_pid, **choices}, json_output)
        else:
            sys.exit(foreground(snapshot, {"new_pid": new_pid, "ends_with_caller": new_pid, **choices}, json_output))


class Shape(TypedDict):
    """What the list of system calls depends on."""

    new_net: bool
    listen: dict[int, int]
    reuseport: bool
    inherit_fd: dict[int, int]


class Choices(Shape):
    """What restore() is told."""

    record: bool | None
    fill: str
    streams: list[int]


def _ports(words: tuple[str, ...]) -> dict[int, int]:
    """{old: new} of OLD:NEW words."""
    ports: dict[int, int] = {}
    for word in words:
        old, colon, new = word.partition(":")
        if not colon or not all(part.isascii() and part.isdigit() and 0 < int(part) < 65536 for part in (old, new)):
            raise click.BadParameter(f"{word!r} is not OLD:NEW, two TCP ports", param_hint="--listen")
        if int(old) in ports:
            raise click.BadParameter(f"port {int(old)} is given twice", param_hint="--listen")
        ports[int(old)] = int(new)
    return ports


def _inherited(words: tuple[str, ...]) -> dict[int, int]:
    """{descriptor of the process: descriptor of ours} of N and N:M words."""
    if not words:
        return {}
    from lazyrestore.resources.listeners import from_systemd

    handed = from_systemd(os.environ, os.getpid())
    inherited: dict[int, int] = {}
    for word in words:
        number, colon, ours = word.partition(":")
        parts = (number, ours) if colon else (number,)
        if not all(part.isascii() and part.isdigit() and int(part) <= LAST_DESCRIPTOR for part in parts):
            raise click.BadParameter(f"{word!r} is not N or N:M, descriptors", param_hint="--inherit-fd")
        if int(number) in inherited:
            raise click.BadParameter(f"descriptor {int(number)} is given twice", param_hint="--inherit-fd")
        source = int(ours) if colon else handed.pop(0) if handed else int(number)
        try:
            os.fstat(source)
        except OSError as error:
            raise click.BadParameter(f"descriptor {source} is not open", param_hint="--inherit-fd") from error
        inherited[int(number)] = source
    return inherited


def _start_clones(snapshot: Snapshot, count: int, choices: Choices, json_output: bool) -> None:
    """Start them and print a process id per line, or a JSON list; if nobody can read that, none is left."""
    from lazyrestore.fleet import clones

    processes = snapshot.clones(count, **choices, held=True)
    try:
        if json_output:
            say(to_json([facts(process) for process in processes]))
        else:
            say("\n".join(str(process.pid) for process in processes))
        clones.let_go(processes)
    except BaseException:
        clones.end(processes)
        raise
