"""timerfd: a clock, the time that is left, an interval, and the expirations nobody has read yet.

Facts. fdinfo tells all of it; the time left is relative even for a timer that was set with an absolute time. The
kernel counts the expirations of a periodic timer only when somebody looks: until then fdinfo says one tick and no
time left. timerfd_gettime() brings the count up to date, which the process cannot notice. timerfd_settime() clears
the ticks; the ioctl TFD_IOC_SET_TICKS (3.17, CONFIG_CHECKPOINT_RESTORE) sets them.

Consequence. A periodic timer with ticks is asked through a duplicate before its fdinfo is believed. All timers are
restored with the time they had left, so that the time between snapshot and restore does not exist for them.

Cost. An absolute wall-clock timer fires that much later than it was set for, and TFD_TIMER_CANCEL_ON_SET is not
restored.
"""

from __future__ import annotations

import os
import struct

import msgspec

from lazyrestore._native import _core
from lazyrestore.kernel import fdinfo
from lazyrestore.resources.descriptor import Build, Item, View

lib = _core.lib

_SET_TICKS = 1 << 30 | 8 << 16 | ord("T") << 8  # TFD_IOC_SET_TICKS: _IOW('T', 0, u64)


class Timerfd(msgspec.Struct, frozen=True, tag="timerfd"):
    """remaining and interval in nanoseconds; remaining 0: not armed. ticks: expirations not read yet."""

    flags: int
    clock: int
    remaining: int
    interval: int
    ticks: int


def describe(record: Timerfd) -> str:
    return "timerfd"


def capture(view: View) -> Timerfd | None:
    if view.link != b"anon_inode:[timerfd]":
        return None
    found = fdinfo.timerfd(view.info.rest)
    if found.ticks and found.interval:
        from lazyrestore.kernel import libc

        with view.duplicate() as number:
            remaining, _ = libc.timerfd_gettime(number)
            with open(f"/proc/self/fdinfo/{number}", "rb") as text:
                found = fdinfo.timerfd(text.read())._replace(remaining=remaining)
    return Timerfd(view.flags, found.clock, found.remaining, found.interval, found.ticks)


def restore(items: list[Item[Timerfd]], build: Build) -> None:
    for item in items:
        record = item.record
        with build.serving(item):
            flags = lib.TFD_CLOEXEC | record.flags & os.O_NONBLOCK
            number = build.create(item, lib.SYS_timerfd_create, record.clock, flags)
            if record.remaining or record.interval:
                times = (*divmod(record.interval, 1_000_000_000), *divmod(record.remaining, 1_000_000_000))
                build.ops.call(lib.SYS_timerfd_settime, number, 0, build.place(struct.pack("=4q", *times)), 0)
            if record.ticks:
                ticks = build.place(struct.pack("=Q", record.ticks))
                build.ops.call(lib.SYS_ioctl, number, _SET_TICKS, ticks, note="TFD_IOC_SET_TICKS")
