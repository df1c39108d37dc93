"""Memory files that are made for new processes: their executable, their programs, their shared memory."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack

from lazyrestore.errors import RestoreError
from lazyrestore.restore_checks import reserve_huge_pages
from lazyrestore.restore_plan import SharedFile
from lazyrestore.store import StoredImage


def new(name: str, owned: ExitStack, flags: int = 0) -> int:
    """An empty one, closed with `owned`."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | flags)
    owned.callback(os.close, descriptor)
    return descriptor


class MemoryFile:
    """One that is made once for many new processes; closed with this object."""

    __slots__ = ("descriptor",)

    def __init__(self, name: str, content: bytes | bytearray) -> None:
        """Raises RestoreError."""
        self.descriptor = -1
        self.descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        write(self.descriptor, content, 0)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def write(descriptor: int, data: bytes | bytearray | memoryview, at: int) -> None:
    """All of `data` into a memory file, at offset `at`. Raises RestoreError.

    A write(2) that a limit or a lack of memory stops half-way tells how much it has done, and no more.
    """
    left = memoryview(data)
    try:
        while left:
            done = os.pwrite(descriptor, left, at)
            left, at = left[done:], at + done
    except OSError as error:
        raise _refused("write", error) from error


def _refused(step: str, error: OSError) -> RestoreError:
    advice = "raise the limit on the size of files (ulimit -f)" if error.errno == errno.EFBIG else ""
    return RestoreError("memory file", step, errno=error.errno, advice=advice)


def shared(snapshot: str, about: SharedFile, image: StoredImage, owned: ExitStack) -> int:
    """The memory file of one shared object.

    A memfd can be read by descriptor, which never faults, so it is filled here.
    """
    flags = 0 if about.anonymous else os.MFD_ALLOW_SEALING
    if about.huge:
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    descriptor = new(about.name, owned, flags)
    try:
        os.ftruncate(descriptor, about.size)
    except OSError as error:
        raise _refused("size", error) from error
    if about.anonymous:
        return descriptor
    room = reserve_huge_pages(snapshot, descriptor, owned) if about.huge else None
    for start, data in image.contents(about.image, about.image + -(-about.size // 4096) * 4096):
        at = start - about.image
        if room is None:
            write(descriptor, data[: about.size - at], at)
        else:  # huge pages take no write(2)
            room[at : at + len(data)] = data
    return descriptor
