"""Round trips of TCP, UDP and Unix sockets, in real processes, and what happens when an address is taken."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from resources.interpreter import child, make_addresses_free, record, restored, round_trip, shape

from lazyrestore._native import _core
from lazyrestore.errors import RestoreError
from lazyrestore.resources import socket_options
from lazyrestore.resources.inet_socket import TcpListener, TcpSocket, UdpSocket, format_address
from lazyrestore.resources.pipe import ExternalPipe
from lazyrestore.resources.unix_socket import UnixPair, UnixSocket

lib = _core.lib
_libc = ctypes.CDLL(None)

LOOPBACK = "127.0.0.1"


def _own(number: int) -> socket.socket:
    """The child's descriptor as a socket object that does not close it."""
    return socket.socket(fileno=os.dup(number))


def _serve(number: int) -> None:
    """Accept one connection and talk to it through the listener `number`."""
    with _own(number) as listener, socket.socket(listener.family, listener.type) as client:
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            client.send(b"ping")
            assert server.recv(10) == b"ping"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_tcp_listener_accepts_again(family: socket.AddressFamily) -> None:
    def body() -> None:
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 7))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 3)
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(("::1" if family == socket.AF_INET6 else LOOPBACK, 0))
        listener.listen(37)
        listener.setblocking(False)
        listener.detach()

    def check() -> None:
        with _own(3) as listener:
            assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 100_000
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 0)
            os.set_blocking(3, True)
        _serve(3)

    table = round_trip(body, check)
    assert isinstance(record(table, 3), TcpListener)
    assert record(table, 3).backlog == 37


def test_a_listener_whose_address_is_taken_says_so() -> None:
    def body() -> None:
        listener = socket.create_server((LOOPBACK, 0))
        listener.detach()

    with child(body) as original:
        table = original.survey()
        address = format_address(record(table, 3).address)
        with pytest.raises(RestoreError) as caught:
            make_addresses_free(table)
        assert str(caught.value).startswith(f"fd 3 (TCP listener {address}): bind: Address already in use; ")
        assert caught.value.errno == errno.EADDRINUSE
    make_addresses_free(table)


def test_a_listener_survives_the_rest_of_its_connections() -> None:
    """The dead process's connections keep the address busy (TIME_WAIT)."""

    def body() -> None:
        listener = socket.create_server((LOOPBACK, 0))
        with socket.create_connection(listener.getsockname()) as client:
            server, _ = listener.accept()
            server.close()  # the server closes first: its side waits
            assert client.recv(1) == b""
        listener.detach()

    round_trip(body, lambda: _serve(3))


def test_unconnected_tcp_and_udp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
        outside.bind((LOOPBACK, 0))
        peer = outside.getsockname()

        def body() -> None:
            socket.socket().detach()  # 3
            bound = socket.socket()  # 4
            bound.bind((LOOPBACK, 0))
            bound.detach()
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()  # 5
            bound = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)  # 6
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            bound.bind(("::1", 0))
            bound.detach()
            connected = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # 7
            connected.connect(peer)
            connected.detach()

        def check() -> None:
            with _own(7) as connected:
                connected.send(b"to the peer")
            with _own(6) as receiver, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"to the address", receiver.getsockname())
                assert receiver.recv(100) == b"to the address"
            with _own(4) as bound:
                bound.listen(1)
            _serve(4)

        table = round_trip(body, check)
        assert outside.recv(100) == b"to the peer"
    assert [type(record(table, number)) for number in range(3, 8)] == [TcpSocket] * 2 + [UdpSocket] * 3
    assert record(table, 3).address is None
    assert record(table, 5).address is None


def test_a_reset_connection_stays_dead() -> None:
    def body() -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.close()  # RST
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        os.dup2(client.detach(), 20)
        os.closerange(3, 20)

    def check() -> None:
        with _own(20) as dead:
            assert dead.recv(10) == b""
            with pytest.raises(BrokenPipeError):
                dead.send(b"x")

    assert record(round_trip(body, check), 20).dead


@pytest.mark.parametrize("name", ["absolute", "relative", "abstract"])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_unix_listener(name: str, kind: socket.SocketKind, tmp_path: Path) -> None:
    address = {
        "absolute": str(tmp_path / "socket"),
        "relative": "socket",
        "abstract": f"\0lazyrestore test {tmp_path}",
    }[name]

    def body() -> None:
        os.chdir(tmp_path)
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(address)
        listener.listen(12)
        if name != "abstract":
            os.chmod(address, 0o651)
            os.chown(address, 12, 34)
        listener.detach()

    def check() -> None:
        _serve(3)
        if name != "abstract":
            found = os.stat("socket" if name == "relative" else address)
            assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o651, 12, 34)

    with child(body) as original:
        table = original.survey()
        with pytest.raises(RestoreError, match=r"fd 3 \(Unix listener .*\): bind: Address already in use; "):
            make_addresses_free(table)
    with restored(table, check, cwd=str(tmp_path)) as copy:
        again = copy.survey()
        assert shape(again) == shape(table)
        assert record(again, 3).backlog == 12
        copy.go()


