"""The snapshot that a process was restored from, if it is in this store: found by the pager that serves the process.

Facts. A pager's template is a memory file that no other pager has, and it shows in the maps of every process restored
from it. A pager keeps its snapshot in use: removed or not, its chunks are there as long as the process. A snapshot's
key, which names the pager's socket, names the store's file too.
Choice. Of the snapshots of the store that is written to, those with a pager are asked for their template. A process
that came from another store has no origin here; nor has one whose pager does not answer, or whose snapshot has a
damaged index, or a forked child. Their memory is read. The pager is asked nevertheless: a question for the intervals of
a process tells it that this process is about to be read, which is not to be recorded as its working set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

import msgspec

from lazyrestore.errors import ChunkInvalid, PagerError
from lazyrestore.kernel import procfs
from lazyrestore.pager.client import PagerClient
from lazyrestore.pager.launch import connect_all, connect_existing, running
from lazyrestore.resources.inherited import Origin
from lazyrestore.resources.vma import is_template
from lazyrestore.store import ImageStore, ImageWriter, Parent


class Ancestor(msgspec.Struct, frozen=True):
    """The snapshot, if it is in this store and sound, and the pager of a process restored from it. Close it."""

    parent: Parent | None
    pager: PagerClient
    templates: tuple[tuple[int, int], ...]

    def origin(self, pidfd: int) -> Origin | None:
        """What the pager says of a process that stands still; None if it says nothing."""
        try:
            intervals = self.pager.intervals(pidfd)
        except PagerError:
            return None
        return Origin(self.parent, self.templates, intervals) if self.parent else None

    def close(self) -> None:
        self.pager.close()


def find(store: ImageStore, writer: ImageWriter, pid: int) -> Ancestor | None:
    """What process `pid` was restored from, None if it was not. `writer` keeps a parent from being freed."""
    maps = procfs.parse_maps(procfs.read(pid, "maps"))
    mapped = {mapping.file for mapping in maps if is_template(mapping)}
    if not mapped:
        return None
    keys = store.keys()
    for key in running(keys):
        try:
            pager = connect_existing(key, f"snapshot {keys[key]}")
        except PagerError:
            continue
        if pager is None:
            continue
        if templates := _mapped_templates(pager, mapped):
            try:
                return Ancestor(writer.parent(keys[key]), pager, templates)
            except ChunkInvalid:
                return Ancestor(None, pager, templates)
    with suppress(PagerError):
        for _, pager in connect_all():
            if templates := _mapped_templates(pager, mapped):
                return Ancestor(None, pager, templates)
    return None


def _mapped_templates(pager: PagerClient, mapped: set[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The pager's templates; none, and the connection closed, if the process maps none of them."""
    templates = tuple(_files(pager))
    if not mapped.isdisjoint(templates):
        return templates
    pager.close()
    return ()


def _files(pager: PagerClient) -> Iterable[tuple[int, int]]:
    """(device, inode) of its templates."""
    for descriptor in (pager.template_fd, pager.hugetlb_fd):
        if descriptor is not None:
            about = os.fstat(descriptor)
            yield about.st_dev, about.st_ino
