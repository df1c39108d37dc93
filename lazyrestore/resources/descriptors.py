"""The descriptor table: what every number of a process refers to, and how it is made again.

Facts. /proc/PID/fd tells the object, fdinfo the description, kcmp whether two numbers share one. A descriptor costs
about 30 µs to look at from Python, most of it opening its fdinfo. Threads can have descriptor tables of their own
(unshare(CLONE_FILES)).

Consequence. Every number is looked at; kcmp, by which descriptions can be sorted, decides among those whose object,
flags and offset are equal (a socket cannot be opened twice, so there its inode decides). Each description is offered to
the kinds in order; what no kind takes is unsupported, never dropped.

Choice. One kind per file, each with its record, capture and restore; this file only knows their order. Restore makes
everything under the lowest free numbers and moves all at once, as the kinds need not know what the others occupy.
"""

from __future__ import annotations

import os
import socket
import stat as modes
import time
from collections.abc import Callable, Iterable
from errno import EIO, ENOENT, ESRCH
from functools import cache, cmp_to_key
from typing import TYPE_CHECKING, Any

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources import (
    devices,
    epoll,
    eventfd,
    fifo,
    files,
    inet_socket,
    memfd,
    owner,
    pipe,
    signalfd,
    timerfd,
    unix_socket,
)
from lazyrestore.resources.descriptor import Build, Gone, Item, RestoreContext, Survey, Unsupported, View
from lazyrestore.resources.devices import Device, Terminal
from lazyrestore.resources.epoll import Epoll
from lazyrestore.resources.eventfd import Eventfd
from lazyrestore.resources.fifo import Fifo
from lazyrestore.resources.files import Directory, Location, RegularFile
from lazyrestore.resources.inet_socket import TcpListener, TcpSocket, UdpSocket
from lazyrestore.resources.listeners import replaced
from lazyrestore.resources.memfd import Memfd, shared_object_key
from lazyrestore.resources.owner import Owner
from lazyrestore.resources.pipe import ExternalPipe, PipeEnd
from lazyrestore.resources.signalfd import Signalfd
from lazyrestore.resources.timerfd import Timerfd
from lazyrestore.resources.unix_socket import UnixPair, UnixSocket
from lazyrestore.restore_plan import Address, OpenedPath

if TYPE_CHECKING:
    from lazyrestore.program import Descriptors, OpList

__all__ = [
    "Description",
    "Descriptor",
    "FdTable",
    "RestoreContext",
    "addresses",
    "check_files",
    "compile",
    "highest_number",
    "is_reusable",
    "lasting_complaints",
    "listen_again",
    "opened_paths",
    "queued_bytes",
    "shared_object_key",
    "survey",
    "title",
]

lib = _core.lib

Description = (
    RegularFile
    | Directory
    | Location
    | Device
    | Terminal
    | PipeEnd
    | ExternalPipe
    | Fifo
    | Eventfd
    | Timerfd
    | Signalfd
    | Memfd
    | TcpListener
    | TcpSocket
    | UdpSocket
    | UnixSocket
    | UnixPair
    | Epoll
)


class Descriptor(msgspec.Struct, frozen=True):
    """One number; description: index into the table's descriptions."""

    number: int
    cloexec: bool
    description: int


class FdTable(msgspec.Struct, frozen=True):
    """unsupported: one line for each thing that cannot be restored."""

    descriptors: tuple[Descriptor, ...]
    descriptions: tuple[Description, ...]
    unsupported: list[str]
    owners: tuple[Owner, ...] = ()
    belongings: dict[int, tuple[int, int]] = {}
    """Description → user and group of its pipe or socket, if not root's."""

    def numbers(self) -> dict[int, tuple[int, ...]]:
        """Description → the numbers that refer to it, sorted."""
        found: dict[int, list[int]] = {}
        for descriptor in self.descriptors:
            found.setdefault(descriptor.description, []).append(descriptor.number)
        return {index: tuple(sorted(numbers)) for index, numbers in found.items()}

    def memory_files(self) -> list[Memfd]:
        """The mapped memory files (by `shared_object_key`), whose contents the restorer has to bring; each once."""
        files = [record for record in self.descriptions if isinstance(record, Memfd) and record.contents is None]
        return list({shared_object_key(record): record for record in files}.values())


def _capture_socket(view: View) -> Description | None:
    if view.mode != modes.S_IFSOCK:
        return None
    if not view.survey.own_network:
        raise Unsupported("a socket of another network namespace")
    with view.duplicate() as number:
        sock = _adopt(number)
        try:
            record = unix_socket.capture(view, sock) or inet_socket.capture(view, sock)
            if record is None:
                family = getattr(sock.family, "name", f"family {sock.family}")
                raise Unsupported(f"sockets of {family} are not restored")
            return record
        finally:
            sock.detach()


