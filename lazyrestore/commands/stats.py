"""`lazyrestore stats`: what the pagers of a store count."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lazyrestore.commands import nothing_stored, say, to_json
from lazyrestore.commands.words import columns, counted, size

if TYPE_CHECKING:
    from lazyrestore.pager.client import PagerStats, ServiceTimes, SpaceStats

PAGE = 4096
COUNTS = ("FAULTS", "MISSING", "MINOR", "WRITE", "PAGES", "AHEAD", "ZERO")
HEADINGS = ("  PID", "KIND", *COUNTS, "RESIDENT", "P50", "P99")
REMOVED = "(removed)"  # as names of snapshots, which have no parentheses


def stats(store: str, pid: int | None, json_output: bool) -> None:
    """Of all restored processes of the store, or of one of whatever store."""
    from lazyrestore.errors import NoSuchProcess
    from lazyrestore.pager.launch import connect_all

    names = _names_by_socket(store)
    others = 0
    found = []
    for path, client in connect_all():
        with client:
            answer = client.stats()
        name = names.get(path, "(of another store)")
        served = [space for space in answer.spaces if pid is None or space.pid == pid]
        if served and (path in names or pid is not None):
            found.append(_fields(name, answer, pid))
        elif served:
            others += len(served)
    if pid is not None and not found:
        raise NoSuchProcess(
            f"process {pid}", "stats", "no pager serves it", "`lazyrestore stats` shows those that are served"
        )
    if json_output:
        say(to_json(found))
        return
    if not found:
        say("no restored process of this store runs")
    for each in found:
        say("\n".join(_lines(each)))
    if others:
        say(f"({others} of other stores: name the store with --store, or the process id)")


def _names_by_socket(store: str) -> dict[str, str]:
    """The store's snapshots by the socket on which their pager listens, if they have one; removed ones too."""
    from lazyrestore.pager.launch import socket_path
    from lazyrestore.store import ImageStore

    if nothing_stored(store):
        return {}
    with ImageStore.open(store, create=False) as images:
        names = {number: name for name, number in images.names().items()}
        return {socket_path(key): names.get(number, REMOVED) for key, number in images.keys().items()}


def _fields(name: str, stats: PagerStats, pid: int | None) -> dict[str, Any]:
    counters = stats.counters
    return {
        "snapshot": name,
        "uptime_s": stats.uptime_ns / 1e9,
        "chunks": stats.chunks_total,
        "chunks_filled": stats.chunks_filled,
        "chunks_bad": stats.chunks_bad,
        "resident_share": stats.chunks_filled / stats.chunks_total if stats.chunks_total else 0.0,
        "bytes_decompressed": stats.bytes_filled,
        "bytes_read": stats.bytes_read,
        "faults": counters.missing + counters.minor,
        "faults_missing": counters.missing,
        "faults_minor": counters.minor,
        "faults_write": counters.write,
        "faults_zero": counters.zero_faults,
        "service": _service(stats.service),
        "processes": [_space(space) for space in stats.spaces if pid is None or space.pid == pid],
    }


def _service(times: ServiceTimes) -> dict[str, float]:
    return {"p50_us": times.p50_ns / 1e3, "p99_us": times.p99_ns / 1e3, "max_us": times.max_ns / 1e3}


def _space(space: SpaceStats) -> dict[str, Any]:
    counters = space.counters
    installed = (counters.pages + counters.replayed + counters.zero_pages) * PAGE
    return {
        "pid": space.pid,
        "generation": space.generation,
        "faults": counters.missing + counters.minor,
        "faults_missing": counters.missing,
        "faults_minor": counters.minor,
        "faults_write": counters.write,
        "pages_installed": counters.pages,
        "pages_replayed": counters.replayed,
        "zero_pages_installed": counters.zero_pages,
        "bytes_lazy": space.bytes_registered,
        "resident_share": min(1.0, installed / space.bytes_registered) if space.bytes_registered else 0.0,
        "intervals": space.intervals,
        "service": _service(space.service),
    }


def _lines(each: dict[str, Any]) -> list[str]:
    service = each["service"]
    head = (
        f"{each['snapshot']}: {each['chunks_filled']} of {each['chunks']} chunks filled "
        f"({each['resident_share']:.1%}), {size(each['bytes_decompressed'])} decompressed, "
        f"{counted(each['faults'], 'fault')} (p50 {service['p50_us']:.0f} µs, p99 {service['p99_us']:.0f} µs, "
        f"max {service['max_us']:.0f} µs), up since "
        f"{time.strftime('%H:%M:%S', time.localtime(time.time() - each['uptime_s']))}"
    )
    rows = [HEADINGS, *(_row(space) for space in each["processes"])]
    return [head, *columns(rows, frozenset(range(2, len(HEADINGS))))]


def _row(space: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"  {space['pid'] or '?'}",
        "restored" if not space["generation"] else f"forked ({space['generation']})",
        str(space["faults"]),
        str(space["faults_missing"]),
        str(space["faults_minor"]),
        str(space["faults_write"]),
        str(space["pages_installed"]),
        str(space["pages_replayed"]),
        str(space["zero_pages_installed"]),
        f"{space['resident_share']:.1%}",
        f"{space['service']['p50_us']:.0f} µs",
        f"{space['service']['p99_us']:.0f} µs",
    )
