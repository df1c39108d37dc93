"""`lazyrestore show`: what a snapshot holds."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from lazyrestore.commands import say, to_json
from lazyrestore.commands.words import columns, size

if TYPE_CHECKING:
    from lazyrestore.api import Snapshot

DRAWN_COLUMNS = 48
SHADES = " ▁▂▃▄▅▆▇█"


def show(store: str, name: str, json_output: bool) -> None:
    """Process, threads, memory, descriptors, and what it needs."""
    from lazyrestore.api import Store

    with Store.open(store, create=False) as opened, opened.get(name) as snapshot:
        facts = _facts(snapshot)
    if json_output:
        say(to_json(facts))
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
    say("\n".join(columns(rows)))


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
