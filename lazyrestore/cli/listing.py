"""`lazyrestore ls`, `show`, `rm`, `verify`."""

from __future__ import annotations

import sys

import click

from lazyrestore.cli.parameters import Command, complete_name

json_option = click.option("--json", "json_output", is_flag=True, help="Print JSON.")


@click.command("ls", cls=Command)
@json_option
@click.pass_obj
def ls_command(store: str, json_output: bool) -> None:
    """List the snapshots of the store.

    \b
    lazyrestore ls
    lazyrestore --store /srv/snapshots ls --json
    """
    from lazyrestore.commands.listing import ls

    ls(store, json_output)


@click.command("show", cls=Command)
@click.argument("name", shell_complete=complete_name)
@json_option
@click.pass_obj
def show_command(store: str, name: str, json_output: bool) -> None:
    """Show what the snapshot NAME holds: process, threads, memory, descriptors, and what it needs.

    \b
    lazyrestore show worker
    lazyrestore show worker --json | jq .vmas
    """
    from lazyrestore.commands.show import show

    show(store, name, json_output)


@click.command("rm", cls=Command)
@click.argument("names", nargs=-1, required=True, shell_complete=complete_name)
@json_option
@click.pass_obj
def rm_command(store: str, names: tuple[str, ...], json_output: bool) -> None:
    """Remove the snapshots NAMES: all of them, or none if one of them does not exist.

    What restored processes still need is freed when they have ended; `lazyrestore stats` shows these processes.

    \b
    lazyrestore rm worker
    """
    from lazyrestore.commands.listing import rm

    rm(store, names, json_output)


@click.command("verify", cls=Command)
@click.argument("name", required=False, shell_complete=complete_name)
@json_option
@click.pass_obj
def verify_command(store: str, name: str | None, json_output: bool) -> None:
    """Check every chunk of the snapshot NAME, or of all: bounds, checksums, hashes. Exit status 29 if there is damage.

    \b
    lazyrestore verify
    lazyrestore verify worker --json
    """
    from lazyrestore.commands.listing import verify

    sys.exit(verify(store, name, json_output))