class Kind(msgspec.Struct, frozen=True):
    """records: the types that capture() returns; describe() gives the words for messages."""

    records: tuple[type, ...]
    capture: Callable[[View], Any]
    restore: Callable[[list[Item[Any]], Build], None]
    describe: Callable[[Any], str]


def _captured_with_another(view: View) -> None:
    """Capture of a kind whose records come from another's entry."""


# Captured and restored in this order: plain objects (memfds before the files that they look like),
# sockets, and epolls, which watch the others.
KINDS = (
    Kind((Memfd,), memfd.capture, memfd.restore, memfd.describe),
    Kind((RegularFile, Directory, Location), files.capture, files.restore, files.describe),
    Kind((Device, Terminal), devices.capture, devices.restore, devices.describe),
    Kind((PipeEnd, ExternalPipe), pipe.capture, pipe.restore, pipe.describe),
    Kind((Fifo,), fifo.capture, fifo.restore, fifo.describe),
    Kind((Eventfd,), eventfd.capture, eventfd.restore, eventfd.describe),
    Kind((Timerfd,), timerfd.capture, timerfd.restore, timerfd.describe),
    Kind((Signalfd,), signalfd.capture, signalfd.restore, signalfd.describe),
    Kind((TcpListener, TcpSocket, UdpSocket), _capture_socket, inet_socket.restore, inet_socket.describe),
    Kind((UnixSocket, UnixPair), _captured_with_another, unix_socket.restore, unix_socket.describe),
    Kind((Epoll,), epoll.capture, epoll.restore, epoll.describe),
)
_KEEP_LOCKS = (RegularFile, Directory, Terminal, ExternalPipe)  # the last two are the restorer's own
_ANONYMOUS = (PipeEnd, TcpListener, TcpSocket, UdpSocket, UnixSocket, UnixPair)
_KIND_OF = {record: kind for kind in KINDS for record in kind.records}


# -- snapshot ----------------------------------------------------------------------------------------------------------


def survey(pid: int, pidfd: int, contents: bool | None = None) -> FdTable:
    """Everything that the process's descriptors refer to. Nothing is consumed or changed.

    contents: whether to read what waits in pipes and sockets, too; None: if the process is stopped. NoSuchProcess,
    NotPermitted, SnapshotFailed.
    """
    # Here: a restore needs neither, and the survey before the freeze bears the cost.
    from lazyrestore.kernel import libc
    from lazyrestore.kernel.unix_diag import UnixDiag

    try:
        if contents is None:
            contents = _is_stopped(pid)
        with UnixDiag() as diag:
            own_network = os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")
            return _survey(Survey(pid, pidfd, contents, diag, own_network), libc.same_file_table)
    except OSError as error:
        from lazyrestore.kernel.tracee import check

        check(-(ESRCH if error.errno == ENOENT else error.errno or EIO), pid, "descriptors")
        raise


def lasting_complaints(pid: int, pidfd: int) -> list[str]:
    """What cannot be restored of a running process, as two looks agree: a busy one opens and closes between our look at
    one descriptor and that at another, say at the two ends of a pair. Complaints name inodes for that. As survey().
    """
    found = survey(pid, pidfd).unsupported
    again = survey(pid, pidfd).unsupported if found else []
    return [line for line in found if line in again]


def _survey(survey: Survey, same_table: Callable[[int, int], bool]) -> FdTable:
    cloexec: dict[int, bool] = {}
    unsupported = _private_tables(survey.pid, same_table)
    groups = _group(survey, cloexec, unsupported)
    survey.looked = time.monotonic_ns()
    descriptors: list[Descriptor] = []
    descriptions: list[Description] = []
    owners: list[Owner] = []
    belongings: dict[int, tuple[int, int]] = {}
    for view in groups:
        try:
            record = _capture(view)
            found = owner.capture(view, len(descriptions), outside=isinstance(record, ExternalPipe))
        except Gone:
            continue
        except (Unsupported, ValueError) as reason:
            if view.is_open():
                unsupported.append(f"{_number_list(view.numbers)} ({_link_name(view.link)}): {reason}")
            continue
        if found is not None:
            owners.append(found)
        belongs = view.stat.st_uid, view.stat.st_gid
        if belongs != (0, 0) and isinstance(record, _ANONYMOUS):
            belongings[len(descriptions)] = belongs
        descriptors += (Descriptor(number, cloexec[number], len(descriptions)) for number in view.numbers)
        descriptions.append(record)
    descriptors.sort(key=lambda descriptor: descriptor.number)
    return FdTable(tuple(descriptors), tuple(descriptions), unsupported, tuple(owners), belongings)


