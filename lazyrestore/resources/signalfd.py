"""signalfd: a mask. The signals that wait for it are the process's and the threads', not the descriptor's."""

from __future__ import annotations

import os
import struct

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources.descriptor import Build, Item, View

lib = _core.lib


class Signalfd(msgspec.Struct, frozen=True, tag="signalfd"):
    """mask: bit n-1 stands for signal n."""

    flags: int
    mask: int


def describe(record: Signalfd) -> str:
    return "signalfd"


def capture(view: View) -> Signalfd | None:
    if view.link != b"anon_inode:[signalfd]":
        return None
    from lazyrestore.kernel import fdinfo

    return Signalfd(view.flags, fdinfo.signal_mask(view.info.rest))


def restore(items: list[Item[Signalfd]], build: Build) -> None:
    for item in items:
        record = item.record
        with build.serving(item):
            mask = build.place(struct.pack("=Q", record.mask))
            build.create(item, lib.SYS_signalfd4, -1, mask, 8, lib.SFD_CLOEXEC | record.flags & os.O_NONBLOCK)
