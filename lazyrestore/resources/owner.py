"""Whom a description tells that it is ready: F_SETOWN, F_SETSIG, O_ASYNC.

Facts. All three belong to the description, and a program may set the first two long before the third. Sockets, pipes
and terminals signal so; of terminals and outside pipes the restorer's own are used. fdinfo tells O_ASYNC alone.
Cost. One duplicate more of each socket and pipe. An owner that is another process is refused in O_ASYNC mode, and
else forgotten.
"""

from __future__ import annotations

import fcntl
import os
import stat as modes
import struct
from typing import Any

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources.descriptor import O_ASYNC, Build, Item, Unsupported, View

lib = _core.lib

_F_GETOWN_EX = 16


class Owner(msgspec.Struct, frozen=True):
    """Who gets the signal of a description: type as in F_SETOWN_EX, always the process itself, or pid 0: nobody;
    signal 0: SIGIO; on: it is in O_ASYNC mode.
    """

    description: int
    type: int
    pid: int
    signal: int
    on: bool = True


def capture(view: View, description: int, *, outside: bool) -> Owner | None:
    """None if nobody is signalled. outside: the restorer's own will take its place. Unsupported."""
    on = bool(view.info.flags & O_ASYNC)
    if not on and (outside or view.flags & os.O_PATH or view.mode not in (modes.S_IFSOCK, modes.S_IFIFO)):
        return None
    with view.duplicate() as number:
        kind, pid = struct.unpack("=ii", fcntl.fcntl(number, _F_GETOWN_EX, bytes(8)))
        signal = fcntl.fcntl(number, fcntl.F_GETSIG)
    if pid != view.survey.pid and (on or pid):
        if on:
            raise Unsupported(f"sends its signals (O_ASYNC) to {pid}, not to the process itself")
        return None
    return Owner(description, kind, pid, signal, on) if on or pid or signal else None


def restore(item: Item[Any], owner: Owner, build: Build) -> None:
    number = item.numbers[0]
    with build.serving(item):
        whom = build.place(struct.pack("=ii", owner.type, owner.pid))
        build.ops.call(lib.SYS_fcntl, number, lib.F_SETOWN_EX, whom, note="F_SETOWN_EX")
        build.ops.call(lib.SYS_fcntl, number, lib.F_SETSIG, owner.signal, note="F_SETSIG")
        if owner.on:
            build.ops.call(lib.SYS_fcntl, number, lib.F_SETFL, item.record.flags | O_ASYNC)


def give(item: Item[Any], whom: tuple[int, int], build: Build) -> None:
    """Give a pipe or socket to a user and group, so that who is not root can open /proc/self/fd/N, and fchmod() it."""
    with build.serving(item):
        nothing = build.ops.program.string(b"")
        build.ops.try_call(lib.SYS_fchownat, item.numbers[0], nothing, *whom, lib.AT_EMPTY_PATH)
