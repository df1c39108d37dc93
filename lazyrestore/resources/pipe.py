"""Pipes: those inside the process with their bytes, those to other processes as the restorer's standard streams.

Facts. Both ends of a pipe have one inode. FIONREAD works on either end; tee() copies a pipe's buffers to another pipe
without consuming them, needs a read end, and keeps the packet boundaries of a pipe in packet mode (O_DIRECT); the
copy needs as many slots as the original. poll() tells POLLHUP when no writer is left anywhere, POLLERR when no reader
is.

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

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources.descriptor import READ, WRITE, Build, Item, Unsupported, View, access_of

lib = _core.lib

DEFAULT_SIZE = 65536


class PipeEnd(msgspec.Struct, frozen=True, tag="pipe"):
    """size: the pipe's capacity in bytes; messages: what is in it, in the pieces in which it will be read (packet
    mode), held by one reading description only; inode: tells which ends belong together.
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
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, fcntl.fcntl(number, fcntl.F_GETPIPE_SZ))
        copied = libc.tee(number, writer, count)
        if copied != count:
            raise Unsupported(f"only {copied} of the {count} bytes in it could be read")
        messages = []
        while copied:
            messages.append(os.read(reader, copied))
            copied -= len(messages[-1])
        return tuple(messages)
    finally:
        os.close(reader)
        os.close(writer)


def fill(build: Build, number: int, messages: tuple[bytes, ...]) -> None:
    """Append the writes of `messages` to a non-blocking write end."""
    for message in messages:
        build.ops.call_expecting(len(message), lib.SYS_write, number, build.place(message), len(message))


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
    packets = os.O_DIRECT if any(record.flags & os.O_DIRECT for _, record in ends) else 0
    reader, writer = build.fds.create_pair(
        lib.SYS_pipe2, ops.program.reserve(8), os.O_CLOEXEC | os.O_NONBLOCK | packets
    )
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
            number = build.reopen(item, reader, record.flags | os.O_NONBLOCK)
            ops.call(lib.SYS_fcntl, number, lib.F_SETFL, record.flags)
    for number in unused.values():
        build.fds.close(number)


def _is_dead(number: int) -> bool:
    poll = select.poll()
    poll.register(number, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))