def test_what_lies_in_a_unix_listeners_place(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "socket"
    path.parent.mkdir()

    def body() -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        listener.detach()

    with child(body) as original:
        table = original.survey()
    assert path.is_socket()  # stale now
    make_addresses_free(table)
    assert not path.exists()
    path.write_text("a file")
    with pytest.raises(RestoreError, match="is no socket now; move it away"):
        make_addresses_free(table)
    assert path.read_text() == "a file"
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(RestoreError, match="no directory"):
        make_addresses_free(table)


@pytest.mark.requires("root")
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(
    ("kind", "listens"),
    [
        (socket.SOCK_STREAM, False),
        (socket.SOCK_STREAM, True),
        (socket.SOCK_SEQPACKET, False),
        (socket.SOCK_SEQPACKET, True),
        (socket.SOCK_DGRAM, False),
    ],
)
def test_who_has_a_unix_address_is_seen_and_notices_nothing(
    tmp_path: Path, kind: socket.SocketKind, listens: bool, elsewhere: bool
) -> None:
    """In our network namespace or in one of its own; the path is longer than an address may be."""
    path = tmp_path / ("long" * 30) / "socket"
    path.parent.mkdir()

    def bind(kind: socket.SocketKind, listens: bool) -> None:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as made:
            made.bind(path.name)
            if listens:
                made.listen()
            made.detach()

    def take() -> None:
        assert not elsewhere or _libc.unshare(lib.CLONE_NEWNET) == 0
        bind(kind, listens)

    def nothing_came() -> None:
        with _own(3) as taken:
            if listens:
                with pytest.raises(BlockingIOError):
                    taken.accept()
            elif kind == socket.SOCK_DGRAM:
                with pytest.raises(BlockingIOError):
                    taken.recv(1)

    with child(lambda: bind(socket.SOCK_STREAM, True)) as original:
        table = original.survey()
    path.unlink()
    with child(take, nothing_came) as holder:
        with pytest.raises(RestoreError, match="bind: Address already in use; "):
            make_addresses_free(table)
        holder.go()
    assert path.is_socket()
    make_addresses_free(table)
    assert not path.exists()


def test_unix_datagrams_and_unconnected(tmp_path: Path) -> None:
    def body() -> None:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # 3
        server.bind(str(tmp_path / "server"))
        client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # 4
        client.connect(str(tmp_path / "server"))
        for one in (server, client, socket.socket(socket.AF_UNIX)):
            one.detach()

    def check() -> None:
        os.write(4, b"hello")
        assert os.read(3, 10) == b"hello"

    table = round_trip(body, check)
    assert [type(record(table, number)) for number in (3, 4, 5)] == [UnixSocket] * 3


def _pair_of(kind: socket.SocketKind, *messages: bytes) -> Callable[[], None]:
    def body() -> None:
        left, right = socket.socketpair(socket.AF_UNIX, kind)  # 3, 4
        for message in messages:
            left.send(message)
        right.send(b"back")
        right.setblocking(False)
        left.detach()
        right.detach()

    return body


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_pair_of_packets_keeps_its_queue(kind: socket.SocketKind) -> None:
    messages = (b"one", b"", b"three", bytes(60_000), b"last")
    if kind == socket.SOCK_SEQPACKET:
        messages = tuple(filter(None, messages))

    def check() -> None:
        with _own(3) as left, _own(4) as right:
            assert [right.recv(100_000) for _ in messages] == list(messages)
            with pytest.raises(BlockingIOError):
                right.recv(1)
            assert left.recv(10) == b"back"
            right.send(b"again")
            assert left.recv(10) == b"again"
            assert left.getsockopt(socket.SOL_SOCKET, lib.SO_PEEK_OFF) == -1

    table = round_trip(_pair_of(kind, *messages), check, twice=False)
    assert record(table, 4).messages == messages


def test_a_pair_of_streams_keeps_a_full_queue() -> None:
    def body() -> None:
        left, right = socket.socketpair()
        left.setblocking(False)
        sent = 0
        try:
            while True:
                sent += left.send(bytes([sent % 251]) * 5000)
        except BlockingIOError:
            body.sent = sent  # type: ignore[attr-defined]
        left.detach()
        right.detach()

    def check() -> None:
        total = 0
        while total < expected:
            total += len(os.read(4, 1 << 20))
        os.write(3, b"end")
        assert os.read(4, 10) == b"end"

    with child(body) as original:
        table = original.survey()
    (queue,) = record(table, 4).messages
    expected = len(queue)
    assert expected > 100_000
    with restored(table, check) as copy:
        assert record(copy.survey(), 4).messages == (queue,)
        copy.go()


def test_half_closed_and_orphaned_pairs() -> None:
    def body() -> None:
        left, right = socket.socketpair()  # 3, 4
        left.send(b"before")
        left.shutdown(socket.SHUT_WR)
        orphan, gone = socket.socketpair()  # 5
        gone.send(b"last words")
        gone.close()
        reset, gone = socket.socketpair()  # 6
        reset.send(b"never read")
        gone.close()
        for one in (left, right, orphan, reset):
            one.detach()

    def check() -> None:
        assert os.read(4, 10) == b"before"
        assert os.read(4, 10) == b""
        os.write(4, b"answer")
        assert os.read(3, 10) == b"answer"
        with pytest.raises(BrokenPipeError):
            os.write(3, b"x")
        assert os.read(5, 20) == b"last words"
        assert os.read(5, 20) == b""
        with pytest.raises(BrokenPipeError):
            os.write(5, b"x")
        with pytest.raises(ConnectionResetError):
            os.read(6, 1)

    table = round_trip(body, check)
    assert isinstance(record(table, 5), UnixPair)


def test_a_socket_to_outside_is_replaced_only_as_standard_stream() -> None:
    ours, theirs = socket.socketpair()
    os.dup2(theirs.fileno(), 4100)

    def standard() -> None:
        os.dup2(4100, 0)
        os.dup2(4100, 1)
        os.close(4100)

    def elsewhere() -> None:
        os.dup2(4100, 9)
        os.close(4100)

    try:
        with child(standard) as original:
            assert record(original.survey(), 1) == ExternalPipe(os.O_RDWR, "Unix socket")
        with child(elsewhere) as original:
            (complaint,) = original.survey().unsupported
            assert complaint.startswith("fd 9 (socket:[") and f"of process {os.getpid()}" in complaint
    finally:
        os.close(4100)
        ours.close()
        theirs.close()


def test_options_of_datagram_sockets_are_read_back() -> None:
    def body() -> None:
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 3, 0))
        one.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 9)
        one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        one.setsockopt(socket.SOL_SOCKET, 29, 1)  # SO_TIMESTAMP
        one.setsockopt(socket.SOL_SOCKET, 37, 1 << 3 | 1 << 4)  # SO_TIMESTAMPING: of software, received
        one.setsockopt(socket.SOL_SOCKET, 60, 1)  # SO_ZEROCOPY
        one.setsockopt(socket.SOL_SOCKET, 61, struct.pack("iI", 11, 0))  # SO_TXTIME, CLOCK_TAI
        one.setsockopt(socket.IPPROTO_IP, 49, 0)  # IP_MULTICAST_ALL
        one.detach()

    assert len(record(round_trip(body), 3).options) == 10


