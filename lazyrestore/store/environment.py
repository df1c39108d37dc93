"""The LMDB environment of a store: opened once per process, its errors translated, its values found in the data file.

Facts. One process must not open an LMDB environment twice, nor use one that it inherited by fork (lmdb.h, "Caveats").
The whole data file is one shared mapping; a committed value longer than about half a page lies in *overflow pages*,
contiguous, behind one 16-byte page header, and stays in these pages until it is deleted or replaced: LMDB copies the
tree's pages on write, but not what their nodes point to. LMDB reads pages through the mapping without asking for the
file's length, so a truncated file means SIGBUS. It may leave the last pages it has allocated unwritten when they were
freed again in the same transaction, so a sound file may end early. With MDB_NOMETASYNC a commit writes its data to disk
before its meta page: after a power cut the newest transactions may be missing, the file is consistent.
Consequence. (file offset, length) of a long value can be handed to another process and stays true while the value
exists.
Choice. A registry of environments by the data file's inode, counted; a forked child closes what it inherited and opens
its own. The map is 1 TiB of address space, less where that is refused, and grows. The file is always extended
(sparsely) beyond all a transaction could allocate, so that "shorter than the last page" means truncated. Offsets come
from a value's address and /proc/self/maps, and every one is verified against the page header in the file before it
leaves here.
Cost. The file looks up to 5 % longer than it is (`du` tells the truth). A store whose lock file cannot be written is
read under a shared lock on `writer.lock`, during which no writer can start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import lmdb
import msgspec

from lazyrestore.errors import (
    ChunkInvalid,
    NotAStore,
    StoreBusy,
    StoreError,
    StoreReadOnly,
    StoreVersionError,
)
from lazyrestore.store import format, locks, reserve
from lazyrestore.store.address import address_of

MAP_BYTES = 1 << 40  # of address space; more than any store, less than the 47 bits that a process has
MAP_LEAST = 64 << 20  # where a limit on address space leaves less than this, opening fails
NAME_ANOTHER = "name a store, or a directory that does not exist yet"
READERS = 1022  # simultaneous read transactions of all processes; LMDB's table of 64-byte slots then fills 16 pages

PAGE_HEADER = struct.Struct("<QHHI")  # page number, unused, flags, pages: lmdb's MDB_page of an overflow page
OVERFLOW = 4  # P_OVERFLOW

T = TypeVar("T")
Transaction = Any  # lmdb.Transaction: the binding's types differ between its versions


@contextlib.contextmanager
def _standard_streams_taken() -> Iterator[None]:
    """No file that is opened meanwhile becomes standard input, output or error of a process that has these closed.

    LMDB's data file must not: what is written to a standard stream, by a child too (LMDB does not set close-on-exec
    there), would be written to its first page.
    """
    held = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)]
    try:
        while held[-1] <= 2:
            held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        yield
    finally:
        for number in held:
            os.close(number)


class Environment:
    """One open LMDB environment. Transactions of several threads may run at once."""

    def __init__(self, directory: str, *, create: bool) -> None:
        self.directory = directory
        self.resource = f"store {directory}"
        self.data_path = os.path.join(directory, "data.mdb")
        self._idle = threading.Condition()
        self._transactions = 0
        self._origin: int | None = None  # address of the data file's byte 0 in this process
        self.fd = -1
        with self._translated("open"), _standard_streams_taken():
            self._env = self._open()
        try:
            self.page = int(self._env.stat()["psize"])
            self.fd = os.open(self.data_path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self.fd)
            self.identity = (status.st_dev, status.st_ino)
            self._check_length(status.st_size)
            if create and self._empty():
                with self._translated("create"):
                    self._initialise()
            self.uuid = self._check_identity()
        except BaseException:
            self.close()
            raise

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        fresh = not os.path.exists(self.data_path)
        lock = os.path.join(self.directory, "lock.mdb")
        effective = os.access in os.supports_effective_ids
        directory_writable = os.access(self.directory, os.W_OK, effective_ids=effective)
        lock_exists = os.path.exists(lock)
        self.locked = os.access(lock, os.W_OK, effective_ids=effective) if lock_exists else directory_writable
        self.writable = self.locked and (fresh or os.access(self.data_path, os.W_OK, effective_ids=effective))
        if not fresh and not os.access(self.data_path, os.R_OK, effective_ids=effective):
            raise locks.not_allowed(self.directory, self.data_path)
        if not self.writable and fresh:
            raise locks.os_error(self.resource, "create", OSError(errno.EROFS, os.strerror(errno.EROFS)))
        options: dict[str, Any] = {"lib_version": 0} if hasattr(lmdb.Environment, "lib_version") else {}
        size = MAP_BYTES
        while True:
            try:
                return lmdb.open(
                    os.fsencode(self.directory),
                    map_size=size,
                    readonly=not self.writable,
                    lock=self.locked,
                    create=self.writable,
                    metasync=False,
                    mode=0o600,
                    max_readers=READERS,
                    **options,
                )
            except lmdb.Error as error:
                size //= 2
                if _number(error) != errno.ENOMEM or size < MAP_LEAST:
                    raise

    def _check_length(self, size: int) -> None:
        due = (int(self._env.info()["last_pgno"]) + 1) * self.page
        if size < due and not self._fresh_meta(size):
            raise ChunkInvalid(
                self.resource,
                "open",
                f"data.mdb is truncated: {size} bytes of at least {due}",
                "restore it from a backup",
            )

    def _fresh_meta(self, size: int) -> bool:
        return size >= 2 * self.page and int(self._env.info()["last_txnid"]) == 0

    def _empty(self) -> bool:
        return bool(self.writable and self._env.stat()["entries"] == 0)

    def _initialise(self) -> None:
        with locks.WriterLock(self.directory, wait=True):
            if self._empty():
                locks.create_pins(self.directory)
                with self._env.begin(write=True) as txn:
                    identity = format.Identity(format.MAGIC, format.VERSION, os.urandom(16).hex(), time.time())
                    txn.put(format.IDENTITY, format.encode(identity))
                    txn.put(format.COUNTERS, format.encode(format.Counters()))
                    self._make_room(0)
                self._env.sync(True)
                reserve.allocate(self.directory)

    def _check_identity(self) -> str:
        stranger = NotAStore(
            self.resource,
            "open",
            "an LMDB environment of another program",
            NAME_ANOTHER,
        )
        with self.read() as txn:
            data = txn.get(format.IDENTITY)
            try:
                head = format.decode(data or b"", format.Head, self.resource)
            except ChunkInvalid:
                raise stranger from None
            if head.magic != format.MAGIC:
                raise stranger
            if head.version > format.VERSION:
                raise StoreVersionError(
                    self.resource,
                    "open",
                    f"written in format {head.version}; this lazyrestore knows format {format.VERSION}",
                    "use the lazyrestore that wrote it, or a newer one",
                )
            return format.decode(data, format.Identity, self.resource).uuid

    def upgrade(self, txn: Transaction) -> None:
        """In a write transaction that adds what only this version knows: the store is of this version from then on."""
        identity = format.decode(self.need(txn, format.IDENTITY), format.Identity, self.resource)
        if identity.version < format.VERSION:
            txn.put(format.IDENTITY, format.encode(msgspec.structs.replace(identity, version=format.VERSION)))

    @property
    def busy(self) -> bool:
        """Whether a transaction is in progress in this process."""
        return self._transactions > 0

    def close(self) -> None:
        self._env.close()
        descriptor, self.fd = self.fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    # -- transactions --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def read(self) -> Iterator[Transaction]:
        """A read transaction; values are memoryviews that are valid inside it. Raises StoreError."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._translated("read"))
            if not self.locked:
                stack.enter_context(self._shared_lock())
            txn = self._begin(stack)
            stack.push(txn.__exit__)
            yield txn

    def _begin(self, stack: contextlib.ExitStack) -> Transaction:
        while True:
            with contextlib.ExitStack() as attempt:
                attempt.enter_context(self._counted())
                try:
                    txn = self._env.begin(buffers=True)
                    stack.push(attempt.pop_all())
                    return txn
                except lmdb.MapResizedError:
                    pass  # another process has made the map bigger
            self._resize(0)

    def update(self, operation: Callable[[Transaction], T], *, room: int = 0, removes: bool = False) -> T:
        """What `operation` returns, run in a write transaction that is committed if it does not raise.

        It is run again, in another transaction, when the map had to grow. room: bytes of values it will write. removes:
        it may take what is reserved for that. Raises StoreReadOnly, StoreFull, StoreError; the store is then as it was.
        """
        self.check_writable()
        while True:
            try:
                with self._writing(), self._env.begin(write=True, buffers=True) as txn:
                    result = operation(txn)
                    self._make_room(room // self.page + 1)
                return result
            except StoreError as error:
                number = error.errno
                if number == errno.EIO:  # LMDB's word for a write that ended early
                    number = self._reason_to_cut_short(room) or number
                if number == errno.ENOSPC and removes and reserve.give_up(self.directory):
                    continue
                if number is None or number == error.errno:
                    raise
                raise locks.os_error(self.resource, "write", OSError(number, os.strerror(number))) from error
            except lmdb.MapFullError:
                self._resize(2 * int(self._env.info()["map_size"]))
            except lmdb.MapResizedError:
                self._resize(0)

    def check_writable(self) -> None:
        """Raises StoreReadOnly."""
        if not self.writable:
            raise locks.os_error(self.resource, "write", OSError(errno.EROFS, os.strerror(errno.EROFS)))

    def alone(self, operation: Callable[[], None]) -> None:
        """Run `operation`, which writes no record, while no process can write one."""
        with self._writing():
            txn = self._env.begin(write=True)
            try:
                operation()
            finally:
                txn.abort()

    def _make_room(self, pages: int) -> None:
        """Let the file reach beyond whatever the transaction in progress allocates: its values, the tree's copied pages
        and the list of free pages (at most 1/512 of the file), for which 1/32 of the file and 4 MiB are ample."""
        last = int(self._env.info()["last_pgno"])
        due = (last + 1 + pages + last // 32 + 1024) * self.page
        if os.stat(self.data_path).st_size < due:
            os.truncate(self.data_path, due)

    def _reason_to_cut_short(self, room: int) -> int:
        """The errno of a write that ended early, 0 if there is none to be seen."""
        from resource import RLIM_INFINITY, RLIMIT_FSIZE, getrlimit

        status = os.statvfs(self.data_path)
        if status.f_bavail * status.f_frsize < room + (1 << 20):
            return errno.ENOSPC
        limit = getrlimit(RLIMIT_FSIZE)[0]
        return errno.EFBIG if limit != RLIM_INFINITY and limit < os.fstat(self.fd).st_size + room + (1 << 20) else 0

    def sync(self) -> None:
        """Everything committed is on disk when this returns."""
        with self._translated("sync"):
            self._env.sync(True)

    def need(self, txn: Transaction, key: bytes) -> memoryview:
        """A value that must be there. Raises ChunkInvalid."""
        value: memoryview | None = txn.get(key)
        if value is None:
            raise ChunkInvalid(self.resource, "read", f"nothing stored under {key!r}", "see `lazyrestore verify`")
        return value

    def records(self, txn: Transaction, table: bytes) -> Iterator[tuple[memoryview, memoryview]]:
        """(key without the table's byte, value) of each record of a table, in order."""
        with txn.cursor() as cursor:
            if cursor.set_range(table):
                for key, value in cursor.iternext():
                    if key[:1] != table:
                        return
                    yield key[1:], value

    def keys(self, txn: Transaction, table: bytes) -> list[int]:
        """The ids of a table that is keyed by them; touches no long value."""
        found = []
        with txn.cursor() as cursor:
            if cursor.set_range(table):
                for key in cursor.iternext(keys=True, values=False):
                    if key[:1] != table:
                        break
                    found.append(format.number_of(key, self.resource))
        return found

    def last_transaction(self) -> int:
        """The number of the last one committed, by whatever process."""
        return int(self._env.info()["last_txnid"])

    def forget_dead_readers(self) -> None:
        """Free the slots of killed readers, which would keep pages from being reused."""
        self._env.reader_check()

    def lengthen(self, value: bytes) -> bytes:
        """`value` with zeros behind it, at least so long that LMDB gives it pages of its own, which never move."""
        return value.ljust(self.page - PAGE_HEADER.size, b"\0")

    # -- values in the data file ---------------------------------------------------------------------------------------

    def file_offset(self, value: memoryview) -> int:
        """Where in data.mdb a value of a running transaction stands. Raises ChunkInvalid rather than be wrong."""
        address = address_of(value)
        if self._origin is None:
            self._origin = self._find_origin(address)
        offset = address - self._origin
        head = offset - PAGE_HEADER.size
        sample = value[:16]
        found = os.pread(self.fd, PAGE_HEADER.size + len(sample), head) if head >= 0 else b""
        if len(found) == PAGE_HEADER.size + len(sample) and found[PAGE_HEADER.size :] == sample:
            number, _, flags, pages = PAGE_HEADER.unpack_from(found)
            room = pages * self.page - PAGE_HEADER.size
            if number * self.page == head and flags == OVERFLOW and len(value) <= room:
                return offset
        raise ChunkInvalid(
            self.resource, "locate a value", f"file offset {offset} does not hold it", "see `lazyrestore verify`"
        )

    def pages_of(self, value: memoryview) -> tuple[int, int]:
        """File offsets, end exclusive, of the pages that a long value of a running transaction occupies, header
        included."""
        start = self.file_offset(value) - PAGE_HEADER.size
        return start, start + -(-(PAGE_HEADER.size + len(value)) // self.page) * self.page

    def unused_tail(self) -> tuple[int, int]:
        """File offsets, end exclusive, of what lies behind the last page that any transaction has used."""
        return (int(self._env.info()["last_pgno"]) + 1) * self.page, os.fstat(self.fd).st_size

    def _find_origin(self, address: int) -> int:
        with open("/proc/self/maps", "rb") as maps:
            for line in maps:
                span, _, offset, _, inode = line.split(maxsplit=5)[:5]
                start, end = (int(part, 16) for part in span.split(b"-"))
                if start <= address < end and int(inode) == self.identity[1]:
                    return start - int(offset, 16)
        raise StoreError(self.resource, "locate a value", "the data file's mapping is not in /proc/self/maps")

    # -- helpers -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self._translated("write"), locks.transaction(self.directory), self._counted():
            yield

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._idle:
            self._transactions += 1
        try:
            yield
        finally:
            with self._idle:
                self._transactions -= 1
                self._idle.notify_all()

    def _resize(self, size: int) -> None:
        """Change the map when no transaction runs in this process; size 0: to what the file says."""
        with self._idle, self._translated("grow the map"):
            self._idle.wait_for(lambda: self._transactions == 0)
            self._env.set_mapsize(size)
            self._origin = None

    @contextlib.contextmanager
    def _shared_lock(self) -> Iterator[None]:
        try:
            descriptor = os.open(os.path.join(self.directory, "writer.lock"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            yield
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            reason = "being written to, and its lock file cannot be written to read it meanwhile"
            raise StoreBusy(self.resource, "read", reason, errno=error.errno) from error
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _translated(self, step: str) -> Iterator[None]:
        try:
            yield
        except (lmdb.MapFullError, lmdb.MapResizedError):
            raise
        except lmdb.Error as error:
            raise _translate(self.resource, step, error) from error
        except OSError as error:
            raise locks.os_error(self.resource, step, error) from error


def _number(error: Exception) -> int:
    """errno of an LMDB exception, 0 if it is one of LMDB's own codes."""
    if isinstance(error, lmdb.MemoryError):
        return errno.ENOMEM
    code = getattr(error, "code", 0)
    return code if isinstance(code, int) and code > 0 else 0


def _translate(resource: str, step: str, error: Exception) -> StoreError:
    if isinstance(error, (lmdb.InvalidError, lmdb.VersionMismatchError)):
        return NotAStore(resource, step, "data.mdb is not an LMDB 0.9 file", NAME_ANOTHER)
    if isinstance(error, (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.BadTxnError)):
        return ChunkInvalid(resource, step, f"damaged ({error})", "see `lazyrestore verify`")
    if isinstance(error, lmdb.ReadonlyError):
        return StoreReadOnly(resource, step, str(error))
    if isinstance(error, lmdb.ReadersFullError):
        return StoreBusy(resource, step, f"{READERS} readers are at work", "try again later")
    if number := _number(error):
        return locks.os_error(resource, step, OSError(number, os.strerror(number)))
    return StoreError(resource, step, str(error))
