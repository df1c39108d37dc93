"""FIFOs: named pipes, reopened by their path.

Facts. Opening one end waits for the other, unless O_NONBLOCK is given, when an end for writing fails with ENXIO;
O_RDWR never waits. The bytes live as long as anybody holds an end; when the last one goes, they go too. tee() from an
end of our own tells whether somebody else can write (EAGAIN if it is empty) or nobody (0), and consumes nothing;
opening for writing without waiting tells whether anybody reads.

Consequence. A helper end (O_RDWR) is opened first and closed at the very end, so nothing waits. The saved bytes are
written back only if at restore nobody else holds the FIFO: otherwise its bytes never went away.

Cost. Bytes in a FIFO, as in a pipe, whose only ends are for writing are lost: they can be read by who opens it next.
"""

from __future__ import annotations

import fcntl
import os
import stat as modes
from errno import ENXIO

import msgspec

from lazyrestore._native import _core
from lazyrestore.errors import FileChanged
from lazyrestore.resources.descriptor import READ, Build, Item, View
from lazyrestore.resources.files import reachable_path
from lazyrestore.resources.pipe import DEFAULT_SIZE, fill, pending

lib = _core.lib


class Fifo(msgspec.Struct, frozen=True, tag="fifo"):
    """size: capacity in bytes; messages: what was unread in it."""

    path: bytes
    flags: int
    size: int
    messages: tuple[bytes, ...] = ()


def describe(record: Fifo) -> str:
    return f"FIFO {os.fsdecode(record.path)}"


def capture(view: View) -> Fifo | None:
    if view.mode != modes.S_IFIFO or not view.link.startswith(b"/"):
        return None
    path = reachable_path(view)
    with view.duplicate() as number:
        messages = pending(number) if view.survey.contents and view.access & READ else ()
        return Fifo(path, view.flags, fcntl.fcntl(number, fcntl.F_GETPIPE_SZ), messages)


def restore(items: list[Item[Fifo]], build: Build) -> None:
    fifos: dict[bytes, list[Item[Fifo]]] = {}
    for item in items:
        fifos.setdefault(item.record.path, []).append(item)
    for path, ends in fifos.items():
        with build.serving(ends[0]):
            _restore_fifo(path, ends, build)


def check(title: str, record: Fifo) -> None:
    """Refuse a FIFO that is gone or no FIFO any more. FileChanged."""
    path = os.fsdecode(record.path)
    advice = f"put it back (mkfifo {path})"
    try:
        found = os.stat(path)
    except OSError as error:
        raise FileChanged(title, "open", errno=error.errno, advice=advice) from error
    if not modes.S_ISFIFO(found.st_mode):
        raise FileChanged(title, "open", "is no FIFO any more", advice)


def _restore_fifo(path: bytes, ends: list[Item[Fifo]], build: Build) -> None:
    ops = build.ops
    name = ops.program.string(path)
    helper = build.fds.create(
        lib.SYS_openat, lib.AT_FDCWD, name, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, 0, note="so that no end waits"
    )
    messages = next((item.record.messages for item in ends if item.record.messages), ())
    size = ends[0].record.size
    if not _is_held(path):
        if size != DEFAULT_SIZE:
            ops.call(lib.SYS_fcntl, helper, lib.F_SETPIPE_SZ, size, note="F_SETPIPE_SZ")
        fill(build, helper, messages)
    for item in ends:
        flags = item.record.flags
        number = build.create(item, lib.SYS_openat, lib.AT_FDCWD, name, flags & ~os.O_DIRECT | os.O_CLOEXEC, 0)
        if flags & os.O_DIRECT:
            ops.call(lib.SYS_fcntl, number, lib.F_SETFL, flags, note="packet mode")
    build.fds.close(helper)


def _is_held(path: bytes) -> bool:
    """Whether some process has an end open. A FIFO that is not there is held by nobody: the program will say so."""
    from lazyrestore.kernel import libc

    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        return True
    except OSError as error:
        if error.errno != ENXIO:
            return False
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    own_reader, own_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return libc.tee(reader, own_writer, 1) > 0
    except BlockingIOError:
        return True
    finally:
        for number in (reader, own_reader, own_writer):
            os.close(number)
