"""image.c against a model that knows every entry: where an address lies, which chunks can be read, what a damaged index
or header does. The model looks at all entries, one after the other; what a chunk holds, the store's own reader says."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import zlib
from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyrestore.pager import wire
from lazyrestore.store import format

NATIVE = Path(__file__).parents[2] / "lazyrestore" / "_native"
SOURCES = [NATIVE / "pager" / f"{name}.c" for name in ("image", "log")]
PAGE = 4096
END = 2**64 - 1  # of a hole behind the last chunk
COUNTS = [0, 1, 2, 60, 127, 128, 129, 255, 300, 520]
BLOCK = wire.INDEX_BLOCK
ROOM = 4096  # more than struct image needs

MORE = int(os.environ.get("LAZYRESTORE_FUZZ", "1"))  # times as many examples
seeds = st.integers(0, 2**32)


class Error(ctypes.Structure):
    _fields_ = (("step", ctypes.c_char_p), ("code", ctypes.c_int), ("address", ctypes.c_uint64))


class Place(ctypes.Structure):
    _fields_ = (
        ("hole", ctypes.c_bool),
        ("damaged", ctypes.c_bool),
        ("chunk", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
    )

    def told(self) -> tuple[object, ...]:
        return ("damaged",) if self.damaged else ("hole" if self.hole else self.chunk, self.start, self.end)


class Unpacker(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("context", "stored", "raw", "planes")),
        ("held", ctypes.c_uint64),
    )


lib: ctypes.CDLL


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> None:
    global lib
    target = tmp_path_factory.mktemp("image") / "image.so"
    command = [
        "cc",
        "-O1",
        "-g",
        "-std=gnu11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-iquote",
        NATIVE,
        *SOURCES,
    ]
    subprocess.run([*command, "-o", target, "-lzstd"], check=True)
    lib = ctypes.CDLL(str(target))
    lib.image_init.restype = lib.image_unpack.restype = lib.unpacker_init.restype = Error
    lib.image_find.restype = Place
    lib.image_first_at.restype = ctypes.c_uint64
    lib.image_find.argtypes = lib.image_first_at.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    lib.image_unpack.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]


def memory_file(content: bytes | bytearray) -> int:
    descriptor = os.memfd_create("fuzz")
    os.write(descriptor, content)
    return descriptor


@contextmanager
def opened(header: bytes, data: bytes | bytearray) -> Iterator[tuple[int, ctypes.Array[ctypes.c_char]]]:
    """The errno of image_init, and struct image if that is 0."""
    image = ctypes.create_string_buffer(ROOM)
    header_fd, data_fd = memory_file(header), memory_file(data)
    error = lib.image_init(header_fd, data_fd, image)
    os.close(header_fd)
    try:
        yield error.code, image
    finally:
        if error.code:
            os.close(data_fd)  # it stayed ours
        else:
            lib.image_deinit(image)


class Stored:
    """A data file with one pack, an index and its checksums, and what is true of it."""

    def __init__(self, seed: int, count: int, *, sums: bool = True) -> None:
        self.random = random.Random(seed)
        self.sums = sums
        compressor = zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True)
        frames = [compressor.compress(bytes([k + 1, 7]) * (PAGE // 2) * (k + 1)) for k in range(4)]
        frames[1::2] = [format.PLANES_MARK + frame for frame in frames[1::2]]
        self.data = bytearray(b"".join(frames))
        self.pack = len(self.data)
        starts = [sum(map(len, frames[:k])) for k in range(4)]
        self.entries: list[list[int]] = []
        at = self.random.choice([0, PAGE, 1 << 40])
        for _ in range(count):
            at += self.random.choice([0, 0, 1, 7, 1 << 20]) * PAGE
            kind = self.random.randrange(4)
            self.entries.append([at, PAGE * (kind + 1), 0, starts[kind], len(frames[kind])])
            at += PAGE * (kind + 1)
        self.data += bytes(-len(self.data) % 8)
        self.index = len(self.data)
        self.write()

    def write(self) -> None:
        """The index as `entries` has it, with right checksums."""
        packed = b"".join(wire.CHUNK.pack(*entry) for entry in self.entries)
        self.data[self.index :] = packed + (format.sums_of(packed) if self.sums else b"")

    def header(self, **changes: int) -> bytes:
        fields = {
            "magic": wire.IMAGE_MAGIC, "version": wire.VERSION, "flags": wire.IMAGE_SUMS * self.sums, "packs": 1,
            "index": self.index, "chunks": len(self.entries), "working_set": 0, "frames": 0, "frames_offset": 0,
        }  # fmt: skip
        return wire.IMAGE.pack(*(fields | changes).values(), b"fuzzed") + wire.PACK.pack(0, self.pack)

    def flip(self) -> None:
        """A bit of the index or of its checksums."""
        bit = self.random.randrange(8 * self.index, 8 * len(self.data))
        self.data[bit // 8] ^= 1 << bit % 8

    def sound(self) -> list[bool]:
        """Of each entry, whether its block is as it was written."""
        end = self.index + len(self.entries) * wire.CHUNK.size
        verdicts = []
        for number in range(len(self.entries)):
            block = number // BLOCK
            start = self.index + block * BLOCK * wire.CHUNK.size
            entries = self.data[start : min(start + BLOCK * wire.CHUNK.size, end)]
            written = self.data[end + 4 * block : end + 4 * block + 4]
            verdicts.append(not self.sums or zlib.crc32(entries) == int.from_bytes(written, "little"))
        return verdicts

    def find(self, address: int, sound: list[bool]) -> tuple[object, ...]:
        """What image_find must say."""
        below, low = -1, 0
        above, high = len(self.entries), END
        for number, (start, length, *_) in enumerate(self.entries):
            if not sound[number]:
                continue
            if start <= address < start + length:
                return number, start, start + length
            if start <= address:
                below, low = number, start + length
            else:
                above, high = number, start
                break
        return ("hole", low, high) if above == below + 1 else ("damaged",)

    def interesting(self) -> set[int]:
        edges = {edge for start, length, *_ in self.entries for edge in (start, start + length)}
        edges = {0, 1 << 47, END - 1} | set(self.random.sample(sorted(edges), min(len(edges), 40)))
        return {address for edge in edges for address in (edge - 1, edge, edge + 1) if 0 <= address < END}


@settings(max_examples=60 * MORE, deadline=None)
@given(seed=seeds, count=st.sampled_from(COUNTS), flips=st.integers(0, 3), sums=st.booleans())
def test_find(seed: int, count: int, flips: int, sums: bool) -> None:
    """With checksums, whatever is damaged: the truth, or that nobody knows. Without: the truth if nothing is."""
    stored = Stored(seed, count, sums=sums)
    for _ in range(flips if count and sums else 0):
        stored.flip()
    sound = stored.sound()
    starts = [start for start, *_ in stored.entries]
    with opened(stored.header(), stored.data) as (error, image):
        assert not error
        addresses = sorted(stored.interesting())
        stored.random.shuffle(addresses)  # which block is looked at first is a matter of chance
        for address in addresses:
            assert lib.image_find(image, address).told() == stored.find(address, sound), hex(address)
            if all(sound):
                assert lib.image_first_at(image, address + 1) == bisect(starts, address)


def change(stored: Stored) -> None:
    """A field of an entry becomes something else: near, far, or out of all bounds."""
    entry = stored.random.choice(stored.entries)
    field = stored.random.randrange(5)
    near = entry[field] + stored.random.choice([-PAGE, -1, 1, PAGE])
    most = END if field == 0 else 2**32 - 1
    entry[field] = stored.random.choice([0, near % (most + 1), most, most - PAGE + 1, stored.random.randrange(most)])


@settings(max_examples=60 * MORE, deadline=None)
@given(seed=seeds, count=st.sampled_from(COUNTS[1:7]), changes=st.integers(0, 4), sums=st.booleans())
def test_what_a_bad_writer_wrote(seed: int, count: int, changes: int, sums: bool) -> None:
    """Entries out of bounds or order, with checksums that hold: each chunk is what the store's reader says, or refused.
    A search, among whatever there is, comes to a place around the address."""
    stored = Stored(seed, count, sums=sums)
    for _ in range(changes):
        change(stored)
    stored.write()
    unpacker = Unpacker()
    with opened(stored.header(), stored.data) as (error, image):
        assert not error
        assert not lib.unpacker_init(ctypes.byref(unpacker)).code
        for number, (address, length, slot, offset, size) in enumerate(stored.entries):
            entry = (address, length, slot, offset, size)
            code = lib.image_unpack(image, number, ctypes.byref(unpacker)).code
            following = stored.entries[number + 1][0] if number + 1 < count else END
            try:
                if format.fault_in(entry, 0, [stored.pack]) or address + length > following:
                    raise ValueError("out of bounds, or overlapping the next")
                raw = format.decompress(bytes(stored.data[offset : offset + size]), length)
            except ValueError:
                assert code, entry
                continue
            assert not code, entry
            same = ctypes.string_at(unpacker.raw, length) == raw
            assert same, entry
        for address in stored.interesting():
            place = lib.image_find(image, address)
            assert place.start <= address < place.end
            assert place.damaged or place.hole or place.chunk < count
    lib.unpacker_deinit(ctypes.byref(unpacker))


LONG = [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**64 // 24, 2**64 // 24 + 1]


@settings(max_examples=100 * MORE, deadline=None)
@given(
    seed=seeds,
    field=st.sampled_from(["magic", "version", "flags", "packs", "index", "chunks", "working_set", "frames"]),
    value=st.one_of(st.sampled_from(LONG), st.integers(0, 2**64 - 1), st.integers(-200, 200)),
    cut=st.sampled_from([0, 0, 0, 1, 17, 200]),
)
def test_header(seed: int, field: str, value: int, cut: int) -> None:
    """A header that is not true of the file is refused; one that may be is opened, and any address can be asked for."""
    stored = Stored(seed, 130)
    wide = field in ("index", "chunks")
    usual = {"index": stored.index, "chunks": 130}.get(field, 0)
    value = usual + value if abs(value) <= 200 and wide else value
    value %= 2**64 if wide else 2**32
    header = stored.header(**{field: value})
    with opened(header[: len(header) - cut], stored.data) as (error, image):
        space = len(stored.data) - (value if field == "index" else stored.index)
        n = value if field == "chunks" else 130
        flags = value if field == "flags" else wire.IMAGE_SUMS
        needed = n * wire.CHUNK.size + (-(-n // BLOCK) * 4 if flags & wire.IMAGE_SUMS else 0)
        right = {
            "magic": value == wire.IMAGE_MAGIC, "version": value == wire.VERSION, "packs": value == 1,
            "working_set": value == 0, "frames": value == 0, "index": value % 8 == 0,
        }.get(field, True)  # fmt: skip
        assert (not error) == (right and not cut and needed <= space)
        if not error:
            for address in stored.interesting():
                place = lib.image_find(image, address)
                assert place.start <= address < place.end


@pytest.mark.parametrize("offset", [0, 1, PAGE, 2**63, 2**64 - 1])
@pytest.mark.parametrize("length", [1, 2**63, 2**64 - 1])
def test_pack_beyond_the_file(offset: int, length: int) -> None:
    stored = Stored(1, 3)
    header = stored.header()[: wire.IMAGE.size] + wire.PACK.pack(offset, length)
    with opened(header, stored.data) as (error, _):
        assert (not error) == (offset + length <= len(stored.data))
