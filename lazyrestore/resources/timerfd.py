"""timerfd: a clock, the time that is left, an interval, and the expirations nobody has read yet.

Facts. fdinfo tells all of it; the time left is relative even for a timer that was set with an absolute time. The
kernel counts the expirations of a periodic timer only when somebody looks: until then fdinfo says one tick and no
time left. timerfd_gettime() brings the count up to date, which the process cannot notice. timerfd_settime() clears
the ticks; the ioctl TFD_IOC_SET_TICKS (3.17, CONFIG_CHECKPOINT_RESTORE) sets them.

A timer whose time has come but whose interrupt has not, as its CPU was idle, or not given to the virtual machine, has
no time left and no tick either: it looks like one that was stopped, or has fired and been read (1.3 % of the looks at
timers of 200 µs; the interrupt came 17 µs later, of 39,000 once 5.7 ms). POSIX timers and setitimer() have no such
gap: the kernel says 1 ns, 1 µs.

Consequences. A periodic timer with ticks is asked through a duplicate before its fdinfo is believed. A timer without
time left is looked at again, for as long as an interrupt can be late, before it counts as stopped. A periodic one
nearly always is due, as stopped ones rarely have an interval: so it is given a time that costs others too much.

Choice. Timers are restored with the time they had left, so that the time between snapshot and restore does not exist
for them. But one that was set for a point of wall-clock time (TFD_TIMER_ABSTIME) keeps it, as an alarm does over a
suspend, and fires at once if that has passed; TFD_TIMER_CANCEL_ON_SET is kept with it.

Cost. An absolute time of another clock means nothing after a reboot: such a timer becomes a relative one.
"""

from __future__ import annotations

import os
import select
import struct
import time
from typing import TYPE_CHECKING

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources.descriptor import Build, Item, View

if TYPE_CHECKING:
    from lazyrestore.kernel import fdinfo

lib = _core.lib

SECOND = 1_000_000_000
_WALL_CLOCKS = (time.CLOCK_REALTIME, 8)  # 8: CLOCK_REALTIME_ALARM
_LATEST, _LATEST_PERIODIC = 10_000_000, SECOND  # ns that an interrupt can be late
_SET_TICKS = 1 << 30 | 8 << 16 | ord("T") << 8  # TFD_IOC_SET_TICKS: _IOW('T', 0, u64)


class Timerfd(msgspec.Struct, frozen=True, tag="timerfd"):
    """Times in nanoseconds. remaining 0: not armed; ticks: expirations not read yet; expires: of the wall clock, for a
    timer set with TFD_TIMER_ABSTIME on it, else 0; settime_flags: as they were given.
    """

    flags: int
    clock: int
    remaining: int
    interval: int
    ticks: int
    settime_flags: int
    expires: int


def describe(record: Timerfd) -> str:
    return "timerfd"


def capture(view: View) -> Timerfd | None:
    if view.link != b"anon_inode:[timerfd]":
        return None
    from lazyrestore.kernel import fdinfo

    found = fdinfo.timerfd(view.info.rest)
    if view.survey.contents and _may_be_due(found):
        found = _when_it_has_fired(view, found)
    absolute = found.settime_flags & lib.TFD_TIMER_ABSTIME and found.clock in _WALL_CLOCKS and found.remaining
    expires = time.time_ns() + found.remaining if absolute else 0
    settime_flags = found.settime_flags if found.clock in _WALL_CLOCKS else 0
    return Timerfd(view.flags, found.clock, found.remaining, found.interval, found.ticks, settime_flags, expires)


def _may_be_due(found: fdinfo.Timerfd) -> bool:
    return not found.remaining and bool(found.interval or not found.ticks)


def _when_it_has_fired(view: View, found: fdinfo.Timerfd) -> fdinfo.Timerfd:
    """What there is to say of a timer without time left, once it has fired if it was due."""
    from lazyrestore.kernel import fdinfo, libc

    deadline = view.survey.looked + (_LATEST_PERIODIC if found.interval else _LATEST)
    fired = select.poll()
    with view.duplicate() as number, open(f"/proc/self/fdinfo/{number}", "rb", buffering=0) as text:
        fired.register(number, select.POLLIN)
        while True:
            libc.timerfd_gettime(number)
            text.seek(0)
            found = fdinfo.timerfd(text.read())
            left = deadline - time.monotonic_ns()
            if left < 0 or not _may_be_due(found):
                return found
            fired.poll(left / 1_000_000)


def restore(items: list[Item[Timerfd]], build: Build) -> None:
    for item in items:
        record = item.record
        with build.serving(item):
            flags = lib.TFD_CLOEXEC | record.flags & os.O_NONBLOCK
            number = build.create(item, lib.SYS_timerfd_create, record.clock, flags)
            if record.remaining or record.interval or record.settime_flags:
                value = record.expires or record.remaining
                times = build.place(struct.pack("=4q", *divmod(record.interval, SECOND), *divmod(value, SECOND)))
                build.ops.call(lib.SYS_timerfd_settime, number, record.settime_flags, times, 0)
            if record.ticks:
                ticks = build.place(struct.pack("=Q", record.ticks))
                build.ops.call(lib.SYS_ioctl, number, _SET_TICKS, ticks, note="TFD_IOC_SET_TICKS")
