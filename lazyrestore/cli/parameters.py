"""What the words of several commands have in common: process ids, names of snapshots."""

from __future__ import annotations

import os

import click

from lazyrestore import cli
from lazyrestore.commands.words import is_process_id
from lazyrestore.stand_ins import bring


class Command(cli.Command):
    """A command that needs msgspec when it runs, though not to show its help."""

    def invoke(self, ctx: click.Context) -> object:
        bring("msgspec")
        return super().invoke(ctx)


class ProcessId(click.ParamType[int]):
    """A process id; `hint` says how one gets it for the name of a program."""

    name = "pid"

    def __init__(self, hint: str) -> None:
        self._hint = hint

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        word = str(value)
        if not is_process_id(word):
            hint = f"; {self._hint.format(word)}" if any(letter.isalpha() for letter in word) else ""
            self.fail(f"{word!r} is not a process id{hint}", param, ctx)
        return int(word)


def complete_name(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The store's snapshot names that begin with what was typed."""
    from lazyrestore.commands import default_store
    from lazyrestore.errors import LazyrestoreError
    from lazyrestore.store import ImageStore

    root = ctx.find_root()
    store = ctx.obj or root.params.get("store") or os.environ.get("LAZYRESTORE_STORE") or default_store()
    try:
        with ImageStore.open(store, create=False) as images:
            return [each.name for each in images.ls() if each.name.startswith(incomplete)]
    except LazyrestoreError:
        return []
