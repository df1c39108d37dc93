"""The files that a process maps: checked at each restore, and opened once for all that one Snapshot object makes.

Facts. mmap needs a file open only while it is called. Opening and closing the 62 of a Python worker takes each new
process 0.25 ms; to hand over what is open takes 0.02. A descriptor goes on to lead to its file when the name leads to
another one, so it is no proof of anything: the names are looked at in each restore, too, and what is open is opened
anew as soon as one of them leads elsewhere.

Choice. Descriptors belong to whoever calls the library: no more than an eighth of what it may have is kept for one
snapshot, and only if half of it stays free. Otherwise, and where a file cannot be opened, the new process opens its
files itself, as it always does with those that are mapped shared and writable: they would be busy for others (ETXTBSY).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from lazyrestore._native import _core
from lazyrestore.restore_plan import OPEN_SHARE, SIGNATURE, UNKNOWN, MappedFiles, signature_of

if TYPE_CHECKING:
    from lazyrestore.resources.vma import FileIdentity

lib, ffi = _core.lib, _core.ffi

NOT_HERE = -2  # in place of the descriptor of a file that is not opened here


class OpenFiles:
    """Some of the files, open, each found to have its signature; closed with this object."""

    __slots__ = ("_all", "descriptors", "signatures")

    def __init__(self, count: int, wanted: Iterable[int]) -> None:
        """None is open yet. wanted: the numbers of those that are to be."""
        self.signatures = b""
        self.descriptors = dict.fromkeys(wanted, -1)
        self._all = ffi.new("int32_t[]", [self.descriptors.get(number, NOT_HERE) for number in range(count)])

    def open(self, files: MappedFiles, signatures: bytes) -> tuple[int, int]:
        """(the number of the first that is not what it was or cannot be opened, errno or 0), or their count and 0."""
        error = ffi.new("int32_t *")
        seen = ffi.from_buffer("struct lr_signature *", signatures)
        number = lib.lr_open_files(files.paths, seen, files.count, self._all, error)
        self.signatures = signatures
        self.descriptors = {number: self._all[number] for number in self.descriptors}
        return number, error[0]

    def __del__(self) -> None:
        lib.lr_close_files(self._all, len(self._all))


class FilesHere:
    """What is known of a snapshot's mapped files on this host. identities: asked for what the manifest says of them."""

    def __init__(self, identities: Callable[[], list[FileIdentity]]) -> None:
        self._identities = identities
        self._signatures = b""  # as they were when they were last found to be unchanged
        self._open: OpenFiles | None = None
        self.opens = True  # False once that could not be done

    def check(self, files: MappedFiles) -> None:
        """FileChanged if a name leads to another file than it did, or to none. Makes those again that it can."""
        signatures = self._signatures or files.signatures
        number = -1
        while True:
            seen = ffi.from_buffer("struct lr_signature *", signatures)
            number = lib.lr_changed_file(files.paths, seen, number + 1, files.count)
            if number == files.count:
                return
            signatures = self._look_again(number, signatures)

    def opened(self, files: MappedFiles, wanted: AbstractSet[int]) -> OpenFiles | None:
        """Those of the numbers in `wanted`, open; None, now and later, if that cannot be. FileChanged as with check().

        Several threads may open them at the same time: the last one's are kept, the others' closed after their restore.
        """
        signatures = self._signatures or files.signatures
        kept = self._open
        if kept is not None and kept.signatures == signatures and kept.descriptors.keys() == wanted:
            return kept
        if not _may_keep(len(wanted)):
            self.opens, self._open = False, None
            return None
        fresh = OpenFiles(files.count, wanted)
        before = -1
        while True:
            number, error = fresh.open(files, signatures)
            if number == files.count:
                self._open = fresh
                return fresh
            if error or number == before:  # a file system may tell different things of a file and of its name
                self.opens, self._open = False, None
                return None
            signatures, before = self._look_again(number, signatures), number

    def _look_again(self, number: int, signatures: bytes) -> bytes:
        """The signatures, with one file's as it is now. FileChanged unless it is still what it was by its contents."""
        from lazyrestore.resources import vma

        identity = self._identities()[number]
        now = _signature(identity.path)  # before it is looked at: what changes meanwhile is looked at again
        vma.check_file(identity)
        start = number * SIGNATURE.size
        self._signatures = signatures[:start] + now + signatures[start + SIGNATURE.size :]
        return self._signatures


def _signature(path: str) -> bytes:
    try:
        return SIGNATURE.pack(*signature_of(os.stat(path)))
    except OSError:
        return UNKNOWN


def _may_keep(count: int) -> bool:
    """Whether this process can spare so many descriptors for as long as it has the snapshot."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return True
    try:
        return count <= soft // OPEN_SHARE and len(os.listdir("/proc/self/fd")) + count <= soft // 2
    except OSError:
        return False
