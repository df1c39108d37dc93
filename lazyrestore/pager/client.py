"""One connection to a pager.

Facts: a SOCK_SEQPACKET packet arrives whole or not at all, with its descriptors; the pager's end closes when the pager
closes it, or when pager and keeper are both dead. Consequence: requests block without a time limit, and an end of file
means that the pager is gone (its processes were killed by the keeper by then, not left on zeros).
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Self

from msgspec import Struct

from ..errors import PagerError
from . import wire

BACKING_TEMPLATE = 0
BACKING_HUGETLB = 1
BACKING_SHARED = 2
"""Shared object number k is backing BACKING_SHARED + k."""
ADVICE = {
    "a keeper for the restorer's cgroup": "restore as root, or from the cgroup in which the first copy was restored"
}


class Range(Struct, frozen=True):
    """Virtual addresses [start, end) that the pager serves from image address `image` on.

    All page-aligned (hugetlb: 2 MiB); `backing` is BACKING_TEMPLATE, BACKING_HUGETLB or BACKING_SHARED + k.
    """

    start: int
    end: int
    image: int
    backing: int = BACKING_TEMPLATE


class Interval(Struct, frozen=True):
    """Virtual addresses [start, end) that show the image from `image` on, or read zero, where the process never wrote.

    `backing` as in Range.
    """

    start: int
    end: int
    image: int
    backing: int
    zero: bool


class ServiceTimes(Struct, frozen=True):
    """Nanoseconds from reading a fault message to waking its thread; the quantiles are exact to 12 %."""

    p50_ns: int
    p99_ns: int
    max_ns: int


class Counters(Struct, frozen=True):
    """Counts of what one address space, or all of a pager's, met with. Pages are 4 KiB."""

    missing: int  # faults
    minor: int  # faults
    write: int  # of these
    zero_faults: int  # of these
    zero_pages: int
    pages: int
    forks: int
    remaps: int
    removes: int
    unmaps: int
    retries: int
    exists: int
    gone: int
    poisoned: int
    replayed: int  # pages of the working set, installed before they were touched


class SpaceStats(Struct, frozen=True):
    """One living address space."""

    pid: int
    """In the pager's PID namespace; 0: a forked child that has not been found by its faults."""
    generation: int
    """0: restored; 1: forked by it; and so on."""
    id: int
    intervals: int
    bytes_registered: int
    service: ServiceTimes
    counters: Counters


class PagerStats(Struct, frozen=True):
    """A pager's sums since it started, and its living address spaces."""

    uptime_ns: int
    chunks_total: int
    chunks_filled: int
    chunks_bad: int
    bytes_filled: int
    """Raw bytes decompressed."""
    bytes_read: int
    """Compressed bytes read."""
    faults: int
    service: ServiceTimes
    counters: Counters
    spaces_ended: int
    spaces: tuple[SpaceStats, ...]


class PagerGone(PagerError):
    """The pager ended, or is ending, while it was asked; a new one may be started."""


