"""Freeing what no snapshot refers to. The caller holds the writer lock.

Facts. A snapshot that no name points to is *doomed*; its packs are freed once nobody pins it. A pack that no snapshot,
visible or doomed, lists is garbage: left by a writer that was killed, or by a snapshot just freed. LMDB keeps freed
pages for itself and never shortens its file; it writes to a freed page again no matter whether the file has a hole
there, so on a full disk that fails. To delete a value it reads the header at the start of the value's first page.
Consequence. The disk space of garbage can be given back by punching a hole into the file, as long as it is still in the
tree, since nobody else can be given its pages then; and must be, before the transaction that deletes it needs room.
Choice. Make durable that no snapshot lists the packs; punch all but each one's first page; then delete them, in groups.
Killed in between, there is a pack of zeros that nobody reads, and the next writer, before it looks anything up, starts
again. What a failed commit wrote behind the last page in use is punched too, while no transaction can come in.
Cost. 4 KiB per freed pack, and the sparse file's length, until they are used again.
"""

from __future__ import annotations

import ctypes
import os

import msgspec

from lazyrestore.store import format, locks, reserve
from lazyrestore.store.environment import Environment, Transaction

GROUP = 64  # packs per transaction: 256 MiB, and a freed-page list that fits into memory many times over
KEEP_SIZE, PUNCH_HOLE = 1, 2  # FALLOC_FL_*, <linux/falloc.h>, since Linux 2.6.38

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Freed(msgspec.Struct, frozen=True):
    """What was freed. stored_bytes: bytes of packs; still_pinned: removed snapshots that are in use, to be freed
    later."""

    snapshots: int = 0
    packs: int = 0
    stored_bytes: int = 0
    still_pinned: int = 0


def collect(environment: Environment) -> Freed:
    """Free doomed snapshots that nobody pins, and packs that no snapshot lists. Raises StoreError; may be run again."""
    environment.alone(lambda: _punch(environment, [environment.unused_tail()]))
    snapshots, still_pinned = _free_doomed(environment)
    with environment.read() as txn:
        garbage = sorted(set(environment.keys(txn, format.PACKS)) - _listed_packs(environment, txn))
    stored = 0
    for at in range(0, len(garbage), GROUP):
        stored += _free_packs(environment, garbage[at : at + GROUP])
    reserve.allocate(environment.directory)
    return Freed(snapshots, len(garbage), stored, still_pinned)


def _free_doomed(environment: Environment) -> tuple[int, int]:
    """How many snapshots were freed, and how many are pinned."""
    with environment.read() as txn:
        named = {format.number_of(value, environment.resource) for _, value in environment.records(txn, format.NAMES)}
        doomed = [number for number in environment.keys(txn, format.SNAPSHOTS) if number not in named]
    if not doomed:
        return 0, 0
    locks.mark_removed(environment.directory, doomed)  # before the pins are looked at: see main.c, free_if_removed()
    with locks.FreeingLock(environment.directory) as lock:
        free = [number for number in doomed if lock.take(number)]

        def remove(txn: Transaction) -> None:
            for number in free:
                for table in format.TABLES_OF_A_SNAPSHOT:
                    txn.delete(format.key(table, number))

        if free:
            environment.update(remove, removes=True)
    return len(free), len(doomed) - len(free)


def _listed_packs(environment: Environment, txn: Transaction) -> set[int]:
    listed: set[int] = set()
    for _, value in environment.records(txn, format.SNAPSHOTS):
        listed.update(format.decode(value, format.Record, environment.resource).packs)
    return listed


def _free_packs(environment: Environment, packs: list[int]) -> int:
    """Remove packs and what leads to them; returns their bytes."""
    stored = 0
    holes = []
    with environment.read() as txn:
        for pack in packs:
            value = environment.need(txn, format.key(format.PACKS, pack))
            start, end = environment.pages_of(value)
            holes.append((start + environment.page, end))
            stored += len(value)
    environment.sync()
    _punch(environment, holes)

    def remove(txn: Transaction) -> None:
        for pack in packs:
            contents = bytes(txn.get(format.key(format.CONTENTS, pack), b""))
            for at in range(0, len(contents) - format.HASH + 1, format.HASH):
                chunk = format.CHUNKS + contents[at : at + format.HASH]
                location = txn.get(chunk)
                if location is not None and format.LOCATION.unpack(location)[0] == pack:
                    txn.delete(chunk)
            txn.delete(format.key(format.CONTENTS, pack))
            txn.delete(format.key(format.PACKS, pack))

    environment.update(remove, removes=True)
    return stored


def _punch(environment: Environment, holes: list[tuple[int, int]]) -> None:
    """Give parts of the file (offsets, end exclusive) back to the file system, if it knows how."""
    descriptor = os.open(environment.data_path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for start, end in holes:
            if start < end and _libc.fallocate(descriptor, KEEP_SIZE | PUNCH_HOLE, start, end - start):
                return  # EOPNOTSUPP: the space is still LMDB's to use again
    finally:
        os.close(descriptor)
