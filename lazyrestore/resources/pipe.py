"""Pipes: those inside the process with their bytes, those to other processes as the restorer's standard streams.

Facts. Both ends of a pipe have one inode. FIONREAD works on either end; tee() copies a pipe's buffers to another pipe
without consuming them, needs a read end, and keeps the ends of packets (what was written in O_DIRECT mode, up to a page
each; the mode may have changed since); the copy needs as many slots as the original. A read goes on behind bytes of a
stream, and stops behind a packet. fcntl() sets O_DIRECT of a pipe or FIFO, open() refuses it. poll() tells POLLHUP when
no writer is left anywhere, POLLERR when no reader is.

Consequence. A pipe is inside if the process holds both directions of it, or if its other end is closed everywhere;
otherwise it leads to another process, and the restorer's standard streams stand in for it. A second description of
the same end (opened through /proc/self/fd) is opened that way again. Writing back cannot block: the bytes had room
before, and the write end is non-blocking while it happens.

Cost. A pipe of which the process holds both directions is taken to be its own even if another process has ends of it
too. What an outside pipe held unread stays with the outside.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat as modes
import struct
import termios
from contextlib import suppress

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources.descriptor import READ, WRITE, Build, Item, Unsupported, View, access_of

lib = _core.lib

DEFAULT_SIZE = 65536
PAGE = 4096
_BEHIND = b"."  # written behind a copy, to see whether that ends with a packet


class PipeEnd(msgspec.Struct, frozen=True, tag="pipe"):
    """size: the pipe's capacity in bytes; messages: what is in it, in the pieces in which it will be read: each but the
    last one ends with a packet, and the last one, if it is not empty, with bytes of a stream; inode: tells which ends
    belong together.
    """

    flags: int
    inode: int
    size: int
    messages: tuple[bytes, ...] = ()


class ExternalPipe(msgspec.Struct, frozen=True, tag="external"):
    """kind: "pipe" or "Unix socket", to a process outside the snapshot."""

    flags: int
    kind: str = "pipe"


def describe(record: PipeEnd | ExternalPipe) -> str:
    return "pipe" if isinstance(record, PipeEnd) else f"{record.kind} to another process"


def capture(view: View) -> PipeEnd | ExternalPipe | None:
    if view.mode != modes.S_IFIFO or not view.link.startswith(b"pipe:["):
        return None
    inside = view.survey.accesses[view.identity] == READ | WRITE
    with view.duplicate() as number:
        if not inside and not _is_dead(number):
            return ExternalPipe(view.flags)
        messages = pending(number) if view.survey.contents and view.access & READ else ()
        return PipeEnd(view.flags, view.stat.st_ino, fcntl.fcntl(number, fcntl.F_GETPIPE_SZ), messages)


def pending(number: int) -> tuple[bytes, ...]:
    """What waits in the pipe behind a read end of ours, without consuming it. OSError."""
    unread = bytearray(4)
    fcntl.ioctl(number, termios.FIONREAD, unread)
    (count,) = struct.unpack("=i", unread)
    if not count:
        return ()
    from lazyrestore.kernel import libc

    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size = fcntl.fcntl(number, fcntl.F_GETPIPE_SZ)
        try:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, size + PAGE)
        except PermissionError:  # it is as large as this user's may be
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, size)
        copied = libc.tee(number, writer, count)
        if copied != count:
            raise Unsupported(f"only {copied} of the {count} bytes in it could be read")
        with suppress(BlockingIOError):
            copied += os.write(writer, _BEHIND)
        messages = []
        while copied:
            messages.append(os.read(reader, copied))
            copied -= len(messages[-1])
        messages[-1] = messages[-1].removesuffix(_BEHIND)
        return tuple(messages)
    finally:
        os.close(reader)
        os.close(writer)


def fill(build: Build, number: int, messages: tuple[bytes, ...]) -> None:
    """Append the writes of `messages` to a non-blocking write end that is not in packet mode; it may be afterwards."""
    mode = os.O_NONBLOCK

    def write(data: bytes, wanted: int) -> None:
        nonlocal mode
        if not data:
            return
        if wanted != mode:
            build.ops.call(lib.SYS_fcntl, number, lib.F_SETFL, wanted, note="packet mode")
            mode = wanted
        build.ops.call_expecting(len(data), lib.SYS_write, number, build.place(data), len(data))

    for message in messages[:-1]:
        start = (len(message) - 1) // PAGE * PAGE  # whole pages, so that the packet begins one
        write(message[:start], os.O_NONBLOCK)
        write(message[start:], os.O_NONBLOCK | os.O_DIRECT)
    write(b"".join(messages[-1:]), os.O_NONBLOCK)


def restore(items: list[Item[PipeEnd | ExternalPipe]], build: Build) -> None:
    pipes: dict[int, list[tuple[Item[PipeEnd | ExternalPipe], PipeEnd]]] = {}
    for item in items:
        if isinstance(item.record, ExternalPipe):
            with build.serving(item):
                build.stream(item, access_of(item.record.flags))
        else:
            pipes.setdefault(item.record.inode, []).append((item, item.record))
    for ends in pipes.values():
        with build.serving(ends[0][0]):
            _restore_pipe(ends, build)


def _restore_pipe(ends: list[tuple[Item[PipeEnd | ExternalPipe], PipeEnd]], build: Build) -> None:
    ops = build.ops
    messages = next((record.messages for _, record in ends if record.messages), ())
    reader, writer = build.fds.create_pair(lib.SYS_pipe2, ops.program.reserve(8), os.O_CLOEXEC | os.O_NONBLOCK)
    if ends[0][1].size != DEFAULT_SIZE:
        ops.call(lib.SYS_fcntl, writer, lib.F_SETPIPE_SZ, ends[0][1].size, note="F_SETPIPE_SZ")
    fill(build, writer, messages)
    unused = {READ: reader, WRITE: writer}
    for item, record in ends:
        access = access_of(record.flags)
        if access in unused:
            number = build.made[item.index] = unused.pop(access)
            ops.call(lib.SYS_fcntl, number, lib.F_SETFL, record.flags)
        else:
            number = build.reopen(item, reader, record.flags & ~os.O_DIRECT | os.O_NONBLOCK)
            ops.call(lib.SYS_fcntl, number, lib.F_SETFL, record.flags)
    for number in unused.values():
        build.fds.close(number)


def _is_dead(number: int) -> bool:
    poll = select.poll()
    poll.register(number, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))
