"""From a chunk's bytes to what is stored of it, by the C core: many in one call, during which other threads run."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from lazyrestore._native import _core
from lazyrestore.store import format
from lazyrestore.store.address import contents_of

lib, ffi = _core.lib, _core.ffi

ROOM = 2 * format.HUGE_CHUNK  # bytes; grows


class Compressor:
    """For one thread at a time. level: zstd's, in format.LEVELS. Raises MemoryError."""

    def __init__(self, level: int) -> None:
        made = lib.lr_compressor_new(level)
        if made == ffi.NULL:
            raise MemoryError("compressor")
        self._compressor = ffi.gc(made, lib.lr_compressor_free)
        self._out = bytearray(ROOM)

    def compress(self, contents: Sequence[memoryview | bytes]) -> list[memoryview]:
        """What to store of each: slices of one buffer, which they keep. Raises MemoryError."""
        if not contents:
            return []
        pieces = contents_of(contents)
        room = sum(map(lib.lr_compress_bound, pieces[1::2]))
        if len(self._out) < room:
            self._out = bytearray(room)
        sizes = array("I", bytes(4 * len(contents)))
        with (
            ffi.from_buffer("struct lr_content[]", pieces) as chunks,
            ffi.from_buffer(self._out) as out,
            ffi.from_buffer("uint32_t[]", sizes) as made,
        ):
            if error := lib.lr_compress(self._compressor, chunks, len(contents), out, made):
                raise MemoryError(f"compress: errno {-error}")
        with memoryview(self._out) as whole:
            kept = memoryview(bytes(whole[: sum(sizes)]))
        frames = []
        at = 0
        for size in sizes:
            frames.append(kept[at : at + size])
            at += size
        return frames
