"""Listening sockets that a copy shall have elsewhere: on another port, or in place of which it gets the caller's.

Facts. Two processes listen on one TCP port only if both set SO_REUSEPORT before bind(), with the same user id; the
kernel then spreads the connections over them (socket(7)). An open file description, and so a socket, can be in several
processes at once; O_NONBLOCK belongs to it and is thus the same for all of them. systemd hands over sockets from
descriptor 3 on, LISTEN_FDS of them, to the process whose id is LISTEN_PID (sd_listen_fds(3)).

Choice. The record is changed before the program is compiled, or the item is left out and the handed-over descriptor is
moved in its place, so what knows the number (an epoll) finds it there.

Cost. The caller's socket gets the flags that the process's had.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeGuard

import msgspec

from lazyrestore.errors import RestoreError
from lazyrestore.resources import inet_socket
from lazyrestore.resources.inet_socket import TcpListener
from lazyrestore.resources.unix_socket import UnixSocket

if TYPE_CHECKING:
    from lazyrestore.resources.descriptors import FdTable

Listener = TcpListener | UnixSocket
FIRST_OF_SYSTEMD = 3


def is_listener(record: object) -> TypeGuard[Listener]:
    return isinstance(record, TcpListener) or (isinstance(record, UnixSocket) and record.backlog is not None)


def listeners(table: FdTable) -> dict[int, Listener]:
    """The lowest number of each listening socket → its record."""
    found: dict[int, Listener] = {}
    for index, numbers in sorted(table.numbers().items()):
        record = table.descriptions[index]
        if is_listener(record):
            found[numbers[0]] = record
    return found


def ports_of(table: FdTable) -> list[int]:
    """The TCP ports that the process listens on, sorted."""
    return sorted({inet_socket.port_of(record) for record in table.descriptions if isinstance(record, TcpListener)})


def replaced(table: FdTable, inherited: Iterable[int]) -> dict[int, int]:
    """Description → which of its numbers the caller's socket replaces. RestoreError unless each is a listener."""
    by_number = {descriptor.number: descriptor.description for descriptor in table.descriptors}
    found: dict[int, int] = {}
    for number in inherited:
        index = by_number.get(number)
        if index is None or not is_listener(table.descriptions[index]):
            known = ", ".join(map(str, listeners(table))) or "none"
            raise RestoreError(f"fd {number}", "inherit", "it is no listening socket", f"listening sockets: fd {known}")
        found[index] = number
    return found


def check_given(table: FdTable, given: Mapping[int, int]) -> None:
    """RestoreError unless each number → descriptor of ours is a listening socket → one of its kind. One of another
    address family of the Internet will do: systemd's are often IPv6 ones that take IPv4, too."""
    for index, number in replaced(table, given).items():
        record, ours = table.descriptions[index], given[number]
        unix = isinstance(record, UnixSocket)
        wanted = record.kind if isinstance(record, UnixSocket) else socket.SOCK_STREAM
        reason = ""
        try:
            with socket.socket(fileno=os.dup(ours)) as found:
                if (found.family == socket.AF_UNIX, found.type) != (unix, wanted):
                    reason = "is a socket of another kind"
                elif not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    reason = "is a socket that does not listen"
        except OSError as error:
            reason = f"is no socket: {os.strerror(error.errno or 0)}"
        if reason:
            kind = "Unix" if unix else "TCP"
            raise RestoreError(f"fd {number}", "inherit", f"descriptor {ours} {reason}", f"give it a {kind} listener")


def host_at(table: FdTable, port: int) -> str:
    """Where to connect to the process's TCP port: an address of its own, else 127.0.0.1."""
    for record in table.descriptions:
        if isinstance(record, TcpListener) and inet_socket.port_of(record) == port:
            host = inet_socket.host_of(record)
            return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return "127.0.0.1"


def rebind(table: FdTable, ports: Mapping[int, int], *, reuse_port: bool = False) -> FdTable:
    """The same table with TCP listeners on other ports (old → new), all with SO_REUSEPORT if wanted. RestoreError."""
    known = ports_of(table)
    for port in ports:
        if port not in known:
            there = ", ".join(map(str, known)) or "none"
            raise RestoreError(
                f"TCP port {port}", "listen", "the process does not listen on it", f"it does on: {there}"
            )
    return msgspec.structs.replace(
        table,
        descriptions=tuple(
            inet_socket.rebind(record, ports, reuse_port=reuse_port) if isinstance(record, TcpListener) else record
            for record in table.descriptions
        ),
    )


def from_systemd(environment: Mapping[str, str], pid: int) -> list[int]:
    """The descriptors that systemd has handed to process `pid`, in order; none if it has handed them to another."""
    if environment.get("LISTEN_PID") != str(pid):
        return []
    try:
        count = int(environment.get("LISTEN_FDS", "0"))
    except ValueError:
        return []
    handed = range(FIRST_OF_SYSTEMD, FIRST_OF_SYSTEMD + count)
    return [number for number in sorted(map(int, os.listdir("/proc/self/fd"))) if number in handed and _is_open(number)]


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