class PagerClient:
    """A connected pager. Thread-safe; owns its socket and the template descriptors, all closed by `close()`."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        """Takes `connection` over and says HELLO. Raises PagerGone, PagerError."""
        self._socket = connection
        self._lock = threading.Lock()
        self._name = name
        self._templates: list[int] = []
        self._filled = b""
        try:
            self._hello()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        """Whoever uses the descriptors of one that others gave up holds it; the last one closes it."""
        with suppress(AttributeError):  # something that stands in for one
            self.close()

    def close(self) -> None:
        """Ends the connection; attached address spaces go on being served."""
        self._socket.close()
        while self._templates:
            os.close(self._templates.pop())

    @property
    def template_fd(self) -> int:
        """The template memfd (file offset == image address), valid until `close()`."""
        return self._templates[0]

    @property
    def hugetlb_fd(self) -> int | None:
        """The hugetlb template, None if the image has no hugetlb memory; valid until `close()`."""
        return self._templates[1] if len(self._templates) > 1 else None

    def attach(
        self,
        userfaultfd: int,
        pidfd: int,
        ranges: Iterable[Range] | int,
        shared: Mapping[int, int] | None = None,
        *,
        eager: bool = False,
        record: bool | None = None,
        replay: bool = True,
        own_pages: bool = False,
        fill: str = "none",
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Hands one address space over; when this returns, its faults are served.

        userfaultfd: fresh, no UFFDIO_API done, created by or in the process (pidfd_getfd). ranges: sorted by start, not
        overlapping, already mapped; or a descriptor of a memory file of what pack_ranges() made of them. shared: shared
        object number to memfd. eager: fill the shared memfds wholly before returning. record: the working set, True:
        even if one is known, which is extended then; None: if none is known. replay: whether it gets the known one.
        own_pages: but for the pages that this calls written: it has them. fill: bring all private memory, "idle": when
        the CPUs have nothing else to do, "now": at once. meanwhile: called while the pager is at it. All descriptors
        stay the caller's. Raises PagerError with errno, step and the address in the resource; the process must then be
        killed.
        """
        shared = shared or {}
        if len(shared) > wire.MAX_SHARED:
            raise PagerError(self._name, "attach", "too many shared memory objects", errno=errno.E2BIG)
        memfd = ranges if isinstance(ranges, int) else os.memfd_create("lazyrestore-ranges", os.MFD_CLOEXEC)
        try:
            if not isinstance(ranges, int):
                os.write(memfd, pack_ranges(ranges))
            flags = wire.ATTACH_EAGER if eager else 0
            flags |= {None: 0, True: wire.ATTACH_RECORD_AGAIN, False: wire.ATTACH_NO_RECORD}[record]
            flags |= 0 if replay else wire.ATTACH_NO_REPLAY
            flags |= wire.ATTACH_OWN_PAGES if own_pages else 0
            flags |= {"none": 0, "idle": wire.ATTACH_FILL_IDLE, "now": wire.ATTACH_FILL_NOW}[fill]
            request = _request(wire.ATTACH, flags, os.fstat(memfd).st_size // wire.RANGE.size, list(shared))
            self._ask(request, [userfaultfd, pidfd, memfd, *shared.values()], meanwhile)
        finally:
            if memfd != ranges:
                os.close(memfd)

    def stats(self) -> PagerStats:
        """Raises PagerGone, PagerError."""
        with self._lock:
            self._send(_request(wire.STATS))
            head = wire.TOTALS.unpack(self._receive(wire.TOTALS.size))
            _, error, n_spaces, ended = head[:4]
            if error:
                raise PagerError(self._name, "stats", errno=error)
            spaces = tuple(_space(self._receive(wire.SPACE.size)) for _ in range(n_spaces))
        uptime, total, filled, bad, bytes_filled, bytes_read, faults, *times = head[4:14]
        return PagerStats(
            uptime, total, filled, bad, bytes_filled, bytes_read, faults,
            ServiceTimes(*times), Counters(*head[14:]), ended, spaces,
        )  # fmt: skip

    def intervals(self, pidfd: int) -> list[Interval]:
        """What the memory of the process behind `pidfd`, which was restored and stands still, shows where it never
        wrote; sorted by start. It is about to be read: a recording of its working set ends.

        Private memory in no interval is zero. Of shared memory only what nobody has touched is in the list. Raises
        PagerGone, PagerError; with ESRCH if it is not the pager's, or a forked child.
        """
        data = self._ask_for_file(_request(wire.INTERVALS), "intervals", [pidfd])
        return [
            Interval(start, end, image, backing, bool(flags & wire.RANGE_ZERO))
            for start, end, image, backing, flags in wire.RANGE.iter_unpack(data)
        ]

    def working_set(self, *, end: bool = False) -> bytes:
        """The chunks touched first, in order: struct lr_touched each; empty if none are known.

        end: end a recording that is under way. Raises PagerGone, PagerError.
        """
        return self._ask_for_file(_request(wire.WORKING_SET, wire.WORKING_SET_END if end else 0), "working set")

    def filled_working_set(self) -> bytes:
        """The same of a set that is known, all of it in the template now; empty if there is none, or the pager is gone.

        Asked for until there is one. Raises PagerError.
        """
        if not self._filled:
            with suppress(PagerGone):
                self._filled = self._ask_for_file(_request(wire.WORKING_SET, wire.WORKING_SET_FILLED), "working set")
        return self._filled

    def stop(self) -> None:
        """Asks the pager to exit when no address space and no connection is left. Raises PagerGone."""
        self._ask(_request(wire.STOP))

    def pids(self) -> tuple[int, int]:
        """(pager, keeper) as of now, in the pager's PID namespace."""
        return self._hello()

    def _hello(self) -> tuple[int, int]:
        with self._lock:
            self._send(_request(wire.HELLO))
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, wire.REPLY.size, 2)
            except OSError as error:
                raise self._gone(error.errno) from error
            if self._templates:
                for fd in fds:
                    os.close(fd)
            else:
                self._templates = list(fds)
            reply = self._check(data)
        if not self._templates:
            raise PagerError(self._name, "hello", "no template arrived")
        return reply

    def _ask(self, request: bytes, fds: list[int] | None = None, meanwhile: Callable[[], None] | None = None) -> None:
        with self._lock:
            self._send(request, fds or [])
            try:
                if meanwhile:
                    meanwhile()
            finally:
                reply = self._receive(wire.REPLY.size)
            self._check(reply)

    def _ask_for_file(self, request: bytes, step: str, fds: list[int] | None = None) -> bytes:
        """The contents of the memory file that the reply carries."""
        with self._lock:
            self._send(request, fds)
            try:
                data, received, _, _ = socket.recv_fds(self._socket, wire.REPLY.size, 1)
            except ConnectionError as error:
                raise self._gone(error.errno) from error
            try:
                self._check(data)
                if not received:
                    raise PagerError(self._name, step, "no descriptor arrived")
                return os.pread(received[0], os.fstat(received[0]).st_size, 0)
            finally:
                for fd in received:
                    os.close(fd)

    def _check(self, data: bytes) -> tuple[int, int]:
        if len(data) != wire.REPLY.size:
            raise self._gone(errno.ECONNRESET)
        _, error, address, step, pager, keeper, _, _ = wire.REPLY.unpack(data)
        if error:
            where = f"{self._name}, address {address:#x}" if address else self._name
            failed = step.rstrip(b"\0").decode(errors="replace")
            raise PagerError(where, failed, advice=ADVICE.get(failed, ""), errno=error)
        return pager, keeper

    def _send(self, request: bytes, fds: list[int] | None = None) -> None:
        try:
            socket.send_fds(self._socket, [request], fds or [])
        except (BrokenPipeError, ConnectionError) as error:
            raise self._gone(error.errno) from error

    def _receive(self, size: int) -> bytes:
        try:
            data = self._socket.recv(size)
        except ConnectionError as error:
            raise self._gone(error.errno) from error
        if len(data) != size:
            raise self._gone(errno.ECONNRESET)
        return data

    def _gone(self, number: int | None) -> PagerGone:
        return PagerGone(self._name, "connection", "the pager is gone", "its log says why", errno=number)


def pack_ranges(ranges: Iterable[Range]) -> bytes:
    """As they travel."""
    return b"".join(wire.RANGE.pack(r.start, r.end, r.image, r.backing, 0) for r in ranges)


def _request(kind: int, flags: int = 0, n_ranges: int = 0, shared: list[int] | None = None) -> bytes:
    numbers = shared or []
    padding = [0] * (wire.MAX_SHARED - len(numbers))
    return wire.REQUEST.pack(kind, wire.VERSION, flags, n_ranges, len(numbers), *numbers, *padding)


def _space(data: bytes) -> SpaceStats:
    pid, generation, number, intervals, registered, p50, p99, longest, *counters = wire.SPACE.unpack(data)
    return SpaceStats(
        pid, generation, number, intervals, registered, ServiceTimes(p50, p99, longest), Counters(*counters)
    )
