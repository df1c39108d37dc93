"""Regular files, directories and O_PATH descriptors: reopened by their path.

Facts. The link of /proc/PID/fd/N is the file's path as seen from the reader's root, after renames; of a file that was
unlinked it ends in " (deleted)". open() drops O_CREAT, O_EXCL, O_NOCTTY and O_TRUNC from the flags that fdinfo shows,
but keeps O_TMPFILE. flock and OFD locks belong to the description; POSIX locks to the process, and any close() of the
same file drops them.

Consequence. The path is checked at the snapshot: it must lead to the very file (device and inode). /proc/PID becomes
/proc/self. Locks are taken last, after every other close(), without waiting. Advisory locks are part of a file's
state for databases.

Choice. At restore a regular file may have grown, shrunk or been replaced, as files do; refused is only what the
process could not make sense of: it is gone, it is another kind of thing, or its end now lies before the offset at
which the process reads.

Cost. Leases, and files without a path (deleted, O_TMPFILE), are not restored: the snapshot is refused. Where a file of
/proc was read in part, the kernel keeps the rest of the text from the moment of lseek(), in the midst of the restore.
"""

from __future__ import annotations

import os
import stat as modes
import struct

import msgspec

from lazyrestore._native import _core
from lazyrestore.errors import FileChanged
from lazyrestore.resources.descriptor import READ, Build, Item, Unsupported, View, access_of
from lazyrestore.restore_plan import OpenedPath

lib = _core.lib

_TMPFILE = os.O_TMPFILE & ~os.O_DIRECTORY
_FLOCK = struct.Struct("=hh4xqqi4x")  # struct flock of x86-64: type, whence, start, length, pid
_LOCK_SH, _LOCK_EX, _LOCK_NB = 1, 2, 4
_F_RDLCK, _F_WRLCK = 0, 1
_F_SETLK, _F_OFD_SETLK = 6, 37
_OF_OTHERS = (b"fd/", b"fdinfo/", b"map_files/")
_KINDS = {
    modes.S_IFREG: "regular file",
    modes.S_IFDIR: "directory",
    modes.S_IFLNK: "symbolic link",
    modes.S_IFIFO: "FIFO",
    modes.S_IFCHR: "character device",
    modes.S_IFBLK: "block device",
    modes.S_IFSOCK: "socket",
}


class Lock(msgspec.Struct, frozen=True):
    """kind: FLOCK, POSIX or OFDLCK; start: bytes; length: bytes, 0: to the end of the file."""

    kind: str
    exclusive: bool
    start: int
    length: int


class RegularFile(msgspec.Struct, frozen=True, tag="file"):
    """position and size in bytes, as they were at the snapshot."""

    path: bytes
    flags: int
    position: int
    size: int
    locks: tuple[Lock, ...] = ()


class Directory(msgspec.Struct, frozen=True, tag="directory"):
    """position: the file system's cookie for readdir."""

    path: bytes
    flags: int
    position: int
    locks: tuple[Lock, ...] = ()


class Location(msgspec.Struct, frozen=True, tag="path"):
    """An O_PATH descriptor; mode: the file type (S_IFMT)."""

    path: bytes
    flags: int
    mode: int


FileRecord = RegularFile | Directory | Location


def describe(record: FileRecord) -> str:
    kind = {"file": "file", "directory": "directory", "path": "O_PATH"}[str(record.__struct_config__.tag)]
    return f"{kind} {os.fsdecode(record.path)}"


def reachable_path(view: View) -> bytes:
    """The path that leads to the view's file. Unsupported if none does."""
    path = view.link
    own = b"/proc/%d/" % view.survey.pid
    try:
        found = os.lstat(path) if view.mode == modes.S_IFLNK else os.stat(path)
    except PermissionError as error:
        raise Unsupported("its path may not be looked at by this user (a directory above it is closed)") from error
    except OSError:
        found = None
    if found is None or (found.st_dev, found.st_ino) != view.identity:
        if path.startswith(b"/secretmem"):
            raise Unsupported("secret memory (memfd_secret) cannot be read")
        if view.stat.st_nlink == 0:
            raise Unsupported("deleted: it has no path any more")
        if _is_message_queue(view):
            raise Unsupported("POSIX message queues are not restored")
        raise Unsupported("its path does not lead to it (replaced, mounted over, or of another mount namespace)")
    if path.startswith(own + b"task/") and not path.startswith(own + b"task/%d/" % view.survey.pid):
        raise Unsupported("in /proc it belongs to a thread, and threads are made after the descriptors")
    if path.startswith(own) and path[len(own) :].removeprefix(b"task/%d/" % view.survey.pid).startswith(_OF_OTHERS):
        raise Unsupported("in /proc it belongs to a descriptor or a mapping, which may be made after it")
    return b"/proc/self/" + path[len(own) :] if path.startswith(own) else path


