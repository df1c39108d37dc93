"""The golden store: version 1 of the format, as the first release wrote it. It must stay readable for ever.

`python tests/helpers_golden.py` made tests/store/golden/; it is not to be made again for version 1.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lazyrestore.store import HUGE_CHUNK, ImageStore

FOLDER = Path(__file__).parent / "store" / "golden"
PAGE = 4096
PRIVATE, SHARED, HUGE = 0x5555_0000_0000, 1 << 47, 0x7F00_0000_0000
MANIFEST = bytes(range(256))


def page(number: int) -> bytes:
    return (b"lazyrestore golden page %d\n" % number).ljust(64, b".") * 64


PIECES = {
    PRIVATE: b"".join(map(page, range(40))),
    SHARED: page(100) + bytes(3 * PAGE) + page(101),
    HUGE: page(200) * 512,
}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    with ImageStore.open(FOLDER) as store:
        for name, changed in (("golden", b""), ("second-1.0:@+_", b"changed")):
            with store.writer(name) as writer:
                for address, piece in PIECES.items():
                    content = bytearray(piece)
                    content[: len(changed)] = changed
                    chunk = HUGE_CHUNK if address == HUGE else 1 << 16
                    writer.add(memoryview(content), [(address, 0, len(content))], chunk_size=chunk)
                writer.commit(MANIFEST)
        used = store._environment.unused_tail()[0]
    os.truncate(FOLDER / "data.mdb", used)
    (FOLDER / "lock.mdb").unlink()
    (FOLDER / "writer.lock").write_text("")


if __name__ == "__main__":
    main()
