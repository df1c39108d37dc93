"""A snapshot opened for reading: where its index and packs stand in the data file, and a pin that keeps them there.

Facts. LMDB never moves the pages of a long value that exists (environment.py). A value exists as long as its snapshot,
visible or doomed, has a record; whoever frees a record first takes the exclusive lock on its pin (locks.py).
Consequence. While the pin is held, (file offset, length) of index and packs are valid for any process that has the data
file open, without a transaction and without LMDB.
Choice. open_image() pins first and looks again afterwards: a snapshot that was freed in between is looked up once more.
Offsets are verified one by one: one pread() per pack. Everything a reader takes from the index is checked before it is
used.
"""

# Without `from __future__ import annotations`: msgspec would compile each annotation again to read it.

import mmap
import os
import sys
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import msgspec

from lazyrestore.errors import ChunkInvalid, SnapshotNotFound
from lazyrestore.store import format, locks
from lazyrestore.store.environment import Environment, Transaction

Entry = tuple[int, int, int, int, int]  # image address, raw length, pack slot, offset in the pack, stored length


class StoredImage(msgspec.Struct, eq=False):
    """An open snapshot; close() it, or use it as a context manager.

    key: names this very snapshot in this very file, on this host; snapshot: its id; manifest_sum: its CRC-32; data_fd:
    the LMDB data file, read only; index_offset: bytes into it; n_chunks: 24-byte entries of the index; packs: (file
    offset, length in bytes) by slot; pin_fd: keeps all of this valid while any copy of the descriptor is open, in
    whatever process; stored_bytes: compressed bytes that the snapshot refers to; hugetlb: whether it has chunks for
    huge pages; sums: whether the index is followed by checksums; directory: the store's; working_set: format.TOUCHED
    each, in the order of first touch; empty if none was recorded; frames: format.FRAME each, of the working set's pack;
    frames_offset: bytes into data_fd, of the first of them. That pack may be replaced by another recording in spite of
    the pin: checksums tell. plan: what was committed beside the manifest, as opaque here; empty if nothing was.
    """

    name: str
    key: str
    snapshot: int
    manifest: bytes
    manifest_sum: int
    data_fd: int
    index_offset: int
    n_chunks: int
    packs: tuple[tuple[int, int], ...]
    pin_fd: int
    raw_bytes: int
    stored_bytes: int
    hugetlb: bool
    sums: bool = False
    directory: str = ""
    working_set: bytes = b""
    frames: bytes = b""
    frames_offset: int = 0
    plan: bytes = b""
    _lengths: list[int] = msgspec.field(default_factory=list)
    _map: mmap.mmap | None = None
    _skip: int = 0  # bytes of the map before the index
    _sound: dict[int, bytes] = msgspec.field(default_factory=dict)  # blocks of the index whose checksum was right

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes from image address `address`; zeros where nothing is stored. Raises ChunkInvalid."""
        result = bytearray(length)
        for start, content in self.contents(address, address + length):
            result[start - address : start - address + len(content)] = content
        return bytes(result)

    def contents(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """(image address, bytes) of what is stored between `start` and `end`, in order; the rest is zero. Raises
        ChunkInvalid."""
        first = self._first_after(start)
        previous = 0
        for number in range(max(0, first - 2), self.n_chunks):
            # Two entries before the first, and one behind the last, are checked too: where there is no checksum, a
            # single wrong entry cannot mislead the search without being out of order with a neighbour of its end.
            entry = self.entry(number, previous)
            address, length = entry[:2]
            previous = address + length
            if number < first:
                continue
            if address >= end:
                if number + 1 < self.n_chunks:
                    self.entry(number + 1, previous)
                break
            raw = self.decompress(entry)
            low, high = max(address, start), min(address + length, end)
            yield low, raw[low - address : high - address]

    def entry(self, number: int, previous: int = 0) -> Entry:
        """Chunk `number` of the index, checked; previous: image address where the one before ends. Raises
        ChunkInvalid."""
        sound = self.is_sound(number // format.INDEX_BLOCK)
        found = self.entry_within_bounds(number, previous)
        if not sound:
            raise self.invalid(found[0], f"the checksum of entries around number {number} of the index is wrong")
        return found

    def entry_within_bounds(self, number: int, previous: int) -> Entry:
        """As entry(), but for the checksum of its block. Raises ChunkInvalid."""
        block, place = divmod(number, format.INDEX_BLOCK)
        sound = self._sound.get(block)
        found = format.ENTRY.unpack_from(sound, place * format.ENTRY.size) if sound else self._entry(number)
        if fault := format.fault_in(found, previous, self._lengths):
            raise self.invalid(found[0], fault)
        return found

    def is_sound(self, block: int) -> bool:
        """Whether a block of the index is what was written; True where nothing was written to compare it with."""
        if not self.sums or block in self._sound:
            return True
        index = self._index()
        step = format.INDEX_BLOCK * format.ENTRY.size
        end = self._skip + self.n_chunks * format.ENTRY.size
        start = self._skip + block * step
        expected = index[end + 4 * block : end + 4 * block + 4]
        entries = index[start : min(start + step, end)]
        if format.sums_of(entries) != expected:
            return False
        self._sound[block] = entries
        return True

    def entries(self) -> Iterator[Entry]:
        """All of the index, in order, each checked. Raises ChunkInvalid."""
        previous = 0
        for number in range(self.n_chunks):
            entry = self.entry(number, previous)
            previous = entry[0] + entry[1]
            yield entry

    def decompress(self, entry: Entry) -> bytes:
        """The raw bytes of a checked entry. Raises ChunkInvalid."""
        address, length, slot, offset, stored = entry
        payload = self.read_data(self.packs[slot][0] + offset, stored)
        try:
            return format.decompress(payload, length)
        except ValueError as error:
            raise self.invalid(address, str(error)) from error

    def read_data(self, offset: int, length: int) -> bytes:
        """Bytes of the data file."""
        return os.pread(self.data_fd, length, offset)

    def invalid(self, address: int, reason: str) -> ChunkInvalid:
        return ChunkInvalid(
            f"snapshot {self.name}", f"chunk at {address:#x}", reason, "the store is damaged: see `lazyrestore verify`"
        )

    @property
    def pin_at(self) -> int:
        """The byte of the pins' file that stands for the snapshot."""
        return self.snapshot

    @property
    def recorder(self) -> list[str]:
        """The command that keeps a recorded working set, for a pager; see lazyrestore/working_set.py."""
        module = "lazyrestore.working_set"
        python = sys.executable
        known = python and os.path.basename(python).startswith("python")  # a program that embeds Python names itself
        return [python, "-I", "-m", module, self.directory, self.name, str(self.snapshot)] if known else []

    def close(self) -> None:
        """Close both descriptors; copies of pin_fd in other processes keep the pin."""
        if self._map is not None:
            self._map.close()
            self._map = None
        data, pin, self.data_fd, self.pin_fd = self.data_fd, self.pin_fd, -1, -1
        for descriptor in (data, pin):
            if descriptor >= 0:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _index(self) -> mmap.mmap:
        if self._map is None:
            self._skip = self.index_offset % mmap.ALLOCATIONGRANULARITY
            size = self._skip + max(1, self.n_chunks) * format.ENTRY.size
            size += 4 * -(-self.n_chunks // format.INDEX_BLOCK) if self.sums else 0
            start = self.index_offset - self._skip
            self._map = mmap.mmap(self.data_fd, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=start)
        return self._map

    def _entry(self, number: int) -> Entry:
        index = self._index()
        return format.ENTRY.unpack_from(index, self._skip + number * format.ENTRY.size)

    def _first_after(self, address: int) -> int:
        """The number of the first chunk that ends behind `address`."""
        low, high = 0, self.n_chunks
        while low < high:
            middle = (low + high) // 2
            start, length = self._entry(middle)[:2]
            if start + length <= address:
                low = middle + 1
            else:
                high = middle
        return low


def open_image(environment: Environment, name: str) -> StoredImage:
    """The snapshot `name`, pinned. Raises SnapshotNotFound, BadSnapshotName, ChunkInvalid, StoreError."""
    key = format.NAMES + format.check_name(name)
    while True:
        with environment.read() as txn:
            snapshot = find(environment, txn, name)
        pin = locks.pin(environment.directory, snapshot)
        data = -1
        try:
            with environment.read() as txn:
                if txn.get(key) == format.KEY.pack(snapshot):
                    data = os.dup(environment.fd)
                    image = _locate(environment, txn, name, snapshot, data, pin)
                    pin = data = -1
                    return image
        finally:
            for descriptor in (pin, data):
                if descriptor >= 0:
                    os.close(descriptor)


def key_of(environment: Environment, snapshot: int) -> str:
    """Names this very snapshot in this very file, on this host."""
    return f"{environment.uuid}-{environment.identity[0]:x}-{environment.identity[1]:x}-{snapshot}"


def find(environment: Environment, txn: Transaction, name: str) -> int:
    """The id of the snapshot called `name`. Raises SnapshotNotFound, BadSnapshotName."""
    found = txn.get(format.NAMES + format.check_name(name))
    if found is None:
        from difflib import get_close_matches

        known = [bytes(key).decode("ascii", "replace") for key, _ in environment.records(txn, format.NAMES)]
        by_letters = {each.lower(): each for each in known}
        near = get_close_matches(name.lower(), by_letters, 1)
        advice = f"did you mean {by_letters[near[0]]}?" if near else "`lazyrestore ls` shows what there is"
        raise SnapshotNotFound(f"snapshot {name}", reason=f"not in {environment.directory}", advice=advice)
    return format.number_of(found, environment.resource)


def record_of(environment: Environment, txn: Transaction, snapshot: int) -> format.Record:
    """The record of a snapshot. Raises ChunkInvalid."""
    data = environment.need(txn, format.key(format.SNAPSHOTS, snapshot))
    return format.decode(data, format.Record, environment.resource)


def manifest_of(environment: Environment, txn: Transaction, snapshot: int, record: format.Record) -> tuple[bytes, int]:
    """The manifest of a snapshot with this record, and its CRC-32. Raises ChunkInvalid if one of both is not what was
    committed."""
    manifest = bytes(environment.need(txn, format.key(format.MANIFESTS, snapshot)))
    manifest_sum = zlib.crc32(manifest)
    if record.sum is not None and record.sum != format.sum_of(record, manifest_sum):
        raise ChunkInvalid(
            environment.resource,
            "read a manifest",
            "it or its record is damaged: the checksum is wrong",
            "restore data.mdb from a backup, or take a new snapshot",
        )
    return manifest, manifest_sum


def index_of(environment: Environment, txn: Transaction, snapshot: int, record: format.Record) -> memoryview:
    """The entries of a snapshot's index, without what stands behind them. Raises ChunkInvalid."""
    value = environment.need(txn, format.key(format.INDEXES, snapshot))
    chunks = record.chunks
    sums = 4 * -(-chunks // format.INDEX_BLOCK) if record.sums else 0
    if chunks < 0 or chunks * format.ENTRY.size + sums > len(value):
        raise ChunkInvalid(
            environment.resource, "read an index", f"{len(value)} bytes for {chunks} chunks", "see `lazyrestore verify`"
        )
    return value[: chunks * format.ENTRY.size]


def _working_set(stored: bytes, chunks: int) -> bytes:
    """Its entries; nothing if it is damaged: it is advice, and a process starts without it too."""
    whole = len(stored) % format.TOUCHED.size == 0 and len(stored) <= chunks * format.TOUCHED.size
    return stored if whole else b""


def _frames(environment: Environment, value: memoryview, touched: int) -> tuple[bytes, int]:
    """The table of a working set's pack, and where in the data file its frames begin; nothing if it is damaged."""
    if len(value) < format.FRAMES.size:
        return b"", 0
    (count,) = format.FRAMES.unpack_from(value)
    begin = format.FRAMES.size + count * format.FRAME.size
    if begin > len(value):
        return b"", 0
    table = bytes(value[format.FRAMES.size : begin])
    frames = list(format.FRAME.iter_unpack(table))
    if sum(stored for stored, _, _ in frames) > len(value) - begin:
        return b"", 0
    if sum(chunks for _, chunks, _ in frames) > touched or not all(chunks for _, chunks, _ in frames):
        return b"", 0
    try:
        return table, environment.file_offset(value) + begin
    except ChunkInvalid:
        return b"", 0


def _locate(environment: Environment, txn: Transaction, name: str, snapshot: int, data: int, pin: int) -> StoredImage:
    record = record_of(environment, txn, snapshot)
    manifest, manifest_sum = manifest_of(environment, txn, snapshot, record)
    index = environment.need(txn, format.key(format.INDEXES, snapshot))
    index_of(environment, txn, snapshot, record)
    packs = []
    for pack in record.packs:
        value = environment.need(txn, format.key(format.PACKS, pack))
        if len(value) > format.PACK_MAX:
            raise ChunkInvalid(
                environment.resource, f"read pack {pack}", f"{len(value)} bytes", "see `lazyrestore verify`"
            )
        packs.append((environment.file_offset(value), len(value)))
    working_set = _working_set(bytes(txn.get(format.key(format.WORKING_SETS, snapshot), b"")), record.chunks)
    pack = txn.get(format.key(format.WORKING_SET_PACKS, snapshot))
    frames, frames_offset = _frames(environment, pack, len(working_set) // format.TOUCHED.size) if pack else (b"", 0)
    place = environment.file_offset(index)
    end = max([place + len(index), *(offset + length for offset, length in packs)])
    if end > os.fstat(data).st_size:
        raise ChunkInvalid(environment.resource, "open", "data.mdb is truncated", "restore it from a backup")
    return StoredImage(
        name=name,
        key=key_of(environment, snapshot),
        snapshot=snapshot,
        manifest=manifest,
        manifest_sum=manifest_sum,
        data_fd=data,
        index_offset=place,
        n_chunks=record.chunks,
        packs=tuple(packs),
        pin_fd=pin,
        raw_bytes=record.raw_bytes,
        stored_bytes=record.stored_bytes,
        hugetlb=record.hugetlb,
        sums=record.sums,
        directory=environment.directory,
        working_set=working_set,
        frames=frames,
        frames_offset=frames_offset,
        plan=bytes(txn.get(format.key(format.PLANS, snapshot), b"")),
        _lengths=[length for _, length in packs],
    )
