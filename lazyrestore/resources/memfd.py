"""memfd: a memory file without a path.

Facts. The link is "/memfd:NAME (deleted)". Opening /proc/self/fd/N gives a description of its own on the same file.
Seals can be added, never removed; F_SEAL_WRITE is refused (EBUSY) while anybody maps the file shared and writable,
F_SEAL_FUTURE_WRITE (5.1) is not. A file made without MFD_ALLOW_SEALING has F_SEAL_SEAL.

Consequence. What the process maps is a shared object of the image: the restorer hands over a memfd (made with
MFD_ALLOW_SEALING) that the pager fills through a writable mapping of its own, and every description is opened from
that. Therefore F_SEAL_WRITE becomes F_SEAL_FUTURE_WRITE there: write() and new writable mappings fail for the process
all the same; only F_GET_SEALS tells the difference. A small memfd that is not mapped is kept whole in its record.

Cost. The name is not restored for a handed-over file. A big memfd that is not mapped is refused.
"""

from __future__ import annotations

import fcntl
import os
import stat as modes

import msgspec

from lazyrestore._native import _core
from lazyrestore.errors import RestoreError
from lazyrestore.resources.descriptor import Build, Item, Unsupported, View

lib = _core.lib

INLINE_LIMIT = 1 << 20
"""Bytes of an unmapped memfd that are copied while the process is frozen (about 0.2 ms) and stored in the manifest."""

_PREFIX, _SUFFIX = b"/memfd:", b" (deleted)"
_DEFAULT_MODE = 0o777


class Extent(msgspec.Struct, frozen=True):
    offset: int
    data: bytes


class Memfd(msgspec.Struct, frozen=True, tag="memfd"):
    """position and size in bytes; page_size: 0, or the huge page size in bytes; permissions: mode bits; contents: the
    written parts, None if the restorer hands the file over; owner: user and group, None in old snapshots.
    """

    name: bytes
    flags: int
    position: int
    size: int
    seals: int
    device: int
    inode: int
    page_size: int
    permissions: int
    contents: tuple[Extent, ...] | None
    owner: tuple[int, int] | None = None


def shared_object_key(record: Memfd) -> tuple[int, int]:
    """(device, inode) under which the restorer knows the memory file."""
    return record.device, record.inode


def describe(record: Memfd) -> str:
    return f"memfd {os.fsdecode(record.name)}"


def capture(view: View) -> Memfd | None:
    link = view.link
    if view.mode != modes.S_IFREG or view.stat.st_nlink or not (link.startswith(_PREFIX) and link.endswith(_SUFFIX)):
        return None
    status = view.stat
    with view.duplicate() as number:
        try:
            seals = fcntl.fcntl(number, fcntl.F_GET_SEALS)
        except OSError:
            return None
        block = os.fstatvfs(number).f_bsize
        page_size = block if block > os.sysconf("SC_PAGE_SIZE") else 0
        contents: tuple[Extent, ...] | None = None
        if view.identity not in view.survey.mapped():
            held = min(status.st_blocks * 512, status.st_size)  # without holes; a huge page may go beyond the end
            if held > (0 if page_size else INLINE_LIMIT):
                limit = f"up to {INLINE_LIMIT} would be kept"
                raise Unsupported(f"holds {held} bytes that are not mapped; {limit}")
            contents = _extents(number, status.st_size) if view.survey.contents else ()
    return Memfd(
        link[len(_PREFIX) : -len(_SUFFIX)],
        view.flags,
        view.info.position,
        status.st_size,
        seals,
        *view.identity,
        page_size,
        modes.S_IMODE(status.st_mode),
        contents,
        (status.st_uid, status.st_gid),
    )


def restore(items: list[Item[Memfd]], build: Build) -> None:
    files: dict[tuple[int, int], list[Item[Memfd]]] = {}
    for item in items:
        files.setdefault(shared_object_key(item.record), []).append(item)
    for key, descriptions in files.items():
        with build.serving(descriptions[0]):
            _restore_file(key, descriptions, build)


def _restore_file(key: tuple[int, int], items: list[Item[Memfd]], build: Build) -> None:
    ops, record = build.ops, items[0].record
    source = build.context.shared_fd(*key)
    own = None
    seals = record.seals
    if source is not None:
        if seals & fcntl.F_SEAL_WRITE:
            seals = seals & ~fcntl.F_SEAL_WRITE | lib.F_SEAL_FUTURE_WRITE
    else:
        if record.contents is None:
            raise RestoreError(
                items[0].title, "restore", "the snapshot does not hold its contents", "take a new snapshot"
            )
        own = source = _recreate(record, record.contents, build)
    if record.owner is not None:  # who is not root owns what it makes, and may give it to its own groups only
        ops.try_call(lib.SYS_fchownat, source, ops.program.string(b""), *record.owner, lib.AT_EMPTY_PATH)
    if record.permissions != _DEFAULT_MODE:
        ops.call(lib.SYS_fchmod, source, record.permissions)
    for item in items:
        number = build.reopen(item, source, item.record.flags)
        if item.record.position:
            ops.call_expecting(item.record.position, lib.SYS_lseek, number, item.record.position, os.SEEK_SET)
    if seals:
        ops.call(lib.SYS_fcntl, source, lib.F_ADD_SEALS, seals, note="F_ADD_SEALS")
    if own is not None:
        build.fds.close(own)


def _recreate(record: Memfd, contents: tuple[Extent, ...], build: Build) -> int:
    ops = build.ops
    flags = lib.MFD_CLOEXEC | lib.MFD_ALLOW_SEALING
    if record.page_size:
        flags |= lib.MFD_HUGETLB | record.page_size.bit_length() - 1 << lib.MFD_HUGE_SHIFT
    number = build.fds.create(lib.SYS_memfd_create, ops.program.string(record.name), flags)
    ops.call(lib.SYS_ftruncate, number, record.size)
    for extent in contents:
        length = len(extent.data)
        ops.call_expecting(length, lib.SYS_pwrite64, number, build.place(extent.data), length, extent.offset)
    return number


def _extents(number: int, size: int) -> tuple[Extent, ...]:
    """The written parts of a file. Reads through a description of its own, so that no offset moves."""
    found: list[Extent] = []
    reader = os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        at = 0
        while at < size:
            try:
                start = os.lseek(reader, at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                break
            at = os.lseek(reader, start, os.SEEK_HOLE)
            found.append(Extent(start, os.pread(reader, at - start, start)))
    finally:
        os.close(reader)
    return tuple(found)
