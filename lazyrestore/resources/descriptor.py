"""The terms in which the kinds of descriptors speak: what a survey shows of one open file description, what a restore
needs.

Facts. A descriptor is a number with a close-on-exec bit that points to an *open file description*, which has the
status flags, the offset and the object behind. Several numbers can share a description (dup, fork), several
descriptions an object (a pipe's two ends).

Consequence. A kind captures descriptions, not numbers. It restores all of its descriptions in one go, since some come
in pairs, and says under which number of the new process each one lies for the moment; where they belong is settled
for all kinds at once. What needs the final numbers (an epoll's interest list, POSIX locks, which any close of the
same file would drop) waits until then.

Cost. Descriptors of sockets, pipes and timers are duplicated for a moment (pidfd_getfd) to ask what /proc does not
tell; an object that the process closes in that moment lives as much longer.
"""

from __future__ import annotations

import os
import stat as modes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from errno import EBADF, ESRCH
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from msgspec import Struct, field

from lazyrestore._native import _core
from lazyrestore.errors import RestoreError

if TYPE_CHECKING:
    from lazyrestore.kernel.fdinfo import FdInfo
    from lazyrestore.kernel.unix_diag import UnixDiag
    from lazyrestore.program import Argument, Descriptors, OpList, Pointer

lib = _core.lib

READ, WRITE = 1, 2
O_ASYNC: int = os.O_ASYNC
_ACCESS = {os.O_RDONLY: READ, os.O_WRONLY: WRITE, os.O_RDWR: READ | WRITE}


class Unsupported(Exception):
    """A description that cannot be restored; the text says why."""


class Gone(Exception):
    """A descriptor that the (running) process closed while it was looked at."""


