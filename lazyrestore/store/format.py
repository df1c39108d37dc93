"""What stands on disk, as records and structs, and the bounds that everything read from there must keep.

docs/format.md shows the same as a picture. No number read from a store is used before a function of this file has seen
it.
"""

# Without `from __future__ import annotations`: msgspec would compile each annotation again to read it.

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from lazyrestore.errors import BadSnapshotName, ChunkInvalid

MAGIC = "lazyrestore"
VERSION = 2  # 1 had no chunks in planes; such a store is read as it is

PAGE = 4096  # bytes; image addresses and chunk lengths are multiples of it, whatever the page size of the machine
CHUNK = 16 << 10  # bytes; chunks do not cross multiples of this image address
HUGE_CHUNK = 2 << 20  # bytes; the same for memory in huge pages, and the longest chunk there is
HASH = 32  # bytes of BLAKE3
PACK = (4 << 20) - 16  # bytes at which a pack is full; with LMDB's 16-byte page header exactly 1024 pages
# A pack with one chunk may exceed that only by what zstd adds to an incompressible chunk; anything longer is damage.
PACK_MAX = 8 << 20
PLANES = 8  # bytes of a word, each of which has a plane (_native/planes.h)
PLANES_MARK = bytes.fromhex("582a4d18 00000000")  # before the frame of a chunk in planes: an empty skippable frame
LEVELS = range(1, 20)  # zstd compression levels on offer

ENTRY = struct.Struct("<QIIII")  # struct lr_chunk: image address, raw length, pack slot, offset in pack, stored length
INDEX_BLOCK = 128  # ENTRYs with one checksum
TOUCHED = struct.Struct("<IHH")  # struct lr_touched: position in the index; bits: pages written; pages touched
LOCATION = struct.Struct("<QIII")  # deduplication: pack id, offset in pack, stored length, raw length
FRAMES = struct.Struct("<I")  # the head of a working set's pack: number of FRAMEs
FRAME = struct.Struct("<III")  # struct lr_frame: compressed bytes, chunks, tag_of() both
KEY = struct.Struct(">Q")  # ids as keys, so that LMDB sorts them as numbers

NAME_MAX = 128
NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:@+-")

# The tables: all records live in LMDB's one unnamed database, whose handle is always open; the first byte of a key
# tells the table. (To open a *named* one, py-lmdb needs a write transaction, so a reader would wait for a writer.)
IDENTITY = b"lazyrestore"  # the whole key; no table starts with this letter
COUNTERS = b"counters"  # the whole key
NAMES = b"N"  # + name: the snapshot's id, 8 bytes as in a key
SNAPSHOTS = b"S"  # + id: Record
INDEXES = b"I"  # + id: ENTRYs, a CRC-32 of each INDEX_BLOCK of them, then zeros
HASHES = b"H"  # + id: 32 bytes for each chunk
MANIFESTS = b"M"  # + id: opaque here
WORKING_SETS = b"W"  # + id: TOUCHEDs, in the order of first touch; may be absent
WORKING_SET_PACKS = b"R"  # + id: FRAMES, FRAMEs, zstd frames of the working set's chunks, then zeros; may be absent
PLANS = b"L"  # + id: what a restore would make of the manifest, opaque here; may be absent
PACKS = b"P"  # + id: zstd frames, then zeros
CONTENTS = b"C"  # + id of a pack: 32 bytes for each chunk in it
CHUNKS = b"D"  # + hash: LOCATION
TABLES_OF_A_SNAPSHOT = (SNAPSHOTS, INDEXES, HASHES, MANIFESTS, PLANS, WORKING_SETS, WORKING_SET_PACKS)


class Head(msgspec.Struct, frozen=True):
    """The part of the identity record that every version, older or newer, has."""

    magic: str
    version: int


class Identity(msgspec.Struct, frozen=True):
    """The identity record: who wrote the store. created: seconds since 1970; uuid: 32 hexadecimal digits."""

    magic: str
    version: int
    uuid: str
    created: float


class Counters(msgspec.Struct, frozen=True):
    """The next free ids; an id is never used twice."""

    snapshot: int = 1
    pack: int = 1


class Record(msgspec.Struct, frozen=True):
    """One snapshot. created: seconds since 1970; raw_bytes: sum of the chunks' raw lengths; stored_bytes: compressed
    size of the distinct chunks it refers to; added_bytes: what of this was new to the store; packs: ids, by slot;
    hugetlb: whether it has chunks of 2 MiB, for huge pages; sums: whether the index has checksums; sum: sum_of(), None
    before 24 November 2026."""

    created: float
    chunks: int
    raw_bytes: int
    stored_bytes: int
    added_bytes: int
    packs: list[int]
    hugetlb: bool = False
    sums: bool = False
    sum: int | None = None