def _group(survey: Survey, cloexec: dict[int, bool], unsupported: list[str]) -> list[View]:
    """A view of every description, in the order of their lowest numbers."""
    from lazyrestore.kernel import fdinfo

    candidates: dict[tuple[object, ...], list[View]] = {}  # in the order of their numbers
    folder = os.open(f"/proc/{survey.pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    infos = -1
    try:
        infos = os.open(f"/proc/{survey.pid}/fdinfo", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for number in sorted(int(name) for name in os.listdir(folder)):
            name = str(number)
            try:
                link = os.fsencode(os.readlink(name, dir_fd=folder))
                status = os.stat(name, dir_fd=folder)
                info = fdinfo.parse(_read(name, infos))
            except FileNotFoundError:
                continue
            except ValueError as reason:
                unsupported.append(f"fd {number} ({_link_name(link)}): {reason}")
                continue
            cloexec[number] = bool(info.flags & os.O_CLOEXEC)
            view = View(survey, (number,), link, status, info)
            survey.objects[number] = view.identity
            survey.accesses[view.identity] = survey.accesses.get(view.identity, 0) | view.access
            key = (link, view.identity, info.flags & ~os.O_CLOEXEC, info.position)
            candidates.setdefault(key, []).append(view)
    finally:
        os.close(folder)
        if infos >= 0:
            os.close(infos)
    groups = (group for views in candidates.values() for group in _descriptions(views))
    return sorted((_joined(group) for group in groups), key=lambda view: view.numbers[0])


def _descriptions(views: list[View]) -> list[list[View]]:
    """The views, of one object, that are of one description each. One that is gone meanwhile is on its own."""
    if len(views) == 1 or views[0].mode == modes.S_IFSOCK:
        return [views]

    def order(one: View, other: View) -> int:
        return int(lib.lr_kcmp_file(one.survey.pid, one.numbers[0], other.numbers[0]))

    groups: list[list[View]] = []
    for view in sorted(views, key=cmp_to_key(order)):  # stable
        if groups and order(groups[-1][0], view) == 0:
            groups[-1].append(view)
        else:
            groups.append([view])
    return groups


def _joined(views: list[View]) -> View:
    first = views[0]
    if len(views) == 1:
        return first
    return View(first.survey, tuple(view.numbers[0] for view in views), first.link, first.stat, first.info)


def _capture(view: View) -> Description:
    if view.flags & os.O_PATH and not view.link.startswith(b"/"):
        raise Unsupported("an O_PATH descriptor of an object without a path is not restored")
    for kind in KINDS:
        record: Description | None = kind.capture(view)
        if record is not None:
            if b"lock:" in view.info.rest and not isinstance(record, _KEEP_LOCKS):
                raise Unsupported("holds a lock (flock, fcntl), which is restored of files and directories only")
            return record
    raise Unsupported("this kind of descriptor is not restored")


def _private_tables(pid: int, same_table: Callable[[int, int], bool]) -> list[str]:
    """Complaints about threads that have a descriptor table of their own."""
    from lazyrestore.kernel import procfs

    found = []
    for thread in procfs.threads(pid):
        try:
            if thread != pid and not same_table(pid, thread) and not procfs.is_exiting(pid, thread):
                found.append(f"thread {thread}: has a descriptor table of its own (CLONE_FILES), which is not restored")
        except ProcessLookupError:
            continue
    return found


def _adopt(number: int) -> socket.socket:
    """A socket object of a duplicate, which leaves its flags alone: a default timeout would make it, and the
    original, non-blocking.
    """
    default = socket.getdefaulttimeout()
    if default is None:
        return socket.socket(fileno=number)
    socket.setdefaulttimeout(None)
    try:
        return socket.socket(fileno=number)
    finally:
        socket.setdefaulttimeout(default)


def _is_stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return stat.read().rpartition(b") ")[2][:1] in (b"t", b"T")


def _read(name: str, folder: int) -> bytes:
    number = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        text = os.read(number, 4096)
        if len(text) < 2048:  # a short read of a seq_file that is not its end is longer than that
            return text
        parts = [text]
        while parts[-1]:
            parts.append(os.read(number, 65536))
        return b"".join(parts)
    finally:
        os.close(number)


# -- restore -----------------------------------------------------------------------------------------------------------


def addresses(table: FdTable, inherited: Iterable[int] = (), *, own_network: bool = False) -> list[Address]:
    """What its sockets will be bound to, and `addresses.make_free` is to be asked of. RestoreError.

    inherited: numbers of listening sockets that the caller replaces; own_network: in a network namespace of its own.
    """
    left_out = replaced(table, inherited)
    found: list[Address] = []
    for item in _items(table):
        record, address = item.record, None
        if item.index in left_out:
            continue
        if isinstance(record, TcpListener | TcpSocket | UdpSocket):
            address = None if own_network else inet_socket.address_of(item.title, record)
        elif isinstance(record, UnixSocket | UnixPair):
            address = unix_socket.address_of(item.title, record)
            if own_network and address is not None and address.file is None:
                continue  # abstract names are the network namespace's, as ports are
        if address is not None:
            found.append(address)
    return found


def opened_paths(table: FdTable) -> list[OpenedPath]:
    """Paths that are opened again, and what they must lead to at least: where one does not, check_files() decides."""
    found: list[OpenedPath] = []
    for record in table.descriptions:
        if isinstance(record, RegularFile | Directory | Location):
            if (path := files.opened_path(record)) is not None:
                found.append(path)
        elif isinstance(record, Fifo):
            found.append(OpenedPath(record.path, modes.S_IFIFO))
    return found


def check_files(table: FdTable) -> None:
    """Refuse what the process could not make sense of: files that are gone, another kind of thing, or too short.
    FileChanged.
    """
    for item in _items(table):
        if isinstance(item.record, RegularFile | Directory | Location):
            files.check(item.title, item.record)
        elif isinstance(item.record, Fifo):
            fifo.check(item.title, item.record)


def compile(table: FdTable, ops: OpList, fds: Descriptors, context: RestoreContext) -> None:
    """Append everything that makes the table. Paths are the restorer's: it is to run before any chroot() and change
    of credentials.

    Numbers from `highest_number(table) + 1` on must be free for moving. RestoreError.
    """
    items = _items(table)
    build = Build(ops, fds, context)
    left_out = replaced(table, context.inherited)
    for kind in KINDS:
        batch = [item for item in items if isinstance(item.record, kind.records) and item.index not in left_out]
        if batch:
            kind.restore(batch, build)
    cloexec = {descriptor.number: descriptor.cloexec for descriptor in table.descriptors}
    made = [item for item in items if item.index in build.made]
    moves = {build.made[item.index]: {number: cloexec[number] for number in item.numbers} for item in made}
    for stream in set(build.streams.values()):
        source = context.std_streams[stream]
        moves[source] = {number: cloexec[number] for number, wanted in build.streams.items() if wanted == stream}
    for item in items:
        if item.index in left_out:
            source = context.inherited[left_out[item.index]]
            with build.serving(item):
                ops.call(lib.SYS_fcntl, source, lib.F_SETFL, item.record.flags, note="the caller's socket")
            moves[source] = {number: cloexec[number] for number in item.numbers}
    with ops.serving("descriptors"):
        fds.settle(moves)
    for callback in build.settled:
        callback()
    titles = {item.index: item for item in items}
    for index, belongs in table.belongings.items():
        if index not in left_out:
            owner.give(titles[index], belongs, build)
    for whom in table.owners:
        owner.restore(titles[whom.description], whom, build)


def listen_again(table: FdTable, ops: OpList, inherited: Iterable[int]) -> None:
    """Append what tells clients whose the Unix listeners are (SO_PEERCRED): with the process's credentials."""
    left_out = replaced(table, inherited)
    for item in _items(table):
        if isinstance(item.record, UnixSocket) and item.index not in left_out:
            unix_socket.listen_again(item.title, item.record, item.numbers[0], ops)


def is_reusable(table: FdTable) -> bool:
    """Whether a program may run more than once: a FIFO's bytes are written back only if nobody holds it by then."""
    return not any(isinstance(record, Fifo) and record.messages for record in table.descriptions)


def highest_number(table: FdTable) -> int:
    """The highest descriptor number that the process uses, -1 if none."""
    return max((descriptor.number for descriptor in table.descriptors), default=-1)


def queued_bytes(table: FdTable) -> int:
    """Bytes of content (of pipes, sockets, small memfds) that compile() puts into the program's data."""
    total = 0
    for record in table.descriptions:
        if isinstance(record, PipeEnd | Fifo | UnixPair):
            total += sum(map(len, record.messages))
        elif isinstance(record, Memfd) and record.contents:
            total += sum(len(extent.data) for extent in record.contents)
    return total


def title(number: int, record: Description) -> str:
    """How messages name a descriptor: "fd 7 (timerfd)"."""
    return f"fd {number} ({_KIND_OF[type(record)].describe(record)})"


def _items(table: FdTable) -> list[Item[Description]]:
    records, numbers = enumerate(table.descriptions), table.numbers()
    return [Item(index, record, numbers[index], title(numbers[index][0], record)) for index, record in records]


def _number_list(numbers: Iterable[int]) -> str:
    return "fd " + ", ".join(map(str, numbers))


@cache
def _link_name(link: bytes) -> str:
    name = os.fsdecode(link)
    kind = name.removeprefix("anon_inode:")
    return name if kind == name else kind.strip("[]")
