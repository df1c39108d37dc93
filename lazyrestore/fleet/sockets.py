"""Listening sockets of its own for each clone: any number of clones of one server beside each other.

Facts. bind() to port 0 takes a free port, to an empty Unix name a free abstract one (ip(7), unix(7)). A connection that
comes before the server calls accept() waits in the backlog. A listening socket lives until its last descriptor is
closed, so one whose only holder is a clone refuses connections as soon as the clone is gone.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass

from lazyrestore.resources import inet_socket, listeners
from lazyrestore.resources.descriptors import FdTable
from lazyrestore.resources.inet_socket import TcpListener
from lazyrestore.resources.listeners import Listener


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listening socket is to be reached."""

    family: int
    kind: int
    name: object  # as the socket module has it

    def connect(self, timeout: float | None = None) -> socket.socket:
        """A connection. OSError."""
        connection = socket.socket(self.family, self.kind)
        try:
            connection.settimeout(timeout)
            connection.connect(self.name)  # type: ignore[arg-type]
        except BaseException:
            connection.close()
            raise
        return connection


def make(table: FdTable, without: Collection[int], owned: ExitStack) -> dict[int, socket.socket]:
    """A fresh socket for each listening one of the table, by its lowest number; `without` are left out. OSError."""
    made: dict[int, socket.socket] = {}
    for number, record in listeners.listeners(table).items():
        if number not in without:
            made[number] = owned.enter_context(_like(record))
    return made


def address_of(listening: socket.socket) -> Address:
    return Address(listening.family, listening.type, listening.getsockname())


def _like(record: Listener) -> socket.socket:
    if isinstance(record, TcpListener):
        made = socket.socket(record.family, socket.SOCK_STREAM, record.protocol)
        host = inet_socket.host_of(record)
        name: object = (host, 0)
    else:
        made = socket.socket(socket.AF_UNIX, record.kind)
        name = b""
    try:
        made.bind(name)  # type: ignore[arg-type]
        made.listen(record.backlog or 0)
    except BaseException:
        made.close()
        raise
    return made
