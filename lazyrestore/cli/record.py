"""`lazyrestore record`: run a copy until it has done what matters, and keep what memory that took."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import click

from lazyrestore.cli.parameters import Command, complete_name
from lazyrestore.commands import complain, end_like_ctrl_c, say, tell_of_waiting, to_json
from lazyrestore.commands.words import size
from lazyrestore.errors import LazyrestoreError

if TYPE_CHECKING:
    from lazyrestore.api import RestoredProcess, Snapshot
    from lazyrestore.readiness import ReadySocket

QUIET_SECONDS = 1.0
LOOK_SECONDS = 0.1
ANSWER_SECONDS = 60.0
REQUEST = "GET / HTTP/1.0\\r\\n\\r\\n"


@click.command("record", cls=Command)
@click.argument("name", shell_complete=complete_name)
@click.option(
    "--until-port", "address", metavar="PORT", help="Until it answers there: a TCP port or a Unix socket's path."
)
@click.option("--request", metavar="TEXT", help=f"What to ask at that port.  [default: {REQUEST}]")
@click.option("--until-ready", is_flag=True, help="Until it says READY=1 at the NOTIFY_SOCKET it was started with.")
@click.option("--for", "seconds", type=click.FloatRange(0, 86400), metavar="SECONDS", help="For so long.")
@click.option("--pid", "pid_choice", type=click.Choice(["same", "new"]), default="same", help="As with restore.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def record_command(
    store: str,
    name: str,
    address: str | None,
    request: str | None,
    until_ready: bool,
    seconds: float | None,
    pid_choice: str,
    json_output: bool,
) -> None:
    """Record the working set of the snapshot NAME: restore it, let it do its first work, end it.

    The chunks of memory that it touches are kept, in that order, and brought to later copies before they ask. The first
    restore does this by itself, until the process touches nothing new for a second; here you say until when. What an
    earlier recording found is kept too.

    \b
    lazyrestore record worker --until-port 8000
    lazyrestore record worker --until-port /run/worker.sock --request 'GET /warm HTTP/1.0\\r\\n\\r\\n'
    lazyrestore record worker --until-ready --pid new
    lazyrestore record worker --for 5
    """
    from lazyrestore.api import Store
    from lazyrestore.working_set import keep

    if (address is not None) + (seconds is not None) + until_ready > 1:
        raise click.UsageError("--until-port, --until-ready and --for exclude each other")
    if request is not None and address is None:
        raise click.UsageError("--request says what to ask at --until-port, which is missing")
    request = REQUEST if request is None else request
    try:
        question = request.encode("latin-1").decode("unicode_escape").encode("latin-1")
    except ValueError as error:
        raise click.BadParameter(f"{request!r}: {error}", param_hint="--request") from error
    if address is not None and address.isdecimal() and not 0 < int(address) < 65536:
        raise click.BadParameter(f"{address} is no TCP port", param_hint="--until-port")
    end_like_ctrl_c()
    tell_of_waiting()
    with Store.open(store, create=False) as opened, opened.get(name) as snapshot, contextlib.ExitStack() as owned:
        new_pid = pid_choice == "new"
        ready = owned.enter_context(snapshot.listen_for_ready(new_pid=new_pid)) if until_ready else None
        process = snapshot.restore(new_pid=new_pid, record=True, ready=ready, ends_with_caller=new_pid)
        try:
            if address is not None:
                _warn_of_another_port(snapshot, address)
                _ask(process, _place(snapshot, address), question)
            elif ready is not None:
                _await_ready(ready, process)
            elif seconds is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
            else:
                _await_quiet(snapshot, process)
            snapshot.end_recording()
            kept = keep(opened.path, name, snapshot.id)
        finally:
            process.kill()
            process.wait()
    with Store.open(store, create=False) as opened, opened.get(name) as snapshot:
        chunks, found = len(snapshot.working_set), snapshot.working_set_bytes
    if json_output:
        say(to_json({"name": name, "kept": kept, "chunks": chunks, "bytes": found}))
    elif kept:
        say(f"{name}: working set of {chunks} chunks, {size(found)}")
    else:
        say(f"{name}: it touched nothing; the working set is as it was")


def _warn_of_another_port(snapshot: Snapshot, address: str) -> None:
    """It may begin to listen there yet; who mistyped should not have to wait to learn it."""
    from lazyrestore.resources.listeners import ports_of

    ports = ports_of(snapshot.manifest.descriptors)
    if address.isdecimal() and int(address) not in ports:
        there = ", ".join(map(str, ports)) or "none"
        text = f"{snapshot.name} listens on TCP ports: {there}; waiting for it to answer on {address}"
        complain(f"lazyrestore: {text}")


def _place(snapshot: Snapshot, address: str) -> tuple[str, int] | str:
    """(host, port), or a path."""
    from lazyrestore.resources.listeners import host_at

    return (host_at(snapshot.manifest.descriptors, int(address)), int(address)) if address.isdecimal() else address


def _ask(process: RestoredProcess, place: tuple[str, int] | str, request: bytes) -> None:
    """Until the first byte of an answer. Raises LazyrestoreError if the process ends first, or stays silent."""
    address = place if isinstance(place, str) else f"{place[0]} port {place[1]}"
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            with _connected(place) as connection:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                connection.sendall(request)
                if connection.recv(1):
                    return
                reason = "it closed the connection without an answer"
        except OSError as error:
            reason = str(error)
        if process.poll() is not None:
            reason = f"the process ended with {process.returncode} before it answered at {address}"
            raise _not_recorded(process, reason)
        if time.monotonic() > deadline:
            raise _not_recorded(process, f"no answer at {address} within {ANSWER_SECONDS:.0f} s: {reason}")
        time.sleep(0.001)


def _connected(place: tuple[str, int] | str) -> socket.socket:
    if isinstance(place, tuple):
        return socket.create_connection(place, timeout=ANSWER_SECONDS)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(ANSWER_SECONDS)
    connection.connect(place)
    return connection


def _await_ready(ready: ReadySocket, process: RestoredProcess) -> None:
    """Until READY=1. Raises RestoreError if the process ends first, LazyrestoreError if it stays silent."""
    try:
        ready.wait(process.poll, ANSWER_SECONDS)
    except TimeoutError:
        raise _not_recorded(process, f"no READY=1 within {ANSWER_SECONDS:.0f} s") from None


def _not_recorded(process: RestoredProcess, reason: str) -> LazyrestoreError:
    return LazyrestoreError(f"snapshot {process.name}", "record", reason, "the working set is as it was")


def _await_quiet(snapshot: Snapshot, process: RestoredProcess) -> None:
    """Until it has touched nothing new for a while, or has ended."""
    before, since = -1, time.monotonic()
    while process.poll() is None and time.monotonic() - since < QUIET_SECONDS:
        stats = snapshot.pager_stats()
        faults = stats.faults if stats else before
        if faults != before:
            before, since = faults, time.monotonic()
        time.sleep(LOOK_SECONDS)
