"""The plain forms of the usual commands, read without click.

Facts. Importing click costs as much as the bare interpreter, and most commands are `ls`, `restore NAME --detach` and
their like, with few options or none. Choice: words of these forms are read here, and all else, wrong words too, by
click; what a command does is the same function then. Cost: such forms have two readers; a test compares them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from lazyrestore.commands import default_store, failed
from lazyrestore.commands.words import is_process_id
from lazyrestore.stand_ins import bring

MANY = 1 << 20
FORMS = {  # by command: fewest and most names, and its flags
    "snapshot": (2, 2, ("--kill", "--replace", "--json")),  # the process, and --name NAME
    "restore": (1, 1, ("--detach", "--json")),
    "ls": (0, 0, ("--json",)),
    "show": (1, 1, ("--json",)),
    "rm": (1, MANY, ("--json",)),
    "verify": (0, 1, ("--json",)),
    "stats": (0, 0, ("--json",)),
}


class Words:
    """A plain command, what it names, its flags, and the store."""

    def __init__(self, command: str, names: tuple[str, ...], flags: set[str], store: str) -> None:
        self.command = command
        self.names = names
        self.flags = flags
        self.store = store


def read(words: Sequence[str]) -> Words | None:
    """What `lazyrestore [--store DIR] COMMAND [NAME...] [FLAG...]` asks for, of `snapshot` with `--name NAME`. None: it
    is something else, or may be."""
    left = list(words)
    store = None
    if left[:1] == ["--store"] and len(left) > 2:
        store, left = left[1], left[2:]
    if not left or left[0] not in FORMS or "_LAZYRESTORE_COMPLETE" in os.environ:
        return None
    command, *rest = left
    given = []
    if command == "snapshot" and "--name" in rest[:-1]:
        at = rest.index("--name")
        given, rest[at : at + 2] = [rest[at + 1]], []
    fewest, most, known = FORMS[command]
    flags = {word for word in rest if word in known}
    names = (*(word for word in rest if word not in known), *given)
    if not fewest <= len(names) <= most or any(not name or name.startswith("-") for name in names):
        return None
    if command == "snapshot" and not (given and is_process_id(names[0])):
        return None
    if store == "" or (store or "").startswith("-"):
        return None
    return Words(command, names, flags, store or os.environ.get("LAZYRESTORE_STORE") or default_store())


def run(words: Words) -> int:
    """Do it; returns the exit status."""
    try:
        return _run(words.command, words.names, words.store, words.flags)
    except BaseException as error:
        return failed(error, debug=False)


def _run(command: str, names: tuple[str, ...], store: str, flags: set[str]) -> int:
    json_output = "--json" in flags
    bring("msgspec")
    if command in ("restore", "stats", "show", "snapshot"):
        bring("socket")
    if command in ("snapshot", "verify"):
        bring("concurrent.futures.thread")
    if command == "restore":
        from lazyrestore.commands.restore import restore

        return restore(store, names[0], detach="--detach" in flags, json_output=json_output)
    if command == "show":
        from lazyrestore.commands.show import show

        show(store, names[0], json_output)
        return 0
    if command == "snapshot":
        from lazyrestore.commands.snapshot import snapshot

        kill, replace = "--kill" in flags, "--replace" in flags
        snapshot(store, int(names[0]), names[1], kill=kill, replace=replace, json_output=json_output)
        return 0
    if command == "stats":
        from lazyrestore.commands.stats import stats

        stats(store, None, json_output)
        return 0
    from lazyrestore.commands import listing

    if command == "verify":
        return listing.verify(store, names[0] if names else None, json_output)
    if command == "rm":
        listing.rm(store, names, json_output)
    else:
        listing.ls(store, json_output)
    return 0
