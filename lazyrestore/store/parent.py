"""The chunks of a snapshot that another snapshot of the same store may refer to, without reading them.

Facts. A snapshot's index, hashes and packs do not change; whoever holds the writer lock is the only one who may free
them, and a snapshot that is in use is not freed, whether it has a name or not.
Consequence. What is read here under the writer lock stays true until that lock is released, and a snapshot committed
under it that lists the packs keeps them.
Choice. All of the index is checked, by its checksums too, when it is opened, which is before a process stands still:
an entry that was damaged would be sound in the next index.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from lazyrestore.errors import ChunkInvalid
from lazyrestore.store import format
from lazyrestore.store.environment import Environment
from lazyrestore.store.image import index_of, manifest_of, record_of


class Reference(NamedTuple):
    """Image addresses [start, end) hold what the parent has at `source` and on, or zeros where it has nothing."""

    start: int
    end: int
    source: int


class Chunk(NamedTuple):
    """One of the parent's: image address, bytes, BLAKE3, LOCATION."""

    address: int
    length: int
    digest: bytes
    location: bytes


class Parent:
    """The index and hashes of snapshot `snapshot` (an id). Raises ChunkInvalid."""

    def __init__(self, environment: Environment, snapshot: int) -> None:
        self.snapshot = snapshot
        with environment.read() as txn:
            record = record_of(environment, txn, snapshot)
            manifest_of(environment, txn, snapshot, record)  # for the sake of the record's checksum
            index = bytes(index_of(environment, txn, snapshot, record))
            stored = environment.need(txn, format.key(format.INDEXES, snapshot))
            sums = format.sums_of(index) if record.sums else b""
            if stored[len(index) : len(index) + len(sums)] != sums:
                raise ChunkInvalid(
                    environment.resource, "read an index", "a checksum is wrong", "see `lazyrestore verify`"
                )
            self._hashes = bytes(environment.need(txn, format.key(format.HASHES, snapshot)))
            lengths = [len(environment.need(txn, format.key(format.PACKS, pack))) for pack in record.packs]
        if len(self._hashes) != record.chunks * format.HASH:
            reason = f"{len(self._hashes)} bytes for {record.chunks} chunks"
            raise ChunkInvalid(environment.resource, "read the hashes", reason, "see `lazyrestore verify`")
        self._packs = record.packs
        self._entries = list(format.entries(index))
        self._starts, self._ends = array("Q"), array("Q")
        end = 0
        for entry in self._entries:
            if fault := format.fault_in(entry, end, lengths):
                raise ChunkInvalid(environment.resource, f"chunk at {entry[0]:#x}", fault, "see `lazyrestore verify`")
            end = entry[0] + entry[1]
            self._starts.append(entry[0])
            self._ends.append(end)

    def at(self, address: int) -> tuple[int, int] | None:
        """Image addresses of the chunk that holds `address`: its start and end. None if none does."""
        number = bisect_right(self._ends, address)
        if number < len(self._starts) and self._starts[number] <= address:
            return self._starts[number], self._ends[number]
        return None

    def stored(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of image addresses [start, end) that lie in chunks, in order."""
        for number in range(bisect_right(self._ends, start), bisect_left(self._starts, end)):
            yield max(start, self._starts[number]), min(end, self._ends[number])

    def chunks(self, start: int, end: int) -> Iterator[Chunk]:
        """Those in image addresses [start, end), in order. ValueError if one lies there in part."""
        for border in (start, end):
            found = self.at(border)
            if found is not None and found[0] != border:
                raise ValueError(f"a chunk crosses image address {border:#x}, the border of a reference")
        for number in range(bisect_right(self._ends, start), bisect_left(self._starts, end)):
            address, length, slot, offset, stored = self._entries[number]
            digest = self._hashes[number * format.HASH : (number + 1) * format.HASH]
            yield Chunk(address, length, digest, format.LOCATION.pack(self._packs[slot], offset, stored, length))
