"""What waits in pairs of Unix sockets: kept with what belongs to it, or refused and left as it was."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest
from resources.interpreter import child, round_trip

from lazyrestore._native import _core

lib = _core.lib


def _reset() -> list[socket.socket]:
    """Packets, behind the error that the other end left when it was closed with something unread."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left.send(b"one")
    right.send(b"never read")
    left.close()
    return [right]


def _urgent() -> list[socket.socket]:
    left, right = socket.socketpair()
    left.send(b"abc")
    left.send(b"X", socket.MSG_OOB)
    return [left, right]


def _credentials() -> list[socket.socket]:
    left, right = socket.socketpair()
    right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    left.send(b"who")
    return [left, right]


def _hidden() -> list[socket.socket]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for message in (b"", b"one", bytes(60_000), b""):
        left.send(message)
    assert right.recv(10, socket.MSG_PEEK) == b""
    return [left, right]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (_reset, "an error (ECONNRESET) waits in it"),
        (_urgent, "an urgent byte (MSG_OOB)"),
        (_credentials, "credentials"),
        (_hidden, "an empty datagram"),
    ],
    ids=["reset", "urgent", "credentials", "hidden"],
)
def test_what_waits_in_a_pair_and_would_be_lost_is_refused(
    make: Callable[[], list[socket.socket]], complaint: str
) -> None:
    """And is there as before: a look at packets would take the error away."""

    def body() -> None:
        for one in make():
            one.setblocking(False)
            one.detach()

    def check() -> None:
        with socket.socket(fileno=4) as right:
            if make is _reset:
                with pytest.raises(ConnectionResetError):
                    right.recv(10)
                assert right.recv(10) == b"one"
            elif make is _urgent:
                assert right.recv(10) == b"abc"
                assert right.recv(1, socket.MSG_OOB) == b"X"

    with child(body, check) as original:
        for _ in range(2):
            (found,) = original.survey().unsupported
            assert found.startswith("fd 4 (socket:[") and complaint in found
        original.go()


def test_a_reset_that_was_not_read_stays_one() -> None:
    def body() -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        right.send(b"never read")
        left.close()
        os.dup2(right.fileno(), 5)

    def check() -> None:
        with pytest.raises(ConnectionResetError):
            os.read(5, 10)
        assert os.read(5, 10) == b""

    round_trip(body, check)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_place_to_peek_at_stays(kind: socket.SocketKind) -> None:
    def body() -> None:
        left, right = socket.socketpair(socket.AF_UNIX, kind)
        left.send(b"0123456789")
        right.setsockopt(socket.SOL_SOCKET, lib.SO_PEEK_OFF, 0)
        assert right.recv(3, socket.MSG_PEEK) == b"012"
        left.detach()
        right.detach()

    def check() -> None:
        with socket.socket(fileno=4) as right:
            assert right.recv(10, socket.MSG_PEEK) == b"3456789"
            assert right.recv(10) == b"0123456789"

    round_trip(body, check)


def test_a_datagram_socket_that_was_shut_down_and_left_alone() -> None:
    def body() -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        left.send(b"last")
        right.shutdown(socket.SHUT_WR)
        left.close()
        os.dup2(right.fileno(), 5)

    def check() -> None:
        with pytest.raises(BrokenPipeError):
            os.write(5, b"x")
        assert os.read(5, 10) == b"last"

    round_trip(body, check)
