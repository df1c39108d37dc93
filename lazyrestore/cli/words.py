"""How numbers are written for people, and records for programs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from lazyrestore.stand_ins import bring

LARGEST_PID = (1 << 31) - 1  # a C int


def size(count: float) -> str:
    """Bytes in binary units: "12.3 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def columns(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Rows of words as aligned lines; the columns in `right` are aligned to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            word.rjust(width) if index in right else word.ljust(width)
            for index, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def nothing_stored(store: str) -> bool:
    """Whether it is the default store and was not made yet: then it is as good as empty. One that was named must be."""
    from lazyrestore.command import default_store

    return store == default_store() and not os.path.lexists(store)


class Command(click.Command):
    """A command that needs msgspec when it runs, though not to show its help."""

    def invoke(self, ctx: click.Context) -> object:
        bring("msgspec")
        return super().invoke(ctx)


def counted(count: int, noun: str) -> str:
    """ "1 chunk", "2 chunks"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class ProcessId(click.ParamType[int]):
    """A process id; `hint` says how one gets it for the name of a program."""

    name = "pid"

    def __init__(self, hint: str) -> None:
        self._hint = hint

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        word = str(value)
        if not (word.isascii() and word.isdigit() and 0 < int(word) <= LARGEST_PID):
            hint = f"; {self._hint.format(word)}" if any(letter.isalpha() for letter in word) else ""
            self.fail(f"{word!r} is not a process id{hint}", param, ctx)
        return int(word)


def complete_name(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The store's snapshot names that begin with what was typed."""
    from lazyrestore.command import default_store
    from lazyrestore.errors import LazyrestoreError
    from lazyrestore.store import ImageStore

    root = ctx.find_root()
    store = ctx.obj or root.params.get("store") or os.environ.get("LAZYRESTORE_STORE") or default_store()
    try:
        with ImageStore.open(store, create=False) as images:
            return [each.name for each in images.ls() if each.name.startswith(incomplete)]
    except LazyrestoreError:
        return []
