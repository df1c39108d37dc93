"""What the kernel tells of Unix sockets through NETLINK_SOCK_DIAG: state, peer, backlog, bound inode.

Facts. A request names one socket by its inode (a reply carries exactly that one) or asks for a dump of the network
namespace. Nothing else tells who the other end of a socketpair is. Attributes: NAME 0, VFS 1 (inode, device in the
kernel's encoding), PEER 2 (inode), ICONS 3, RQLEN 4 (a listener: connections waiting, backlog; else: bytes to read,
bytes written), MEMINFO 5, SHUTDOWN 6 (1: reading, 2: writing ended). Sockets of other network namespaces are not
found. Source: sock_diag(7), include/uapi/linux/unix_diag.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")
_MESSAGE = struct.Struct("=BBBBIII")

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_SHOW_NAME, _SHOW_VFS, _SHOW_PEER, _SHOW_RQLEN = 0x1, 0x2, 0x4, 0x10
_ANY = 0xFFFFFFFF

LISTEN = 10
ESTABLISHED = 1


class UnixSocket(NamedTuple):
    """One socket. peer: the other end's inode, 0 if it has none (any more); bound: (device, inode) of its socket
    file, None if it has none; shutdown: 1 reading, 2 writing, or both; waiting and backlog are a listener's.
    """

    inode: int
    type: int
    state: int
    name: bytes
    bound: tuple[int, int] | None
    peer: int
    waiting: int
    backlog: int
    shutdown: int

    @property
    def in_flight(self) -> int:
        """What it has sent and nobody has read yet, as the kernel accounts for it; not of a listener."""
        return self.backlog


class UnixDiag:
    """An open NETLINK_SOCK_DIAG socket; a context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)

    def __enter__(self) -> UnixDiag:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def find(self, inode: int) -> UnixSocket | None:
        """The socket with that inode, None if this network namespace has none. OSError without unix_diag."""
        self._ask(_NLM_F_REQUEST, 0, inode)
        return next(self._replies(), None)

    def all(self) -> list[UnixSocket]:
        """All Unix sockets of this network namespace. OSError."""
        self._ask(_NLM_F_REQUEST | _NLM_F_DUMP, _ANY, 0)
        return list(self._replies())

    def _ask(self, flags: int, states: int, inode: int) -> None:
        show = _SHOW_NAME | _SHOW_VFS | _SHOW_PEER | _SHOW_RQLEN
        request = _REQUEST.pack(socket.AF_UNIX, 0, 0, states, inode, show, _ANY, _ANY)
        header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, flags, 1, 0)
        self._socket.send(header + request)

    def _replies(self) -> Iterator[UnixSocket]:
        while True:
            packet = self._socket.recv(1 << 17)
            at = 0
            while at < len(packet):
                length, kind, flags, _, _ = _HEADER.unpack_from(packet, at)
                body = packet[at + _HEADER.size : at + length]
                at += length + 3 & ~3
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    (number,) = struct.unpack_from("=i", body)
                    if number == -2:  # ENOENT
                        return
                    raise OSError(-number, os.strerror(-number))
                yield _parse(body)
                if not flags & 2:  # NLM_F_MULTI: part of a dump
                    return


def _parse(body: bytes) -> UnixSocket:
    _, kind, state, _, inode, _, _ = _MESSAGE.unpack_from(body)
    attributes: dict[int, bytes] = {}
    at = _MESSAGE.size
    while at + 4 <= len(body):
        length, number = struct.unpack_from("=HH", body, at)
        attributes[number] = body[at + 4 : at + length]
        at += max(length + 3 & ~3, 4)
    bound = None
    if 1 in attributes:
        bound_inode, device = struct.unpack("=II", attributes[1])
        bound = (os.makedev(device >> 20, device & 0xFFFFF), bound_inode)
    waiting, backlog = struct.unpack("=II", attributes.get(4, bytes(8)))
    (peer,) = struct.unpack("=I", attributes.get(2, bytes(4)))
    return UnixSocket(
        inode, kind, state, attributes.get(0, b""), bound, peer, waiting, backlog, attributes.get(6, b"\0")[0]
    )
