"""`lazyrestore ls`, `show`, `rm`, `verify`: what a store holds."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from lazyrestore.cli.words import Command, columns, complete_name, counted, nothing_stored, size
from lazyrestore.command import to_json

if TYPE_CHECKING:
    from lazyrestore.api import Snapshot
    from lazyrestore.store import Report

json_option = click.option("--json", "json_output", is_flag=True, help="Print JSON.")


DRAWN_COLUMNS = 48
SHADES = " ▁▂▃▄▅▆▇█"


@click.command("ls", cls=Command)
@json_option
@click.pass_obj
def ls_command(store: str, json_output: bool) -> None:
    """List the snapshots of the store.

    \b
    lazyrestore ls
    lazyrestore --store /srv/snapshots ls --json
    """
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
        click.echo(to_json(fields))
        return
    if not summaries:
        click.echo(f"no snapshots in {store}")
        return
    rows = [("NAME", "CREATED", "RAW", "STORED", "ADDED", "IN USE")]
    for each in summaries:
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.created))
        used = "yes" if each.pinned else "no"
        rows.append((each.name, created, size(each.raw_bytes), size(each.stored_bytes), size(each.added_bytes), used))
    click.echo("\n".join(columns(rows, frozenset((2, 3, 4)))))


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
    from lazyrestore.api import Store

    with Store.open(store, create=False) as opened, opened.get(name) as snapshot:
        facts = _facts(snapshot)
    if json_output:
        click.echo(to_json(facts))
        return
    vmas = ", ".join(f"{kind['count']} {name} ({size(kind['bytes'])})" for name, kind in facts["vmas"].items())
    rows = [
        ("name", facts["name"]),
        ("created", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["created"]))),
        ("process", f"{facts['pid']} ({facts['comm']}), user {facts['uid']}, in {facts['cwd']}"),
        ("executable", facts["executable"]),
        ("command", " ".join(facts["command"])),
        ("threads", f"{len(facts['threads'])}: {', '.join(sorted({thread['name'] for thread in facts['threads']}))}"),
        ("VMAs", vmas),
        ("memory", f"{facts['pages']} pages, {size(facts['raw_bytes'])} raw, {size(facts['stored_bytes'])} stored"),
        ("chunks", str(facts["chunks"])),
        ("working set", _drawn(facts["working_set"], facts["chunks"])),
        ("pause", f"{facts['pause_ms']:.1f} ms"),
        ("kernel", f"{facts['kernel']} (vdso {facts['vdso']})"),
        ("CPU", f"{len(facts['cpu_flags'])} features, XSAVE components {facts['xfeatures']:#x}"),
        ("files", f"{len(facts['files'])} mapped"),
        *(("descriptor", title) for title in facts["descriptors"]),
    ]
    click.echo("\n".join(columns(rows)))


def _drawn(working_set: dict[str, Any], total: int) -> str:
    """Where in the snapshot's memory, from its lowest to its highest address, the working set lies."""
    chunks = working_set["chunks"]
    if not chunks:
        return "not recorded yet: the first restore does that, while its process runs"
    share = Counter(number * DRAWN_COLUMNS // total for number in chunks)
    full = max(1, total // DRAWN_COLUMNS)
    picture = "".join(
        SHADES[min(len(SHADES) - 1, -(-share[k] * (len(SHADES) - 1) // full))] for k in range(DRAWN_COLUMNS)
    )
    return f"{len(chunks)} chunks, {size(working_set['bytes'])} |{picture}|"


def _facts(snapshot: Snapshot) -> dict[str, Any]:
    from lazyrestore.resources.descriptors import title

    manifest = snapshot.manifest
    counts: Counter[str] = Counter(vma.kind for vma in manifest.vmas)
    sizes: Counter[str] = Counter()
    for vma in manifest.vmas:
        sizes[vma.kind] += vma.size
    attributes, table = manifest.attributes, manifest.descriptors
    return {
        "name": snapshot.name,
        "created": manifest.created,
        "pid": manifest.pid,
        "comm": manifest.comm,
        "uid": attributes.credentials.uids[0],
        "cwd": attributes.cwd,
        "executable": attributes.executable,
        "command": [os.fsdecode(word) for word in attributes.command_line.split(b"\0")[:-1]],
        "threads": [{"tid": thread.tid, "name": os.fsdecode(thread.name)} for thread in manifest.threads],
        "vmas": {kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in sorted(counts)},
        "pages": snapshot.pages,
        "raw_bytes": snapshot.raw_bytes,
        "stored_bytes": snapshot.stored_bytes,
        "chunks": snapshot.chunks,
        "working_set": {"chunks": snapshot.working_set, "bytes": snapshot.working_set_bytes},
        "pause_ms": manifest.pause_ms,
        "kernel": manifest.host.kernel,
        "vdso": manifest.host.vdso_hash,
        "cpu_flags": manifest.host.cpu_flags,
        "xfeatures": manifest.host.xfeatures,
        "files": [file.path for file in manifest.files],
        "descriptors": [title(each.number, table.descriptions[each.description]) for each in table.descriptors],
    }


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
    from lazyrestore.store import ImageStore

    fields = []
    with ImageStore.open(store, create=False) as images:
        names = tuple(dict.fromkeys(names))
        images.find(names)
        for name in names:
            freed = images.rm(name)
            fields.append({"name": name, "freed_bytes": freed.stored_bytes, "still_in_use": freed.still_pinned})
            if not json_output:  # at once: the next may fail
                later = ", the rest once its processes have ended" if freed.still_pinned else ""
                click.echo(f"{name}: removed, {size(freed.stored_bytes)} freed{later}")
    if json_output:
        click.echo(to_json(fields))


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
    from lazyrestore.errors import ChunkInvalid
    from lazyrestore.store import ImageStore, Report

    if name is None and nothing_stored(store):
        report = Report()
    else:
        with ImageStore.open(store, create=False) as images:
            report = images.verify(name)
    if json_output:
        click.echo(to_json(_report(report)))
    else:
        for damage in report.damage:
            chunk = f", chunk at {damage.address:#x}" if damage.address is not None else ""
            click.echo(
                f"snapshot {damage.snapshot}{chunk}: {damage.reason}" if damage.snapshot else f"store: {damage.reason}",
                err=True,
            )
        click.echo(
            f"{counted(report.snapshots, 'snapshot')}, {counted(report.chunks, 'chunk')} "
            f"({size(report.raw_bytes)}) checked, "
            f"{len(report.damage)} damaged"
        )
    if report.damage:
        sys.exit(ChunkInvalid.exit_status)


def _report(report: Report) -> dict[str, Any]:
    damage = [{"snapshot": each.snapshot, "address": each.address, "reason": each.reason} for each in report.damage]
    return {"snapshots": report.snapshots, "chunks": report.chunks, "raw_bytes": report.raw_bytes, "damage": damage}
