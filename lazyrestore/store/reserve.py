"""Disk space that is kept for removing: `reserve`, a file of zeros beside the data.

Facts. To delete a record LMDB writes new pages: the path to it in its tree, and the list of what became free. On a disk
that others have filled there are none: the free pages within the data file are holes (garbage.py). So what would make
room could not be removed.
Choice. The file holds the blocks for that. When a transaction that removes finds the disk full, it is emptied, and the
transaction made again; whoever frees packs allocates it anew, if it can.
Cost. SIZE bytes of each store.
"""

from __future__ import annotations

import contextlib
import os

SIZE = 512 << 10  # a path of 4 KiB pages, and 8 bytes for each page of a gigabyte's index that is given up with it


def allocate(directory: str) -> None:
    """Make it what it should be; on a full disk it is made later."""
    with contextlib.suppress(OSError):
        descriptor = os.open(_path(directory), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(descriptor).st_blocks * 512 < SIZE:
                os.posix_fallocate(descriptor, 0, SIZE)
        except OSError:
            os.ftruncate(descriptor, 0)  # what it got is no use
        finally:
            os.close(descriptor)


def give_up(directory: str) -> bool:
    """Give its blocks to whoever is quick; False if there are none."""
    try:
        descriptor = os.open(_path(directory), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        had_some = os.fstat(descriptor).st_blocks > 0
        os.ftruncate(descriptor, 0)
        return had_some
    finally:
        os.close(descriptor)


def _path(directory: str) -> str:
    return os.path.join(directory, "reserve")
