"""Parsers of /proc/PID/fdinfo/N: bytes to records, pure.

Facts. Each text begins with `pos:` (decimal), `flags:` (octal; the open file description's status flags, with
O_CLOEXEC mixed in from the descriptor), `mnt_id:` and, since Linux 5.14, `ino:`. What follows is the kind's own:
counters, timers, interest lists, and a `lock:` line for every lock held through this description. eventfd's counter
is hexadecimal without a prefix; times are (seconds, nanoseconds). Source: proc_pid_fdinfo(5), the kernel's
Documentation/filesystems/proc.rst, fs/locks.c for the lock lines.

Consequence. A text that does not parse means a kernel that says something else: ValueError, never a guess.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class FdInfo(NamedTuple):
    """The common head. position: bytes; flags: as the kernel numbers them, O_CLOEXEC included; rest: the kind's own
    lines.
    """

    position: int
    flags: int
    mount: int
    inode: int
    rest: bytes


class Eventfd(NamedTuple):
    value: int
    identity: int
    semaphore: bool


class Timerfd(NamedTuple):
    """Times in nanoseconds; `remaining` is 0 for a timer that is not armed."""

    clock: int
    ticks: int
    settime_flags: int
    remaining: int
    interval: int


class Target(NamedTuple):
    """One entry of an epoll's interest list; `device` is in the kernel's own encoding (major << 20 | minor)."""

    number: int
    events: int
    data: int
    inode: int
    device: int


class Lock(NamedTuple):
    """kind: FLOCK, POSIX, OFDLCK, LEASE, …; start and end are byte offsets, both inclusive; end None: to the end of
    the file.
    """

    kind: str
    access: str
    start: int
    end: int | None


_HEAD = re.compile(rb"pos:\t(-?\d+)\nflags:\t([0-7]+)\nmnt_id:\t(-?\d+)\n(?:ino:\t(\d+)\n)?")
_EVENTFD = re.compile(
    rb"^eventfd-count: *([0-9a-f]+)\n(?:eventfd-id: *(-?\d+)\n)?(?:eventfd-semaphore: *(\d)\n)?", re.MULTILINE
)
_TIMERFD = re.compile(
    rb"^clockid: (\d+)\nticks: (\d+)\nsettime flags: ([0-7]+)\n"
    rb"it_value: \((\d+), (\d+)\)\nit_interval: \((\d+), (\d+)\)\n",
    re.MULTILINE,
)
_SIGMASK = re.compile(rb"^sigmask:\t([0-9a-f]{16})\n", re.MULTILINE)
_TARGET = re.compile(
    rb"^tfd: *(\d+) events: *([0-9a-f]+) data: *([0-9a-f]+) +pos:-?\d+ ino:([0-9a-f]+) sdev:([0-9a-f]+)\n", re.MULTILINE
)
_LOCK = re.compile(rb"\d+: (->)? *(\w+) +\S+ +(\w+) +-?\d+ \S+ (\d+) (\d+|EOF)")
_SCM = re.compile(rb"^scm_fds: (\d+)\n", re.MULTILINE)


def parse(text: bytes) -> FdInfo:
    """The common head of a text. ValueError if it has none."""
    found = _HEAD.match(text)
    if found is None:
        raise ValueError(f"unexpected fdinfo: {text[:120]!r}")
    position, flags, mount, inode = found.groups()
    return FdInfo(int(position), int(flags, 8), int(mount), int(inode or 0), text[found.end() :])


def eventfd(rest: bytes) -> Eventfd:
    """The counter. ValueError if there is none, or if the kernel (before 6.4) does not tell the semaphore flag."""
    count, identity, semaphore = _find(_EVENTFD, rest)
    if semaphore is None:
        raise ValueError("this kernel does not tell whether an eventfd is a semaphore")
    return Eventfd(int(count, 16), int(identity or 0), semaphore == b"1")


def timerfd(rest: bytes) -> Timerfd:
    """The timer. ValueError if there is none."""
    clock, ticks, flags, *times = _find(_TIMERFD, rest)
    seconds, nanoseconds, interval_seconds, interval_nanoseconds = (int(time) for time in times)
    return Timerfd(
        int(clock),
        int(ticks),
        int(flags, 8),
        seconds * 1_000_000_000 + nanoseconds,
        interval_seconds * 1_000_000_000 + interval_nanoseconds,
    )


def signal_mask(rest: bytes) -> int:
    """A signalfd's mask: bit n-1 stands for signal n. ValueError if there is none."""
    return int(_find(_SIGMASK, rest)[0], 16)


def targets(rest: bytes) -> list[Target]:
    """An epoll's interest list. ValueError if a line is not one of it."""
    found = [
        Target(int(number), int(events, 16), int(data, 16), int(inode, 16), int(device, 16))
        for number, events, data, inode, device in _TARGET.findall(rest)
    ]
    if len(found) != rest.count(b"\n"):
        raise ValueError(f"unexpected epoll fdinfo: {rest[:120]!r}")
    return found


def locks(rest: bytes) -> list[Lock]:
    """The locks held through this description; requests that still wait are left out. ValueError if a line makes no
    sense.
    """
    held = []
    for line in rest.splitlines():
        if not line.startswith(b"lock:\t"):
            continue
        found = _LOCK.fullmatch(line, len(b"lock:\t"))
        if found is None:
            raise ValueError(f"unexpected lock: {line!r}")
        waiting, kind, access, start, end = found.groups()
        if waiting is None:
            held.append(Lock(kind.decode(), access.decode(), int(start), None if end == b"EOF" else int(end)))
    return held


def passed_descriptors(rest: bytes) -> int:
    """Descriptors that wait in a Unix socket's queue (SCM_RIGHTS); 0 where the kernel (before 5.17) does not tell."""
    found = _SCM.search(rest)
    return int(found[1]) if found else 0


def _find(pattern: re.Pattern[bytes], rest: bytes) -> tuple[bytes, ...]:
    found = pattern.search(rest)
    if found is None:
        raise ValueError(f"unexpected fdinfo: {rest[:120]!r}")
    return found.groups()