T = TypeVar("T", bound=msgspec.Struct)


def encode(record: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(record)


def decode(data: bytes | memoryview, kind: type[T], resource: str) -> T:
    """A record from its bytes. Raises ChunkInvalid naming `resource` if they are not one."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ChunkInvalid(resource, f"read the {kind.__name__.lower()} record", f"damaged ({error})") from error


def key(table: bytes, number: int) -> bytes:
    return table + KEY.pack(number)


def number_of(data: bytes | memoryview, resource: str) -> int:
    """The id in a key, or in the value of a name. Raises ChunkInvalid."""
    if not KEY.size <= len(data) <= KEY.size + 1:
        raise ChunkInvalid(resource, "read an id", f"{len(data)} bytes instead of {KEY.size}")
    return int(KEY.unpack_from(data, len(data) - KEY.size)[0])


def check_name(name: str) -> bytes:
    """The key of a snapshot's name. Raises BadSnapshotName, which says what is allowed."""
    if not 0 < len(name) <= NAME_MAX or name[0] in ".-" or not NAME_CHARACTERS.issuperset(name):
        raise BadSnapshotName(
            f"snapshot name {name!r}",
            reason="not allowed",
            advice=f"use 1 to {NAME_MAX} characters of A-Z a-z 0-9 . _ : @ + - that do not start with '.' or '-'",
        )
    return name.encode("ascii")


def entries(index: bytes | bytearray | memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """(image address, raw length, pack slot, offset, stored length) of each chunk, unchecked; length a multiple of
    24."""
    return ENTRY.iter_unpack(index)


def sums_of(index: bytes | bytearray | memoryview) -> bytes:
    """What stands behind an index: a little-endian u32 for each block."""
    step = INDEX_BLOCK * ENTRY.size
    return b"".join(zlib.crc32(index[at : at + step]).to_bytes(4, "little") for at in range(0, len(index), step))


def sum_of(record: Record, manifest_sum: int) -> int:
    """The checksum of a manifest, whose own that is, and of what else would show other memory if it were damaged. -1:
    it is."""
    try:
        places = struct.pack(f"<QBB{len(record.packs)}Q", record.chunks, record.hugetlb, record.sums, *record.packs)
    except struct.error:  # numbers that nobody writes
        return -1
    return zlib.crc32(places, manifest_sum)


def with_sum(record: Record, manifest: bytes) -> Record:
    return msgspec.structs.replace(record, sum=sum_of(record, zlib.crc32(manifest)))


def touched_runs(pages: int, length: int) -> list[tuple[int, int]]:
    """What the bits of a TOUCHED mean in a chunk of `length` bytes: [start, end) of each run in bytes; 0: all."""
    if not pages:
        return [(0, length)]
    runs: list[tuple[int, int]] = []
    for start in range(0, length, PAGE):
        if pages >> start // PAGE & 1:
            first = runs.pop()[0] if runs and runs[-1][1] == start else start
            runs.append((first, start + PAGE))
    return runs


def tag_of(touched: Sequence[tuple[int, int]], frame: bytes) -> int:
    """Says which pages of which chunks (position, bits) a frame of a working set's pack holds, and which frame: its
    last 4 bytes are its checksum."""
    places = b"".join(
        chunk.to_bytes(4, "little") + (pages.to_bytes(2, "little") if pages else b"") for chunk, pages in touched
    )
    return zlib.crc32(places + frame[-4:])


def fault_in(entry: tuple[int, int, int, int, int], end: int, packs: Sequence[int]) -> str:
    """What is wrong with a chunk's entry, "" if nothing; end: where the chunk before it ends; packs: lengths in bytes
    by slot."""
    address, length, slot, offset, stored = entry
    if address % PAGE or not 0 < length <= HUGE_CHUNK or length % PAGE or address + length > 1 << 64:
        return f"impossible address {address:#x} or length {length}"
    if address < end:
        return "not in order, or overlapping the chunk before it"
    if slot >= len(packs):
        return f"in pack {slot} of {len(packs)}"
    if not stored > 0 or offset + stored > packs[slot]:
        return f"bytes {offset} to {offset + stored} of a pack of {packs[slot]}"
    return ""


def decompress(payload: bytes | memoryview, length: int) -> bytes:
    """The raw bytes of a chunk. Raises ValueError saying what is wrong with it."""
    from lazyrestore._native import _core

    raw = bytearray(length)
    with _core.ffi.from_buffer(payload) as stored, _core.ffi.from_buffer(raw) as memory:
        wrong = _core.lib.lr_decompress(stored, len(payload), memory, length)
    if wrong:
        raise ValueError(_core.ffi.string(wrong).decode())
    return bytes(raw)
