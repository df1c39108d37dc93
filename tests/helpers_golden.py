"""The golden stores: each version of the format, as it was first written. They must stay readable for ever.

`python tests/helpers_golden.py` made tests/store/golden-N/ when N was the version; it is not to be made again then.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

from lazyrestore.store import HUGE_CHUNK, ImageStore, format

FOLDERS = {version: Path(__file__).parent / "store" / f"golden-{version}" for version in (1, 2)}
PAGE = 4096
PRIVATE, NUMBERS, SHARED, HUGE = 0x5555_0000_0000, 0x6666_0000_0000, 1 << 47, 0x7F00_0000_0000
MANIFEST = bytes(range(256))


def page(number: int) -> bytes:
    return (b"lazyrestore golden page %d\n" % number).ljust(64, b".") * 64


PIECES = {
    PRIVATE: b"".join(map(page, range(40))),
    SHARED: page(100) + bytes(3 * PAGE) + page(101),
    HUGE: page(200) * 512,
}


def numbers(count: int) -> bytes:
    """Numbers as the memory of a program holds them: what is stored in planes."""
    state, made = 1, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        made.append((state >> 40) / 1024)
    return struct.pack(f"<{count}d", *made)


def pieces(version: int) -> dict[int, bytes]:
    """What a golden store holds: image address to bytes."""
    return PIECES if version == 1 else {**PIECES, NUMBERS: numbers(8192)}


def main() -> None:
    folder = FOLDERS[format.VERSION]
    shutil.rmtree(folder, ignore_errors=True)
    with ImageStore.open(folder) as store:
        for name, changed in (("golden", b""), ("second-1.0:@+_", b"changed")):
            with store.writer(name) as writer:
                for address, piece in pieces(format.VERSION).items():
                    content = bytearray(piece)
                    content[: len(changed)] = changed
                    chunk = HUGE_CHUNK if address == HUGE else 1 << 16
                    writer.add(memoryview(content), [(address, 0, len(content))], chunk_size=chunk)
                writer.commit(MANIFEST)
        used = store._environment.unused_tail()[0]
    os.truncate(folder / "data.mdb", used)
    (folder / "lock.mdb").unlink()
    (folder / "writer.lock").write_text("")


if __name__ == "__main__":
    main()
