"""eventfd: a counter.

Facts. fdinfo tells the counter, and since Linux 6.4 whether it is a semaphore. eventfd2() takes a 32-bit initial
value; a bigger one is written, which cannot block, since the counter of a new eventfd is 0 and the old one fitted
too.
"""

from __future__ import annotations

import os
import struct

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources.descriptor import Build, Item, View

lib = _core.lib


class Eventfd(msgspec.Struct, frozen=True, tag="eventfd"):
    flags: int
    count: int
    semaphore: bool


def describe(record: Eventfd) -> str:
    return "eventfd"


def capture(view: View) -> Eventfd | None:
    if view.link != b"anon_inode:[eventfd]":
        return None
    from lazyrestore.kernel import fdinfo

    found = fdinfo.eventfd(view.info.rest)
    return Eventfd(view.flags, found.value, found.semaphore)


def restore(items: list[Item[Eventfd]], build: Build) -> None:
    for item in items:
        record = item.record
        with build.serving(item):
            flags = lib.EFD_CLOEXEC | record.flags & os.O_NONBLOCK | (lib.EFD_SEMAPHORE if record.semaphore else 0)
            fits = record.count < 1 << 32
            number = build.create(item, lib.SYS_eventfd2, record.count if fits else 0, flags)
            if not fits:
                build.ops.call_expecting(8, lib.SYS_write, number, build.place(struct.pack("=Q", record.count)), 8)