def capture(view: View) -> FileRecord | None:
    if view.flags & os.O_PATH:
        if not view.link.startswith(b"/"):
            return None
        return Location(reachable_path(view), view.flags, view.mode)
    if view.mode == modes.S_IFDIR:
        return Directory(reachable_path(view), view.flags, view.info.position, _locks(view))
    if view.mode == modes.S_IFREG and view.link.startswith(b"/"):
        flags = view.flags & ~_TMPFILE
        return RegularFile(reachable_path(view), flags, view.info.position, view.stat.st_size, _locks(view))
    return None


def restore(items: list[Item[FileRecord]], build: Build) -> None:
    for item in items:
        record = item.record
        with build.serving(item):
            path = build.ops.program.string(record.path)
            number = build.create(item, lib.SYS_openat, lib.AT_FDCWD, path, record.flags | os.O_CLOEXEC, 0)
            if isinstance(record, Location):
                continue
            if record.position:
                build.ops.call_expecting(record.position, lib.SYS_lseek, number, record.position, os.SEEK_SET)
            if record.locks:
                build.settled.append(lambda item=item, locks=record.locks: _take(item, locks, build))  # type: ignore[misc]


def opened_path(record: FileRecord) -> OpenedPath | None:
    """What its path must lead to, so that check() has nothing to say."""
    if record.path.startswith(b"/proc/self/"):
        return None
    if isinstance(record, Location):
        return OpenedPath(record.path, record.mode, link=record.mode == modes.S_IFLNK)
    if isinstance(record, Directory):
        return OpenedPath(record.path, modes.S_IFDIR)
    reads_on = access_of(record.flags) & READ and record.position <= record.size
    return OpenedPath(record.path, modes.S_IFREG, record.position if reads_on else 0)


def check(title: str, record: FileRecord) -> None:
    """Refuse what the process could not make sense of. FileChanged."""
    if record.path.startswith(b"/proc/self/"):
        return
    path = os.fsdecode(record.path)
    advice = f"put {path} back, or take a new snapshot"
    try:
        found = os.lstat(path) if isinstance(record, Location) and record.mode == modes.S_IFLNK else os.stat(path)
    except OSError as error:
        raise FileChanged(title, "open", errno=error.errno, advice=advice) from error
    wanted = record.mode if isinstance(record, Location) else None
    if isinstance(record, RegularFile):
        wanted = modes.S_IFREG
    elif isinstance(record, Directory):
        wanted = modes.S_IFDIR
    now = modes.S_IFMT(found.st_mode)
    if now != wanted:
        raise FileChanged(title, "open", f"was a {_KINDS.get(wanted or 0)}, is a {_KINDS.get(now)} now", advice)
    if (
        isinstance(record, RegularFile)
        and access_of(record.flags) & READ
        and found.st_size < record.position <= record.size
    ):
        reason = f"is {found.st_size} bytes long now, but was read up to byte {record.position} of {record.size}"
        raise FileChanged(title, "open", reason, advice)


def _locks(view: View) -> tuple[Lock, ...]:
    if b"lock:" not in view.info.rest:
        return ()
    from lazyrestore.kernel import fdinfo

    found = []
    for lock in fdinfo.locks(view.info.rest):
        if lock.kind not in ("FLOCK", "POSIX", "OFDLCK") or lock.access not in ("READ", "WRITE"):
            raise Unsupported(f"holds a {lock.kind} lock or lease, which is not restored")
        length = 0 if lock.end is None else lock.end + 1 - lock.start
        found.append(Lock(lock.kind, lock.access == "WRITE", lock.start, length))
    return tuple(found)


def _take(item: Item[FileRecord], locks: tuple[Lock, ...], build: Build) -> None:
    number = item.numbers[0]
    for lock in locks:
        with build.serving(item):
            if lock.kind == "FLOCK":
                how = _LOCK_EX if lock.exclusive else _LOCK_SH
                build.ops.call(lib.SYS_flock, number, how | _LOCK_NB, note="flock")
                continue
            kind = _F_WRLCK if lock.exclusive else _F_RDLCK
            argument = build.place(_FLOCK.pack(kind, os.SEEK_SET, lock.start, lock.length, 0))
            command = _F_SETLK if lock.kind == "POSIX" else _F_OFD_SETLK
            build.ops.call(lib.SYS_fcntl, number, command, argument, note=f"{lock.kind} lock")


def _is_message_queue(view: View) -> bool:
    if not view.access & READ:
        return False
    with view.duplicate() as number:
        try:
            return os.pread(number, 6, 0) == b"QSIZE:"
        except OSError:
            return False
