"""The store's two lock files: one writer at a time, and pins that keep a snapshot's packs in place.

Facts. flock() and F_OFD_SETLK locks belong to an open file description: they go with a descriptor that is sent to
another process or inherited, conflict between two descriptions of one process, and vanish when the last descriptor is
closed, so also by kill -9 (fcntl(2), flock(2)). An F_RDLCK needs only read access, an F_WRLCK write access. Classic
POSIX locks, which LMDB uses on lock.mdb, vanish when *any* descriptor of the file is closed: nothing here ever opens
lock.mdb.
Consequence. A reader that must never wait for a writer cannot hold LMDB's read transaction for days: that would keep
every page from being reused. It needs only the values of one snapshot, and LMDB never moves a value's overflow pages
while the value exists.
Choice. `writer.lock` is flock()ed by whoever writes packs or frees them. Who writes has locked its first byte before,
and tells its PID: while that byte is not locked, the flock() is held for a moment only. In `pins`, byte number
(snapshot id) is locked shared by each user of that snapshot, and exclusively by the one who frees it, until the
transaction that does so is over; what is in the byte tells the last user, if that is a pager, that the snapshot
was removed, so that the pager has it freed. Names may be removed without the writer lock: that frees nothing. Whoever
begins a write transaction locks the second byte of `writer.lock` first: to wait for LMDB's own mutex nothing can end,
Ctrl-C neither.
Cost. A pin must be taken first and the snapshot looked up again afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from types import TracebackType

from lazyrestore.errors import StoreBusy, StoreError, StoreFull, StoreReadOnly
from lazyrestore.store import waiting

FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid; native alignment

_WRITES = 0  # the byte of writer.lock that who writes has locked
_TRANSACTION = 1  # and the one that who has a write transaction has locked
_FLOCK, _OFD = "FLOCK", "OFDLCK .* WRITE .* {0} {0}$"  # as /proc/PID/fdinfo has them

_held: set[WriterLock] = set()
_transactions: set[int] = set()  # descriptors


def _forget_in_child() -> None:
    # The child shares the description, so it would keep the lock beyond the parent's death; closing unlocks nothing.
    for lock in list(_held):
        lock.forget()
    while _transactions:
        os.close(_transactions.pop())


os.register_at_fork(after_in_child=_forget_in_child)


def not_allowed(directory: str, path: str, *, create: bool = False) -> StoreError:
    """The exception that stands for EACCES on `path`, the store's directory or in it: says whose it is."""
    import pwd

    found = path
    while True:
        try:
            about = os.stat(found)
            break
        except OSError:  # behind a directory that may not be entered, or to be made
            found = os.path.dirname(found)
    try:
        owner = f"{pwd.getpwuid(about.st_uid).pw_name} (user {about.st_uid})"
    except KeyError:
        owner = f"user {about.st_uid}"
    belongs = f"belongs to {owner}, mode {about.st_mode & 0o7777:04o}, and you are user {os.geteuid()}"
    if found == path:
        reason, kind = f"it may not be read: {'it' if path == directory else path} {belongs}", StoreError
    elif create:
        reason, kind = f"it cannot be made: {found} {belongs}", StoreReadOnly
    else:
        reason, kind = f"it cannot be reached: {found} {belongs}", StoreError
    return kind(f"store {directory}", "open", reason, "act as that user, or name a store of yours", errno=errno.EACCES)


def os_error(resource: str, step: str, error: OSError) -> StoreError:
    """The exception that stands for a failed system call on the store."""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = "the store can be read but not changed; make it writable, or choose another"
        return StoreReadOnly(resource, step, advice=advice, errno=error.errno)
    if error.errno == errno.EFBIG:
        from resource import RLIM_INFINITY, RLIMIT_FSIZE, getrlimit

        if getrlimit(RLIMIT_FSIZE)[0] == RLIM_INFINITY:
            advice = "its file system takes no file so large; choose a store elsewhere"
        else:
            advice = "no file may become so large here; raise that limit (ulimit -f unlimited)"
        return StoreFull(resource, step, advice=advice, errno=error.errno)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(resource, step, advice="free some space, or remove snapshots", errno=error.errno)
    return StoreError(resource, step, errno=error.errno)


