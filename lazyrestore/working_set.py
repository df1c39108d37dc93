"""What a pager, which knows no store, has done: keeps a recorded working set, frees a snapshot that was removed.

usage: python -m lazyrestore.working_set STORE NAME ID SOCKET     NAME, ID: the snapshot's, as the store knows it;
                                                                 SOCKET: the pager's; "-": it has ended, and the
                                                                 snapshot was removed

With a socket it asks the pager of that snapshot for the set and stores it beside the manifest. Whatever fails leaves
things as they were: the next pager records again, the next writer frees.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lazyrestore.errors import LazyrestoreError
from lazyrestore.pager.launch import connect_existing
from lazyrestore.store import ImageStore


def keep(directory: str, name: str, snapshot: int, runtime_dir: Path | None = None) -> bool:
    """Whether a working set was stored. Raises LazyrestoreError, ValueError."""
    with ImageStore.open(directory, create=False) as store, store.open_image(name) as image:
        client = connect_existing(image.key, name, runtime_dir=runtime_dir) if image.snapshot == snapshot else None
        if client is None:
            return False
        with client:
            working_set = client.working_set()
        return bool(working_set) and store.keep_working_set(name, snapshot, working_set)


def main() -> None:
    directory, name, snapshot, socket = sys.argv[1:]
    try:
        if socket == "-":
            with ImageStore.open(directory, create=False) as store:
                store.gc(wait=True)
            return
        kept = keep(directory, name, int(snapshot), Path(socket).parent)
    except (LazyrestoreError, ValueError) as error:
        sys.exit(str(error))
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
