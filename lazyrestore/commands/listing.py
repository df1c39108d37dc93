"""`lazyrestore ls`, `rm`, `verify`: what a store holds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lazyrestore.commands import complain, nothing_stored, say, tell_of_waiting, to_json
from lazyrestore.commands.words import columns, counted, size
from lazyrestore.errors import ESCAPED

if TYPE_CHECKING:
    from lazyrestore.store import Report


def ls(store: str, json_output: bool) -> None:
    """The snapshots of the store."""
    from lazyrestore.store import ImageStore

    if nothing_stored(store):
        summaries = []
    else:
        with ImageStore.open(store, create=False) as images:
            summaries = images.ls()
    if json_output:
        fields = [
            {
                "name": each.name,
                "created": each.created,
                "raw_bytes": each.raw_bytes,
                "stored_bytes": each.stored_bytes,
                "added_bytes": each.added_bytes,
                "chunks": each.chunks,
                "in_use": each.pinned,
            }
            for each in summaries
        ]
        say(to_json(fields))
        return
    if not summaries:
        say(f"no snapshots in {store}".translate(ESCAPED))
        return
    rows = [("NAME", "CREATED", "RAW", "STORED", "ADDED", "IN USE")]
    for each in summaries:
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.created))
        used = "yes" if each.pinned else "no"
        rows.append((each.name, created, size(each.raw_bytes), size(each.stored_bytes), size(each.added_bytes), used))
    say("\n".join(columns(rows, frozenset((2, 3, 4)))))


def rm(store: str, names: tuple[str, ...], json_output: bool) -> None:
    """Remove them: all, or none if one of them does not exist. What was removed is told at the end, however that comes:
    that it cannot be told is no reason to leave the rest."""
    from lazyrestore.store import ImageStore

    tell_of_waiting()
    fields: list[dict[str, Any]] = []
    lines = []
    with ImageStore.open(store, create=False) as images:
        names = tuple(dict.fromkeys(names))
        images.find(names)
        try:
            for name in names:
                freed = images.rm(name)
                fields.append({"name": name, "freed_bytes": freed.stored_bytes, "still_in_use": freed.still_pinned})
                later = ", the rest once its processes have ended" if freed.still_pinned else ""
                lines.append(f"{name}: removed, {size(freed.stored_bytes)} freed{later}")
        finally:
            if fields:
                done = f"{counted(len(fields), 'snapshot')} removed"
                say(to_json(fields) if json_output else "\n".join(lines), done)


def verify(store: str, name: str | None, json_output: bool) -> int:
    """Check one snapshot or all. Returns the exit status."""
    from lazyrestore.errors import ChunkInvalid
    from lazyrestore.store import ImageStore, Report

    if name is None and nothing_stored(store):
        report = Report()
    else:
        with ImageStore.open(store, create=False) as images:
            report = images.verify(name)
    if json_output:
        say(to_json(_report(report)))
    else:
        for damage in report.damage:
            chunk = f", chunk at {damage.address:#x}" if damage.address is not None else ""
            where = f"snapshot {damage.snapshot}{chunk}" if damage.snapshot else "store"
            complain(f"{where}: {damage.reason}")
        say(
            f"{counted(report.snapshots, 'snapshot')}, {counted(report.chunks, 'chunk')} "
            f"({size(report.raw_bytes)}) checked, "
            f"{len(report.damage)} damaged"
        )
    return ChunkInvalid.exit_status if report.damage else 0


def _report(report: Report) -> dict[str, Any]:
    damage = [{"snapshot": each.snapshot, "address": each.address, "reason": each.reason} for each in report.damage]
    return {"snapshots": report.snapshots, "chunks": report.chunks, "raw_bytes": report.raw_bytes, "damage": damage}
