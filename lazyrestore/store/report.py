"""What a store holds and how much of it is shared."""

# Without `from __future__ import annotations`: msgspec would compile each annotation again to read it.

import os

import msgspec

from lazyrestore.store import format, locks
from lazyrestore.store.environment import Environment, Transaction
from lazyrestore.store.image import index_of, record_of


class Summary(msgspec.Struct, frozen=True):
    """A snapshot as `ls` shows it. created: seconds since 1970; raw_bytes: of all chunks; stored_bytes: compressed, of
    the distinct chunks; added_bytes: what of this was new to the store at the time; pinned: whether somebody uses it
    now."""

    name: str
    snapshot: int
    created: float
    raw_bytes: int
    stored_bytes: int
    added_bytes: int
    chunks: int
    packs: int
    pinned: bool


class Sharing(msgspec.Struct, frozen=True):
    """unique_bytes: compressed bytes of chunks that no other visible snapshot has; shared_bytes: of the others."""

    name: str
    raw_bytes: int
    unique_bytes: int
    shared_bytes: int
    chunks: int
    packs: int


class Totals(msgspec.Struct, frozen=True):
    """file_bytes: length of the sparse data file; disk_bytes: what it occupies; stored_bytes: all packs;
    referenced_bytes: chunks that visible snapshots have, each counted once; raw_bytes: all snapshots' chunks;
    deduplicated: 0 to 1, the share of compressed bytes that the snapshots have in common and so need not be stored
    again; removed: snapshots waiting for their last user."""

    file_bytes: int
    disk_bytes: int
    stored_bytes: int
    referenced_bytes: int
    raw_bytes: int
    deduplicated: float
    chunks: int
    packs: int
    removed: int
    snapshots: list[Sharing]


def names(environment: Environment, txn: Transaction) -> dict[str, int]:
    """Ids by name, sorted by name."""
    return {
        bytes(key).decode("ascii", "replace"): format.number_of(value, environment.resource)
        for key, value in environment.records(txn, format.NAMES)
    }


def info(environment: Environment, txn: Transaction, name: str, snapshot: int) -> Summary:
    record = record_of(environment, txn, snapshot)
    return Summary(
        name=name,
        snapshot=snapshot,
        created=record.created,
        raw_bytes=record.raw_bytes,
        stored_bytes=record.stored_bytes,
        added_bytes=record.added_bytes,
        chunks=record.chunks,
        packs=len(record.packs),
        pinned=locks.pinned(environment.directory, snapshot),
    )


def totals(environment: Environment) -> Totals:
    """Count everything; takes time and memory proportional to the number of chunks. Raises ChunkInvalid, StoreError."""
    with environment.read() as txn:
        visible = names(environment, txn)
        records = {name: record_of(environment, txn, snapshot) for name, snapshot in visible.items()}
        places = {name: _places(environment, txn, visible[name], record) for name, record in records.items()}
        packs = environment.keys(txn, format.PACKS)
        stored = sum(len(environment.need(txn, format.key(format.PACKS, pack))) for pack in packs)
        removed = len(environment.keys(txn, format.SNAPSHOTS)) - len(visible)
    users: dict[tuple[int, int], int] = {}
    referenced = 0
    for own in places.values():
        for place, length in own.items():
            if place not in users:
                referenced += length
            users[place] = users.get(place, 0) + 1
    sharing = []
    for name, own in places.items():
        unique = sum(length for place, length in own.items() if users[place] == 1)
        record = records[name]
        shared = sum(own.values()) - unique
        sharing.append(Sharing(name, record.raw_bytes, unique, shared, record.chunks, len(record.packs)))
    separate = sum(each.unique_bytes + each.shared_bytes for each in sharing)
    status = os.fstat(environment.fd)
    return Totals(
        file_bytes=status.st_size,
        disk_bytes=status.st_blocks * 512,
        stored_bytes=stored,
        referenced_bytes=referenced,
        raw_bytes=sum(record.raw_bytes for record in records.values()),
        deduplicated=1 - referenced / separate if separate else 0.0,
        chunks=sum(record.chunks for record in records.values()),
        packs=len(packs),
        removed=removed,
        snapshots=sharing,
    )


def _places(
    environment: Environment, txn: Transaction, snapshot: int, record: format.Record
) -> dict[tuple[int, int], int]:
    """Compressed length by (pack id, offset), of the distinct chunks."""
    index = index_of(environment, txn, snapshot, record)
    slots = len(record.packs)
    return {
        (record.packs[slot], offset): stored for _, _, slot, offset, stored in format.entries(index) if slot < slots
    }