class Survey(Struct):
    """One look at one process. contents: bytes in queues are wanted too (it is frozen)."""

    pid: int
    pidfd: int
    contents: bool
    diag: UnixDiag
    own_network: bool
    """The process is in our network namespace."""
    objects: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Number → (device, inode)."""
    accesses: dict[tuple[int, int], int] = field(default_factory=dict)
    """(device, inode) → READ, WRITE, of all descriptions together."""
    looked: int = 0
    """When every fdinfo had been read (monotonic, ns)."""
    option_defaults: dict[tuple[int, int, int], dict[tuple[int, int], bytes]] = field(default_factory=dict)
    _mapped: set[tuple[int, int]] | None = None
    _groups: list[tuple[int, int, bytes]] | None = None

    def mapped(self) -> set[tuple[int, int]]:
        """(device, inode) of every file that the process maps."""
        if self._mapped is None:
            self._mapped = set()
            with open(f"/proc/{self.pid}/maps", "rb") as maps:
                for line in maps:
                    _, _, _, device, inode, *_ = line.split(None, 5)
                    if inode != b"0":
                        major, minor = device.split(b":")
                        self._mapped.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
        return self._mapped

    def multicast_groups(self) -> list[tuple[int, int, bytes]]:
        """(IPPROTO_IP or IPPROTO_IPV6, interface, struct sockaddr_storage) of each group that the network is in."""
        if self._groups is None:
            from lazyrestore.kernel import procfs

            self._groups = procfs.multicast_groups()
        return self._groups


class View(Struct, frozen=True):
    """One open file description of the process, with the numbers that refer to it (sorted)."""

    survey: Survey
    numbers: tuple[int, ...]
    link: bytes
    stat: os.stat_result
    info: FdInfo

    @property
    def mode(self) -> int:
        return modes.S_IFMT(self.stat.st_mode)

    @property
    def flags(self) -> int:
        """The status flags: access mode included, close-on-exec and O_ASYNC not."""
        return self.info.flags & ~(os.O_CLOEXEC | O_ASYNC)

    @property
    def access(self) -> int:
        return 0 if self.flags & os.O_PATH else access_of(self.flags)

    @property
    def identity(self) -> tuple[int, int]:
        return self.stat.st_dev, self.stat.st_ino

    def is_open(self) -> bool:
        """Whether it is still what it was: a running process, say a busy server, may have closed it meanwhile."""
        try:
            status = os.stat(f"/proc/{self.survey.pid}/fd/{self.numbers[0]}")
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == self.identity

    @contextmanager
    def duplicate(self) -> Iterator[int]:
        """A descriptor of ours for the same description, closed at the end. Gone, OSError."""
        number = lib.lr_pidfd_getfd(self.survey.pidfd, self.numbers[0])
        if number in (-EBADF, -ESRCH):
            raise Gone
        if number < 0:
            raise OSError(-number, os.strerror(-number))
        try:
            status = os.fstat(number)
            if (status.st_dev, status.st_ino) != self.identity:
                raise Gone  # the number means something else by now
            yield number
        finally:
            os.close(number)


class RestoreContext(Struct, frozen=True):
    """What the restorer gives to the descriptors.

    std_streams: 0, 1, 2 → number in the new process of a duplicate of the restorer's own standard stream; those that
    are needed are moved, the others stay the caller's. shared_fd(device, inode): number in the new process of a
    handed-over descriptor of the memory file that stands for the snapshot's, None if there is none; it stays the
    caller's. cwd: the process's working directory. inherited: number of a listening socket → number in the new process
    of a handed-over descriptor of the caller's socket that takes its place.
    """

    std_streams: dict[int, int]
    shared_fd: Callable[[int, int], int | None]
    cwd: str
    inherited: dict[int, int] = field(default_factory=dict)


R = TypeVar("R", covariant=True)


class Item(Struct, Generic[R], frozen=True):
    """One description to be restored. title: "fd 7 (timerfd)"."""

    index: int
    record: R
    numbers: tuple[int, ...]
    title: str


class Build(Struct):
    """A program that makes descriptors, while it is compiled."""

    ops: OpList
    fds: Descriptors
    context: RestoreContext
    made: dict[int, int] = field(default_factory=dict)
    """Description → number in the new process, until all are settled."""
    streams: dict[int, int] = field(default_factory=dict)
    """Wanted number → 0, 1 or 2: the restorer's standard stream."""
    settled: list[Callable[[], None]] = field(default_factory=list)
    """To be called when every descriptor has its final number."""

    def serving(self, item: Item[Any]) -> AbstractContextManager[None]:
        return self.ops.serving(item.title)

    def place(self, content: bytes) -> Pointer:
        return self.ops.program.place(content)

    def create(self, item: Item[Any], syscall: int, *arguments: Argument) -> int:
        """Append the call that makes the description; returns its number for the moment."""
        number = self.fds.create(syscall, *arguments)
        self.made[item.index] = number
        return number

    def reopen(self, item: Item[Any], number: int, flags: int) -> int:
        """Append an open() of what lies under `number`: another description of the same object."""
        path = self.ops.program.string(f"/proc/self/fd/{number}")
        return self.create(item, lib.SYS_openat, lib.AT_FDCWD, path, flags | os.O_CLOEXEC, 0)

    def stream(self, item: Item[Any], access: int) -> None:
        """Let the restorer's standard streams take the description's place."""
        for number in item.numbers:
            source = standard_stream(number, access, item.numbers)
            if source not in self.context.std_streams:
                raise RestoreError(item.title, "standard stream", f"the restorer has no standard stream {source}")
            self.streams[number] = source


def access_of(flags: int) -> int:
    """READ, WRITE or both."""
    return _ACCESS.get(flags & os.O_ACCMODE, 0)


def standard_stream(number: int, access: int, shared_with: tuple[int, ...]) -> int:
    """Which of the restorer's standard streams stands for a terminal or an outside pipe under `number`.

    0, 1 and 2 stand for themselves where the direction fits; else what can be read is stdin, what can only be written
    stdout, or stderr if it is the same description as number 2's and not number 1's.
    """
    if (number == 0 and access & READ) or (number in (1, 2) and access & WRITE):
        return number
    if access & READ:
        return 0
    return 2 if 2 in shared_with and 1 not in shared_with else 1
