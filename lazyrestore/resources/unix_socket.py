"""Unix sockets: socket pairs inside the process with what is queued, listeners, datagram and unconnected sockets.

Facts. Who the other end is, only NETLINK_SOCK_DIAG tells. One recv(MSG_PEEK) returns all that a stream holds; packets
are walked with SO_PEEK_OFF. A peer that is gone has no inode any more, and a stream's survivor is shut down both ways;
a connection that waits in a listener's queue has no inode either, but its other end is not shut down. When the dead end
had unread bytes, the survivor has ECONNRESET pending (POLLERR), which a look at packets takes away, and one at a stream
does not. A bound socket's file keeps its name when the process dies, and bind() then fails with EADDRINUSE. connect()
of a datagram socket to such a file leaves no trace at another: ECONNREFUSED means that nobody is bound to it; with a
socket of another kind there it is EPROTOTYPE, whether that one listens or not (unix_find_bsd in net/unix/af_unix.c).

Consequence. A pair is made again and each queue filled by sending from the other end, with a send buffer large enough
for the while. A stale socket file is unlinked before the new process starts, if no socket is bound to it any more;
mode and owner are set before listen().

Cost. An empty datagram in a queue is seen by the first snapshot of a process only: the kernel marks it, and hides it
from later ones, which find that the sender has more in flight than they see, and refuse. SO_PEERCRED of a pair tells
the credentials at restore. The process's working directory is entered to bind relative names. Not restored, refused:
connections to other processes, descriptors and credentials in flight, urgent bytes, packets behind a pending error,
named pairs, queued datagrams of bound sockets.
"""

from __future__ import annotations

import os
import select
import socket
import stat as modes
import struct
import termios
from contextlib import suppress
from fcntl import ioctl
from typing import TYPE_CHECKING

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources import socket_options
from lazyrestore.resources.descriptor import Build, Item, Unsupported, View
from lazyrestore.resources.pipe import ExternalPipe
from lazyrestore.resources.socket_options import Option
from lazyrestore.restore_plan import Address

if TYPE_CHECKING:
    from lazyrestore.kernel import unix_diag
    from lazyrestore.program import OpList, Pointer

lib = _core.lib

_PEEK_LIMIT = 8 << 20
_PEEK_OFF: int = lib.SO_PEEK_OFF
_SNDBUF = (socket.SOL_SOCKET, socket.SO_SNDBUF)


class SocketFile(msgspec.Struct, frozen=True):
    """The file that a socket is bound to. path: absolute; mode: permission bits."""

    path: bytes
    mode: int
    uid: int
    gid: int


class UnixSocket(msgspec.Struct, frozen=True, tag="unix"):
    """address, peer: a sockaddr_un's sun_path, b"" if it is not bound, not connected (datagrams only); backlog: None
    if it does not listen; own: the process itself made it listen, not who started it.
    """

    flags: int
    kind: int
    address: bytes
    file: SocketFile | None
    backlog: int | None
    peer: bytes
    options: tuple[Option, ...]
    own: bool = True


class UnixPair(msgspec.Struct, frozen=True, tag="unix-pair"):
    """One end. inode, peer: tell which two belong together, peer 0: closed; messages: what waits to be read here;
    send_buffer: bytes, as SO_SNDBUF reads; shutdown: 1 reading, 2 writing, or both; reset: ECONNRESET is pending.
    """

    flags: int
    kind: int
    inode: int
    peer: int
    messages: tuple[bytes, ...]
    send_buffer: int
    shutdown: int
    reset: bool
    options: tuple[Option, ...]


UnixRecord = UnixSocket | UnixPair


def describe(record: UnixRecord) -> str:
    if isinstance(record, UnixPair):
        return "socket pair"
    name = _printable(record.address) if record.address else "unbound"
    return f"Unix {'listener' if record.backlog is not None else 'socket'} {name}"


