"""TCP and UDP sockets without a live connection: listeners, unconnected ones, UDP ones with or without a peer.

Facts. TCP_INFO of a listener tells its backlog (tcpi_sacked). A TCP socket whose connection was reset or closed is in
CLOSE, like a new one, but poll() says POLLRDHUP; shutdown() on an unconnected socket fails with ENOTCONN and takes
effect all the same: reads give 0, writes EPIPE, as on the dead one. While connections of a dead process linger
(TIME_WAIT), bind() fails unless both its listener and the new one have SO_REUSEADDR, as servers do.

Consequence. A connection in any other state is refused, with both addresses. Connections that wait in a listener's
queue are no part of the process yet: they stay with the original.

Choice. An address in use is found before the new process starts, by binding a socket with the same options for a
moment.

Cost. Datagrams that wait to be read are dropped, which UDP permits. Options that cannot be read back: see
socket_options.py.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import termios
from collections.abc import Mapping
from fcntl import ioctl

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources import multicast, socket_options
from lazyrestore.resources.descriptor import Build, Item, Unsupported, View
from lazyrestore.resources.socket_options import Option
from lazyrestore.restore_plan import Address

lib = _core.lib

_STATES = {
    1: "established",
    2: "SYN sent",
    3: "SYN received",
    4: "FIN wait 1",
    5: "FIN wait 2",
    8: "close wait",
    9: "last ACK",
    11: "closing",
}
_CLOSE, _LISTEN = 7, 10
_TCP_PROTOCOLS = {socket.IPPROTO_TCP, 262}  # 262: IPPROTO_MPTCP


class TcpListener(msgspec.Struct, frozen=True, tag="tcp-listener"):
    """address: a struct sockaddr; backlog: connections."""

    flags: int
    family: int
    protocol: int
    address: bytes
    backlog: int
    options: tuple[Option, ...]


class TcpSocket(msgspec.Struct, frozen=True, tag="tcp"):
    """Not connected. address: None if it is not bound; dead: it was connected once."""

    flags: int
    family: int
    protocol: int
    address: bytes | None
    dead: bool
    options: tuple[Option, ...]


class UdpSocket(msgspec.Struct, frozen=True, tag="udp"):
    """address, peer: None if it is not bound, not connected."""

    flags: int
    family: int
    protocol: int
    address: bytes | None
    peer: bytes | None
    options: tuple[Option, ...]


InetRecord = TcpListener | TcpSocket | UdpSocket


def describe(record: InetRecord) -> str:
    address = format_address(record.address) if record.address else "unbound"
    if isinstance(record, TcpListener):
        return f"TCP listener {address}"
    if isinstance(record, TcpSocket):
        return f"TCP socket {address}"
    return f"UDP socket {address}" + (f" → {format_address(record.peer)}" if record.peer else "")


def format_address(address: bytes) -> str:
    """host:port of a struct sockaddr_in or sockaddr_in6."""
    (family, port) = struct.unpack_from("=H", address)[0], struct.unpack_from(">H", address, 2)[0]
    if family == socket.AF_INET:
        return f"{socket.inet_ntop(socket.AF_INET, address[4:8])}:{port}"
    return f"[{socket.inet_ntop(socket.AF_INET6, address[8:24])}]:{port}"


def capture(view: View, sock: socket.socket) -> InetRecord | None:
    """`sock` is a duplicate of the view's socket. Unsupported for a connection, and for raw sockets and other
    protocols.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    if sock.type == socket.SOCK_STREAM and sock.proto in _TCP_PROTOCOLS:
        return _capture_tcp(view, sock)
    if sock.type == socket.SOCK_DGRAM and sock.proto == socket.IPPROTO_UDP:
        peer = _peer(sock)
        address = _bound(sock)
        options = socket_options.capture(sock, view.survey) + multicast.capture(sock, view.survey)
        return UdpSocket(view.flags, int(sock.family), sock.proto, address, peer, options)
    raise Unsupported(f"{sock.type.name} sockets of protocol {sock.proto} are not restored")


def port_of(record: TcpListener) -> int:
    port: int = struct.unpack_from(">H", record.address, 2)[0]
    return port


def host_of(record: TcpListener) -> str:
    return str(_unpack(record.address)[0])


def rebind(record: TcpListener, ports: Mapping[int, int], *, reuse_port: bool = False) -> TcpListener:
    """The same listener, on another port if `ports` (old → new) has its own; reuse_port: with SO_REUSEPORT."""
    port = struct.pack(">H", ports.get(port_of(record), port_of(record)))
    options = record.options
    if reuse_port:
        others = tuple(o for o in options if (o.level, o.name) != (socket.SOL_SOCKET, socket.SO_REUSEPORT))
        options = (Option(socket.SOL_SOCKET, socket.SO_REUSEPORT, struct.pack("=i", 1)), *others)
    address = record.address[:2] + port + record.address[4:]
    return msgspec.structs.replace(record, address=address, options=options)