class WriterLock:
    """The exclusive right to add and free packs. Raises StoreBusy if another has it and `wait` is False.

    brief: it is held just to free something, so whoever comes meanwhile waits.
    """

    def __init__(self, directory: str, *, wait: bool = False, brief: bool = False) -> None:
        self._resource = f"store {directory}"
        self._fd = -1
        try:
            self._fd = _open_writer_lock(directory)
            if brief:
                self._take_briefly(wait)
            else:
                _lock_byte(self._resource, self._fd, _WRITES, wait=wait)
                self._flock()
                with contextlib.suppress(OSError):  # the PID is for the error message
                    os.ftruncate(self._fd, 0)
                    os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            pid = os.pread(self._fd, 20, 0).decode(errors="replace").strip()
            self.forget()
            raise StoreBusy(
                self._resource,
                "lock",
                f"process {pid} is writing to it" if pid.isdigit() else "another process is writing to it",
                "wait until it is done",
                errno=errno.EWOULDBLOCK,
            ) from error
        except BaseException as error:
            self.forget()
            if isinstance(error, OSError):
                raise os_error(self._resource, "lock", error) from error
            raise
        _held.add(self)

    def _take_briefly(self, wait: bool) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait and _is_locked(self._fd, _WRITES):
                raise
            self._flock()

    def _flock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with waiting.patience(self._resource, self._fd, _FLOCK):
                fcntl.flock(self._fd, fcntl.LOCK_EX)

    def close(self) -> None:
        """Release the lock, also for forked children; harmless when it is released already."""
        if self in _held:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _byte(fcntl.F_UNLCK, _WRITES))
        self.forget()

    def forget(self) -> None:
        """Close the descriptor; the lock remains if another process has the same description."""
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)
        _held.discard(self)

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def transaction(directory: str) -> Iterator[None]:
    """One write transaction at a time, of all threads and processes. Raises OSError."""
    descriptor = _open_writer_lock(directory)
    _transactions.add(descriptor)
    try:
        _lock_byte(f"store {directory}", descriptor, _TRANSACTION, wait=True)
        yield
    finally:
        _transactions.discard(descriptor)
        os.close(descriptor)


def _open_writer_lock(directory: str) -> int:
    return os.open(os.path.join(directory, "writer.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock_byte(resource: str, descriptor: int, number: int, *, wait: bool) -> None:
    """Raises BlockingIOError if another has it and `wait` is False."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _byte(fcntl.F_WRLCK, number))
    except BlockingIOError:
        if not wait:
            raise
        with waiting.patience(resource, descriptor, _OFD.format(number)):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _byte(fcntl.F_WRLCK, number))


def _byte(kind: int, number: int) -> bytes:
    """What fcntl() wants to be told of a lock on one byte."""
    return FLOCK.pack(kind, os.SEEK_SET, number, 1, 0)


def _is_locked(descriptor: int, number: int) -> bool:
    """Whether another description has a lock on that byte, of whatever kind."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _byte(fcntl.F_WRLCK, number))
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def pin(directory: str, snapshot: int) -> int:
    """A descriptor whose shared lock keeps the packs of snapshot `snapshot` (an id) in place; the caller owns it.

    Waits while somebody frees that snapshot: look whether it still exists afterwards. Raises StoreError.
    """
    descriptor = _open_pins(directory, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _byte(fcntl.F_RDLCK, snapshot))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            raise os_error(f"store {directory}", "pin", error) from error
        raise
    return descriptor


class FreeingLock:
    """Exclusive locks on the pins of snapshots that are about to be freed; close() releases them all."""

    def __init__(self, directory: str) -> None:
        self._fd = _open_pins(directory, os.O_RDWR)

    def take(self, snapshot: int) -> bool:
        """Whether nobody uses snapshot `snapshot`; if so nobody can until close()."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _byte(fcntl.F_WRLCK, snapshot))
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, says fcntl(2)
            return False
        return True

    def close(self) -> None:
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> FreeingLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def mark_removed(directory: str, snapshots: list[int]) -> None:
    """Tell the pagers of these snapshots (ids), which have no name any more, to have them freed when they end."""
    descriptor = _open_pins(directory, os.O_RDWR)
    try:
        with contextlib.suppress(OSError):  # a full disk, say: a later writer frees them
            for snapshot in snapshots:
                os.pwrite(descriptor, b"\1", snapshot)
    finally:
        os.close(descriptor)


def pinned(directory: str, snapshot: int) -> bool:
    """Whether anybody uses snapshot `snapshot` now."""
    descriptor = _open_pins(directory, os.O_RDONLY)
    try:
        return _is_locked(descriptor, snapshot)
    finally:
        os.close(descriptor)


def create_pins(directory: str) -> None:
    """Make the file; done once, when the store is made."""
    os.close(os.open(os.path.join(directory, "pins"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _open_pins(directory: str, access: int) -> int:
    path = os.path.join(directory, "pins")
    try:
        return os.open(path, access | os.O_CLOEXEC)
    except FileNotFoundError:
        pass  # a copy of the data alone; locks in a new file do as well
    except OSError as error:
        raise os_error(f"store {directory}", "open the pins", error) from error
    try:
        create_pins(directory)
        return os.open(path, access | os.O_CLOEXEC)
    except OSError as error:
        raise os_error(f"store {directory}", "create the pins", error) from error