def capture(view: View, sock: socket.socket) -> UnixRecord | ExternalPipe | None:
    """`sock` is a duplicate of the view's socket. Unsupported for what the opening comment lists."""
    if sock.family != socket.AF_UNIX:
        return None
    state = view.survey.diag.find(view.stat.st_ino)
    if state is None:
        raise Unsupported("the kernel's socket diagnosis (unix_diag) does not know it")
    from lazyrestore.kernel import fdinfo, unix_diag

    if fdinfo.passed_descriptors(view.info.rest):
        raise Unsupported("descriptors are in flight to it (SCM_RIGHTS)")
    stream = sock.type != socket.SOCK_DGRAM
    connected = state.state == unix_diag.ESTABLISHED if stream else state.peer != 0
    orphan = not stream and state.state == unix_diag.ESTABLISHED and not state.peer
    inside = (view.stat.st_dev, state.peer) in view.survey.accesses
    unnamed = stream or not (_name(sock) or (inside and _encode(sock.getpeername())))
    if unnamed and (inside or orphan or (connected and not state.peer)):
        return _capture_pair(view, sock, state, inside)
    if stream and connected:
        if set(view.numbers) <= {0, 1, 2}:
            return ExternalPipe(view.flags, "Unix socket")
        raise Unsupported(f"connected {_printable(_name(sock)) or ''} to {_who(sock)}".replace("  ", " "))
    return _capture_single(view, sock, state)


def restore(items: list[Item[UnixRecord]], build: Build) -> None:
    pairs: dict[frozenset[int], list[tuple[Item[UnixRecord], UnixPair]]] = {}
    for item in items:
        record = item.record
        if isinstance(record, UnixPair):
            pairs.setdefault(frozenset((record.inode, record.peer)), []).append((item, record))
            continue
        with build.serving(item):
            _restore_single(item, record, build)
    for item in items:  # when all are bound: one may be connected to another
        record = item.record
        if isinstance(record, UnixSocket) and record.peer:
            with build.serving(item):
                _enter(record.peer, build)
                build.ops.call(lib.SYS_connect, build.made[item.index], *_sockaddr(record.peer, build))
    for ends in pairs.values():
        with build.serving(ends[0][0]):
            _restore_pair(ends, build)


def listen_again(title: str, record: UnixSocket, number: int, ops: OpList) -> None:
    """Append what makes a listener the process's: clients are told the credentials of the last listen()."""
    if record.backlog is not None and record.own:
        with ops.serving(title):
            ops.call(lib.SYS_listen, number, record.backlog, note="with the process's credentials")


def address_of(title: str, record: UnixRecord) -> Address | None:
    """What it will be bound to; None: nothing."""
    if isinstance(record, UnixPair) or not record.address:
        return None
    if record.file is None:
        return Address(title, int(socket.AF_UNIX), record.kind, name=record.address)
    return Address(title, int(socket.AF_UNIX), record.kind, file=record.file.path)


def _capture_single(view: View, sock: socket.socket, state: unix_diag.UnixSocket) -> UnixSocket:
    from lazyrestore.kernel.unix_diag import LISTEN

    listening = state.state == LISTEN
    address = _name(sock)
    peer = b""
    if sock.type == socket.SOCK_DGRAM:
        if _unread(sock):
            raise Unsupported("datagrams wait in it")
        if state.peer:
            peer = _encode(sock.getpeername())
            if not peer:
                raise Unsupported("connected to a socket without a name in another process")
    file = _socket_file(view, address, state) if address and address[0] else None
    options = socket_options.capture(sock, view.survey)
    own = _peer_process(sock) == view.survey.pid
    backlog = state.backlog if listening else None
    return UnixSocket(view.flags, int(sock.type), address, file, backlog, peer, options, own)


def _capture_pair(view: View, sock: socket.socket, state: unix_diag.UnixSocket, inside: bool) -> UnixPair:
    if not inside and sock.type != socket.SOCK_DGRAM and state.shutdown != 3:
        raise Unsupported("its connection has not been accepted yet")
    if _name(sock) or (inside and _encode(sock.getpeername())):
        raise Unsupported("a connection of the process with itself through a named socket is not restored")
    poll = select.poll()
    poll.register(sock, select.POLLPRI)
    ready = sum(events for _, events in poll.poll(0))
    if ready & select.POLLPRI:
        raise Unsupported("an urgent byte (MSG_OOB) waits in it")
    reset = bool(ready & select.POLLERR)
    if reset and (sock.type == socket.SOCK_DGRAM or (sock.type == socket.SOCK_SEQPACKET and _unread(sock))):
        raise Unsupported("an error (ECONNRESET) waits in it that has not been read")
    options = socket_options.capture(sock, view.survey)
    messages: tuple[bytes, ...] = ()
    if view.survey.contents and not (reset and sock.type != socket.SOCK_STREAM):
        messages = _queued(sock, state)
        if inside and sock.type != socket.SOCK_STREAM and _hides_some(messages, sock.type, view, state.peer):
            raise Unsupported("an empty datagram waits in it that was looked at before (MSG_PEEK, a snapshot)")
    return UnixPair(
        view.flags,
        int(sock.type),
        view.stat.st_ino,
        state.peer if inside else 0,
        messages,
        sock.getsockopt(*_SNDBUF),
        state.shutdown if inside or sock.type == socket.SOCK_DGRAM else 0,
        reset,
        options,
    )


