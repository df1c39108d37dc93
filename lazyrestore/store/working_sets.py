"""The working set of a snapshot: its list, and the same chunks once more in a pack of their own.

Facts, measured with the 10 MB that a numpy worker touches before its first response: as 632 chunks, compressed one by
one, they take 10.6 ms of CPU to decompress; as frames of 64 KiB in the order of first touch 8.6 at the same level, and
5.7 at level -5; longer frames gain no more. Choice: level -5: who restores on a cold host waits for just these bytes.
Cost: the store holds them twice (here 3.7 MB beside 44).
"""

from __future__ import annotations

from collections.abc import Iterator

from lazyrestore.store import format
from lazyrestore.store.environment import Environment, Transaction
from lazyrestore.store.image import StoredImage

FRAME = 64 << 10  # raw bytes at which a frame is full
LEVEL = -5


def check(working_set: bytes, chunks: int) -> None:
    """Raises ValueError for positions beyond an index of `chunks` chunks."""
    if len(working_set) % format.TOUCHED.size:
        raise ValueError("a working set with half an entry")
    if any(chunk >= chunks for chunk, _ in format.TOUCHED.iter_unpack(working_set)):
        raise ValueError("a working set with positions beyond the index")


def pack(image: StoredImage, working_set: bytes) -> bytes:
    """The pack's record. Raises ChunkInvalid."""
    from zstandard import ZstdCompressor

    compressor = ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True)
    table = bytearray()
    frames = bytearray()
    for raw, chunks in _groups(image, working_set):
        frame = compressor.compress(raw)
        table += format.FRAME.pack(len(frame), len(chunks), format.tag_of(chunks, frame))
        frames += frame
    return format.FRAMES.pack(len(table) // format.FRAME.size) + table + frames


def keep(environment: Environment, txn: Transaction, snapshot: int, working_set: bytes, packed: bytes) -> None:
    txn.put(format.key(format.WORKING_SETS, snapshot), working_set)
    txn.put(format.key(format.WORKING_SET_PACKS, snapshot), environment.lengthen(packed))


def damage(image: StoredImage, hashes: bytes) -> str:
    """What is wrong with the pack, "" if nothing; hashes: BLAKE3 of each chunk of the index."""
    from blake3 import blake3

    touched = [chunk for chunk, _ in format.TOUCHED.iter_unpack(image.working_set)]
    offset = image.frames_offset
    first = 0
    for stored, chunks, tag in format.FRAME.iter_unpack(image.frames):
        numbers = touched[first : first + chunks]
        if max(numbers, default=0) >= image.n_chunks:
            return "it goes beyond the index"
        lengths = [image.entry(number)[1] for number in numbers]
        frame = image.read_data(offset, stored)
        try:
            raw = format.decompress(frame, sum(lengths))
        except ValueError as error:
            return str(error)
        at = 0
        for number, length in zip(numbers, lengths, strict=True):
            if blake3(raw[at : at + length]).digest() != hashes[number * format.HASH : (number + 1) * format.HASH]:
                return f"chunk {number} of the index is another one there"
            at += length
        if format.tag_of(numbers, frame) != tag:
            return "a frame's tag is not the recorded one"
        offset += stored
        first += chunks
    return ""


def _groups(image: StoredImage, working_set: bytes) -> Iterator[tuple[bytes, list[int]]]:
    """(raw bytes, the chunks' numbers) of each frame."""
    raw = bytearray()
    chunks: list[int] = []
    for number, _ in format.TOUCHED.iter_unpack(working_set):
        content = image.decompress(image.entry(number))
        if chunks and len(raw) + len(content) > FRAME:
            yield bytes(raw), chunks
            raw.clear()
            chunks = []
        raw += content
        chunks.append(number)
    if chunks:
        yield bytes(raw), chunks
