"""Which pages a process to be parked gets before: those that it is about to write, by the working set of those before
it, and those of mapped files that one before it has touched.

Facts. A process's own copy of a page costs a fault, a copy and a page, whoever makes it: the first write, a pager
(UFFDIO_COPY), or madvise(MADV_POPULATE_WRITE), which is the cheapest for many pages, but can only be called by the
process itself, before its memory is registered with a userfaultfd. It takes the page from the template, where it makes
one of zeros if there is none.

It can be called for many runs of pages at once with process_madvise() since Linux 6.13. Measured with 434 pages in 328
runs: 868 us one by one, 622 at once, 604 by writing to them.

A page of a mapped file that is in the page cache costs a fault, too, with up to 15 of its neighbours: the numpy worker
has 95 of these until its first response (0.35 ms of 1.3), Node 195. No working set tells which: they are not the
pager's.

Consequence. Only of chunks that the pager says are filled. At once, where the kernel does that; not by writing, which
would end in a signal where madvise() fails. A pool asks the first clone that is given back for its files' pages, and
keeps that in memory.
"""

from __future__ import annotations

import struct
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from lazyrestore._native import _core
from lazyrestore.program import PAGE, Descriptors, OpList, Program
from lazyrestore.store import format

if TYPE_CHECKING:
    from lazyrestore.manifest import Manifest
    from lazyrestore.restore_plan import Ahead
    from lazyrestore.store import StoredImage

lib, ffi = _core.lib, _core.ffi

Run = tuple[int, int]  # addresses of pages, end exclusive
MOST = 64 << 20  # bytes of files; who has read more has read data, too, and the next one may read others
_AT_ONCE = 1024  # IOV_MAX
_BITS = 16  # pages of a chunk of which a working set tells whether they were written


def own_pages_of(manifest: Manifest, image: StoredImage, working_set: bytes) -> tuple[Run, ...]:
    """Where the working set says that the process writes, in its lazy memory that can be written; sorted."""
    lazy = [v for v in manifest.vmas if v.kind == "lazy" and v.protection & lib.PROT_WRITE]
    runs: list[Run] = []
    for start in sorted(_written(image, working_set)):
        number = bisect(lazy, start, key=lambda v: v.start) - 1
        if number >= 0 and start < lazy[number].end:
            first = runs.pop()[0] if runs and runs[-1][1] == start else start
            runs.append((first, start + PAGE))
    return tuple(runs)


def file_pages_of(manifest: Manifest, pid: int) -> tuple[Run, ...]:
    """What a process that was restored from it has by now of its private mappings of files; nothing if it has ended, or
    before Linux 6.7."""
    runs: list[Run] = []
    room = 1024
    ranges, following = ffi.new(f"uint64_t[{2 * room}]"), ffi.new("uint64_t *")
    with suppress(OSError), open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for v in manifest.vmas:
            following[0] = v.start
            while v.kind == "file" and not v.shared and following[0] < v.end:
                scanned = following[0], v.end, lib.LR_PAGES_OF_FILE, ranges, room, following
                count = lib.lr_scan_pages(pagemap.fileno(), *scanned)
                if count < 0:
                    return ()
                runs += [(ranges[2 * index], ranges[2 * index + 1]) for index in range(count)]
    return tuple(runs) if sum(end - start for start, end in runs) <= MOST else ()


def restore(ahead: Ahead, pid: int, program: Program, ops: OpList, fds: Descriptors) -> None:
    """Append what gives the process these pages. As its first touch would, which this spares it; where it is refused,
    that still does. pid: as the process itself sees it."""
    _populate(ahead.own, lib.MADV_POPULATE_WRITE, pid, program, ops, fds)
    _populate(ahead.of_files, lib.MADV_POPULATE_READ, pid, program, ops, fds)


def _populate(runs: Sequence[Run], advice: int, pid: int, program: Program, ops: OpList, fds: Descriptors) -> None:
    if not runs:
        return
    from lazyrestore.kernel import libc

    if not libc.madvises_itself_at_once(advice):
        for start, end in runs:
            ops.try_call(lib.SYS_madvise, start, end - start, advice)
        return
    itself = fds.create(lib.SYS_pidfd_open, pid, 0)
    for first in range(0, len(runs), _AT_ONCE):
        some = runs[first : first + _AT_ONCE]
        vector = program.place(b"".join(struct.pack("<QQ", start, end - start) for start, end in some))
        ops.try_call(lib.SYS_process_madvise, itself, vector, len(some), advice, 0)
    fds.close(itself)


def _written(image: StoredImage, working_set: bytes) -> Iterator[int]:
    """The addresses of the pages that a working set calls written. Raises ChunkInvalid."""
    for number, written, pages in format.TOUCHED.iter_unpack(working_set):
        if written := written & pages if pages else written:
            address, length, *_ = image.entry(number)
            yield from (address + i * PAGE for i in range(min(length // PAGE, _BITS)) if written >> i & 1)