def restore(items: list[Item[InetRecord]], build: Build) -> None:
    for item in items:
        with build.serving(item):
            _restore(item, build)


def address_of(title: str, record: InetRecord) -> Address | None:
    """What it will be bound to; None: nothing."""
    if record.address is None:
        return None
    kind = socket.SOCK_DGRAM if isinstance(record, UdpSocket) else socket.SOCK_STREAM
    names = (socket.SO_REUSEPORT, socket.SO_REUSEADDR, 15, 78)
    options = ((o.level, o.name, o.value) for o in record.options if o.level == socket.IPPROTO_IPV6 or o.name in names)
    return Address(title, record.family, int(kind), record.protocol, _unpack(record.address), tuple(options))


def _capture_tcp(view: View, sock: socket.socket) -> TcpListener | TcpSocket:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    state = info[0]
    if state == _LISTEN:
        options = socket_options.capture(sock, view.survey)
        address = _pack(sock.getsockname())
        return TcpListener(
            view.flags, int(sock.family), sock.proto, address, struct.unpack_from("=I", info, 28)[0], options
        )
    if state != _CLOSE:
        name = _STATES.get(state, f"state {state}")
        peer = _peer(sock)
        raise Unsupported(
            f"{name} connection {format_address(_pack(sock.getsockname()))} → "
            f"{format_address(peer) if peer else 'an unknown peer'}"
        )
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    events = sum(ready for _, ready in poll.poll(0))
    dead = bool(events & select.POLLRDHUP)
    unread = struct.unpack("=i", ioctl(sock, termios.FIONREAD, bytes(4)))[0] if dead else 0
    if unread or events & select.POLLERR:
        raise Unsupported("a broken connection whose error or last bytes have not been read")
    options = socket_options.capture(sock, view.survey)
    if dead:
        options = socket_options.without_traces(options)
    return TcpSocket(view.flags, int(sock.family), sock.proto, None if dead else _bound(sock), dead, options)


def _restore(item: Item[InetRecord], build: Build) -> None:
    record, ops = item.record, build.ops
    kind = socket.SOCK_DGRAM if isinstance(record, UdpSocket) else socket.SOCK_STREAM
    flags = lib.SOCK_CLOEXEC | (lib.SOCK_NONBLOCK if record.flags & os.O_NONBLOCK else 0)
    number = build.create(item, lib.SYS_socket, record.family, kind | flags, record.protocol)
    socket_options.restore(record.options, number, build)
    if record.address is not None:
        ops.call(lib.SYS_bind, number, build.place(record.address), len(record.address))
        if isinstance(record, TcpListener):
            ops.call(lib.SYS_listen, number, record.backlog)
    if isinstance(record, UdpSocket) and record.peer is not None:
        ops.call(lib.SYS_connect, number, build.place(record.peer), len(record.peer))
    if isinstance(record, TcpSocket) and record.dead:
        ops.try_call(lib.SYS_shutdown, number, socket.SHUT_RDWR, note="takes effect in spite of ENOTCONN")


def _bound(sock: socket.socket) -> bytes | None:
    name = sock.getsockname()
    return _pack(name) if name[1] else None


def _peer(sock: socket.socket) -> bytes | None:
    try:
        return _pack(sock.getpeername())
    except OSError:
        return None


def _pack(name: tuple[str, int] | tuple[str, int, int, int]) -> bytes:
    """A struct sockaddr of what getsockname() of the socket module returned."""
    port = struct.pack(">H", name[1])
    if len(name) == 2:
        return struct.pack("=H", socket.AF_INET) + port + socket.inet_aton(name[0]) + bytes(8)
    host = socket.inet_pton(socket.AF_INET6, name[0].partition("%")[0])
    return struct.pack("=H", socket.AF_INET6) + port + struct.pack(">I", name[2]) + host + struct.pack("=I", name[3])


def _unpack(address: bytes) -> tuple[str, int] | tuple[str, int, int, int]:
    port = struct.unpack_from(">H", address, 2)[0]
    if struct.unpack_from("=H", address)[0] == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, address[4:8]), port
    flow, scope = struct.unpack_from(">I", address, 4)[0], struct.unpack_from("=I", address, 24)[0]
    return socket.inet_ntop(socket.AF_INET6, address[8:24]), port, flow, scope