def _socket_file(view: View, address: bytes, state: unix_diag.UnixSocket) -> SocketFile:
    path = address
    if not path.startswith(b"/"):
        path = os.path.join(os.readlink(b"/proc/%d/cwd" % view.survey.pid), path)
    try:
        found = os.stat(path)
    except OSError:
        found = None
    if found is None or (found.st_dev, found.st_ino) != state.bound:
        raise Unsupported(f"bound to {_printable(address)}, which is not its file (any more)")
    return SocketFile(path, modes.S_IMODE(found.st_mode), found.st_uid, found.st_gid)


def _queued(sock: socket.socket, state: unix_diag.UnixSocket) -> tuple[bytes, ...]:
    """What waits to be read, without consuming it: one piece of a stream, or the packets."""
    before = sock.getsockopt(socket.SOL_SOCKET, _PEEK_OFF)
    if before < 0 and sock.type == socket.SOCK_STREAM:
        return _stream(sock)
    sock.setsockopt(socket.SOL_SOCKET, _PEEK_OFF, 0)
    try:
        return _stream(sock) if sock.type == socket.SOCK_STREAM else _packets(sock, state)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, _PEEK_OFF, before)


def _stream(sock: socket.socket) -> tuple[bytes, ...]:
    count = _unread(sock)
    data = _peek(sock, count) if count else b""
    if len(data) != count:
        raise Unsupported(f"only {len(data)} of the {count} bytes in it could be read")
    return (data,) if data else ()


def _packets(sock: socket.socket, state: unix_diag.UnixSocket) -> tuple[bytes, ...]:
    packets: list[bytes] = []
    total = _unread(sock) if sock.type == socket.SOCK_SEQPACKET else -1
    try:
        while True:
            data = _peek(sock, _PEEK_LIMIT)
            if not data and state.shutdown & 1 and sum(map(len, packets)) == total:
                return tuple(packets)
            packets.append(data)
    except BlockingIOError:
        return tuple(packets)