def test_multicast_groups_are_joined_again() -> None:
    four = struct.pack("4s4si", socket.inet_aton("239.1.2.3"), bytes(4), 1)
    six = struct.pack("16si", socket.inet_pton(socket.AF_INET6, "ff15::7"), 1)

    def body() -> None:
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, four)
        both = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, six)
        both.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, four)
        one.detach()
        both.detach()

    def check() -> None:
        with _own(3) as one, _own(4) as both:
            one.setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, four)
            both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_LEAVE_GROUP, six)
            both.setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, four)

    round_trip(body, check)

    def some() -> None:
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        source = socket.inet_aton("239.1.2.3") + socket.inet_aton("127.0.0.1") * 2
        one.setsockopt(socket.IPPROTO_IP, 39, source)  # IP_ADD_SOURCE_MEMBERSHIP
        one.detach()

    with child(some) as original:
        (complaint,) = original.survey().unsupported
        assert complaint.endswith("in a multicast group for some sources only")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET, socket.AF_INET6])
def test_every_option_that_is_read_can_be_set(family: socket.AddressFamily, kind: socket.SocketKind) -> None:
    """To another value than a fresh socket's, where the kernel takes one."""

    def body() -> None:
        one = socket.socket(family, kind)
        for (level, name), value in socket_options._read(one).items():
            if len(value) == 4 and name not in (socket.SO_MARK, lib.SO_BUF_LOCK):
                for other in (1, 0, 1500):
                    with suppress(OSError):
                        one.setsockopt(level, name, other)
                    if one.getsockopt(level, name, 64) != value:
                        break
        one.detach()

    assert len(record(round_trip(body), 3).options) >= (10 if family == socket.AF_UNIX else 30)
