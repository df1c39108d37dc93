"""Character devices without state, and terminals.

Facts. /dev/null, zero, full, random and urandom (major 1) keep nothing per description. A terminal is any character
device that answers TCGETS; a hung-up one answers EIO and is known by its major number.

Consequence. The former are reopened by their path; for a terminal the restorer's own standard stream stands in.
Everything else in /dev, a pseudo-terminal's master among it, has state of which we know nothing: refused.
"""

from __future__ import annotations

import os
import stat as modes

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources.descriptor import Build, Item, Unsupported, View, access_of
from lazyrestore.resources.files import reachable_path

lib = _core.lib

_HARMLESS = {os.makedev(1, minor) for minor in (3, 5, 7, 8, 9)}
_PTMX = os.makedev(5, 2)
_TERMINAL_MAJORS = {4, 5, *range(136, 144)}


class Device(msgspec.Struct, frozen=True, tag="device"):
    """number: the device number (st_rdev)."""

    path: bytes
    flags: int
    number: int


class Terminal(msgspec.Struct, frozen=True, tag="terminal"):
    path: bytes
    flags: int


def describe(record: Device | Terminal) -> str:
    path = os.fsdecode(record.path)
    return f"terminal {path}" if isinstance(record, Terminal) else path


def capture(view: View) -> Device | Terminal | None:
    if view.mode == modes.S_IFBLK:
        raise Unsupported("block devices are not restored")
    if view.mode != modes.S_IFCHR:
        return None
    number = view.stat.st_rdev
    if number in _HARMLESS:
        return Device(reachable_path(view), view.flags, number)
    if number == _PTMX:
        raise Unsupported("the master of a pseudo-terminal is not restored")
    if os.major(number) in _TERMINAL_MAJORS or _answers_as_terminal(view):
        return Terminal(view.link, view.flags)
    raise Unsupported(f"device {os.major(number)}:{os.minor(number)} is not restored")


def restore(items: list[Item[Device | Terminal]], build: Build) -> None:
    for item in items:
        with build.serving(item):
            record = item.record
            if isinstance(record, Terminal):
                build.stream(item, access_of(record.flags))
            else:
                path = build.ops.program.string(record.path)
                flags = record.flags | os.O_CLOEXEC | os.O_NOCTTY
                build.create(item, lib.SYS_openat, lib.AT_FDCWD, path, flags, 0)


def _answers_as_terminal(view: View) -> bool:
    with view.duplicate() as number:
        return os.isatty(number)