def _peek(sock: socket.socket, room: int) -> bytes:
    data, _, flags, _ = sock.recvmsg(room, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    if flags & socket.MSG_TRUNC:
        raise Unsupported(f"a packet in it is larger than {room} bytes")
    if flags & socket.MSG_CTRUNC:
        raise Unsupported("what waits in it carries its sender's credentials (SO_PASSCRED) or another control message")
    return data


def _hides_some(packets: tuple[bytes, ...], kind: int, view: View, peer: int) -> bool:
    """Whether the peer has more in flight than `packets`: at least one that is empty and was peeked at before."""
    found = view.survey.diag.find(peer)
    if found is None or not found.in_flight:
        return False
    sender, receiver = socket.socketpair(socket.AF_UNIX, kind)
    with sender, receiver:
        for name in (socket.SO_SNDBUF, lib.SO_SNDBUFFORCE):
            with suppress(OSError):
                sender.setsockopt(socket.SOL_SOCKET, name, _room(packets))
        seen = 0
        for packet in (*packets, b""):
            seen = _integer(sender, termios.TIOCOUTQ)
            sender.send(packet, socket.MSG_DONTWAIT)
        empty = _integer(sender, termios.TIOCOUTQ) - seen
    return found.in_flight >= seen + empty


def _restore_single(item: Item[UnixRecord], record: UnixSocket, build: Build) -> None:
    ops = build.ops
    flags = lib.SOCK_CLOEXEC | (lib.SOCK_NONBLOCK if record.flags & os.O_NONBLOCK else 0)
    number = build.create(item, lib.SYS_socket, socket.AF_UNIX, record.kind | flags, 0)
    socket_options.restore(record.options, number, build)
    if record.address:
        _enter(record.address, build)
        ops.call(lib.SYS_bind, number, *_sockaddr(record.address, build))
        if record.file is not None:
            path = ops.program.string(record.file.path)
            ops.call(lib.SYS_fchownat, lib.AT_FDCWD, path, record.file.uid, record.file.gid, 0)
            ops.call(lib.SYS_fchmodat, lib.AT_FDCWD, path, record.file.mode)
        if record.backlog is not None:
            ops.call(lib.SYS_listen, number, record.backlog)


def _restore_pair(ends: list[tuple[Item[UnixRecord], UnixPair]], build: Build) -> None:
    ops = build.ops
    numbers = build.fds.create_pair(
        lib.SYS_socketpair, socket.AF_UNIX, ends[0][1].kind | lib.SOCK_CLOEXEC, 0, ops.program.reserve(8)
    )
    for (_, record), sender in zip(ends, reversed(numbers), strict=False):
        if record.messages:
            _send(record.messages, sender, build)
    for position, (item, record) in enumerate(ends):
        number = build.made[item.index] = numbers[position]
        if len(ends) == 2 and ends[1 - position][1].messages:
            lent = struct.pack("=i", record.send_buffer // 2)
            socket_options.set_option(number, Option(*_SNDBUF, lent), build)
            unlocked = socket_options.integer(socket.SOL_SOCKET, lib.SO_BUF_LOCK, 0)
            socket_options.set_option(number, unlocked, build)
        socket_options.restore(record.options, number, build)
        if record.shutdown:
            ops.call(lib.SYS_shutdown, number, record.shutdown - 1)
        if record.flags & os.O_NONBLOCK:
            ops.call(lib.SYS_fcntl, number, lib.F_SETFL, record.flags)
    if len(ends) == 1:
        if ends[0][1].reset:
            ops.call_expecting(1, lib.SYS_sendto, numbers[0], build.place(b"x"), 1, socket.MSG_NOSIGNAL, 0, 0)
        build.fds.close(numbers[1])


def _send(messages: tuple[bytes, ...], sender: int, build: Build) -> None:
    """Append what fills the other end's queue. The kernel accounts up to a few KiB more for each message."""
    value = build.place(struct.pack("=i", _room(messages)))
    for name in (socket.SO_SNDBUF, lib.SO_SNDBUFFORCE):
        build.ops.try_call(lib.SYS_setsockopt, sender, socket.SOL_SOCKET, name, value, 4, note="room for the queue")
    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    for message in messages:
        build.ops.call_expecting(len(message), lib.SYS_sendto, sender, build.place(message), len(message), flags, 0, 0)


def _room(messages: tuple[bytes, ...]) -> int:
    return 2 * sum(map(len, messages)) + 4096 * len(messages) + 65536


def _enter(name: bytes, build: Build) -> None:
    """Append the chdir() that a relative name needs."""
    if name[:1] not in (b"/", b"\0"):
        build.ops.call(lib.SYS_chdir, build.ops.program.string(build.context.cwd), note="for a relative name")


def _sockaddr(name: bytes, build: Build) -> tuple[Pointer, int]:
    address = struct.pack("=H", socket.AF_UNIX) + name + (b"" if name[:1] == b"\0" else b"\0")
    return build.place(address), len(address)


def _unread(sock: socket.socket) -> int:
    return _integer(sock, termios.FIONREAD)


def _integer(sock: socket.socket, request: int) -> int:
    return int(struct.unpack("=i", ioctl(sock, request, bytes(4)))[0])


def _encode(name: str | bytes) -> bytes:
    return os.fsencode(name)


def _name(sock: socket.socket) -> bytes:
    return _encode(sock.getsockname())


def _printable(name: bytes) -> str:
    return "@" + os.fsdecode(name[1:]) if name[:1] == b"\0" else os.fsdecode(name)


def _who(sock: socket.socket) -> str:
    peer = _printable(_encode(sock.getpeername()))
    return f"{peer or 'a socket'} of process {_peer_process(sock)}"


def _peer_process(sock: socket.socket) -> int:
    """Who made the other end, or this one listen; 0 if nobody did."""
    return int(struct.unpack_from("=i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
