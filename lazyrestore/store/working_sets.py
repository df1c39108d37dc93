"""The working set of a snapshot: its list, and the same pages once more in a pack of their own.

Facts, measured with the 4 MB of pages that a numpy worker touches before its first response: as frames of 64 KiB, in
the order of first touch, they take 3.4 ms to decompress at level 3 (1.0 MB), 2.5 at -5 (1.6 MB), 0.8 at -100 (3.3
MB), and 0.36, nearly all of it their checksums, at zstd's lowest level, where its blocks are as good as raw (3.9 MB).
Choice: the lowest: who restores on a new host waits for just these bytes, which are one sequential read. Cost: so
much more in the store, for this worker 7 % of its image.
"""

from __future__ import annotations

from collections.abc import Iterator

from lazyrestore.errors import ChunkInvalid
from lazyrestore.store import format
from lazyrestore.store.environment import Environment, Transaction
from lazyrestore.store.image import StoredImage

FRAME = 64 << 10  # raw bytes at which a frame is full
LEVEL = -(1 << 17)  # zstd's lowest


def check(working_set: bytes, chunks: int) -> None:
    """Raises ValueError for positions beyond an index of `chunks` chunks."""
    if len(working_set) % format.TOUCHED.size:
        raise ValueError("a working set with half an entry")
    if any(chunk >= chunks for chunk, _, _ in format.TOUCHED.iter_unpack(working_set)):
        raise ValueError("a working set with positions beyond the index")


def raw_bytes(image: StoredImage) -> int:
    """Of the pages of its working set."""
    touched = format.TOUCHED.iter_unpack(image.working_set)
    runs = (
        format.touched_runs(pages, image.entry(number)[1]) for number, _, pages in touched if number < image.n_chunks
    )
    return sum(end - start for each in runs for start, end in each)


def pack(image: StoredImage, working_set: bytes) -> bytes:
    """The pack's record. Raises ChunkInvalid."""
    from zstandard import ZstdCompressor

    compressor = ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True)
    table = bytearray()
    frames = bytearray()
    for raw, touched in _groups(image, working_set):
        frame = compressor.compress(raw)
        table += format.FRAME.pack(len(frame), len(touched), format.tag_of(touched, frame))
        frames += frame
    return format.FRAMES.pack(len(table) // format.FRAME.size) + table + frames


def keep(environment: Environment, txn: Transaction, snapshot: int, working_set: bytes, packed: bytes) -> None:
    txn.put(format.key(format.WORKING_SETS, snapshot), working_set)
    txn.put(format.key(format.WORKING_SET_PACKS, snapshot), environment.lengthen(packed))


def damage(image: StoredImage, hashes: bytes) -> str:
    """What is wrong with the pack, "" if nothing; hashes: BLAKE3 of each chunk of the index."""
    touched = [(chunk, pages) for chunk, _, pages in format.TOUCHED.iter_unpack(image.working_set)]
    offset = image.frames_offset
    first = 0
    for stored, chunks, tag in format.FRAME.iter_unpack(image.frames):
        held = touched[first : first + chunks]
        if max((number for number, _ in held), default=0) >= image.n_chunks:
            return "it goes beyond the index"
        runs = [format.touched_runs(pages, image.entry(number)[1]) for number, pages in held]
        frame = image.read_data(offset, stored)
        try:
            raw = format.decompress(frame, sum(end - start for each in runs for start, end in each))
        except ValueError as error:
            return str(error)
        at = 0
        for (number, _), each in zip(held, runs, strict=True):
            length = sum(end - start for start, end in each)
            if not _is_part(image, number, each, raw[at : at + length], hashes):
                return f"chunk {number} of the index is another one there"
            at += length
        if format.tag_of(held, frame) != tag:
            return "a frame's tag is not the recorded one"
        offset += stored
        first += chunks
    return ""


def _is_part(image: StoredImage, number: int, runs: list[tuple[int, int]], found: bytes, hashes: bytes) -> bool:
    """Whether a chunk has these bytes there. One that is damaged, which `verify` tells by itself, is not compared."""
    from blake3 import blake3

    if runs == [(0, image.entry(number)[1])]:
        return blake3(found).digest() == hashes[number * format.HASH : (number + 1) * format.HASH]
    try:
        raw = image.decompress(image.entry(number))
    except ChunkInvalid:
        return True
    return b"".join(raw[start:end] for start, end in runs) == found


def _groups(image: StoredImage, working_set: bytes) -> Iterator[tuple[bytes, list[tuple[int, int]]]]:
    """(raw bytes, (number, bits) of the chunks) of each frame."""
    raw = bytearray()
    touched: list[tuple[int, int]] = []
    for number, _, pages in format.TOUCHED.iter_unpack(working_set):
        whole = image.decompress(image.entry(number))
        content = b"".join(whole[start:end] for start, end in format.touched_runs(pages, len(whole)))
        if touched and len(raw) + len(content) > FRAME:
            yield bytes(raw), touched
            raw.clear()
            touched = []
        raw += content
        touched.append((number, pages))
    if touched:
        yield bytes(raw), touched
