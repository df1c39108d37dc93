"""Addresses that sockets of a new process will be bound to: whether they can be had, before it is started.

Knows no record of a snapshot, so that a restore by a stored plan needs no kind of socket but this.
"""

from __future__ import annotations

import os
import socket
import stat as modes
from errno import EADDRINUSE, EADDRNOTAVAIL, ECONNREFUSED

from lazyrestore.errors import RestoreError
from lazyrestore.restore_plan import Address

_SHARED = (socket.SOL_SOCKET, socket.SO_REUSEPORT, (1).to_bytes(4, "little"))


def make_free(address: Address) -> None:
    """Find out whether it can be had; unlink a stale socket file. RestoreError if somebody has it."""
    if address.host:
        _check_host(address)
    elif address.file is None:
        _check_name(address)
    else:
        _make_file_free(address, os.fsdecode(address.file))


def _check_host(address: Address) -> None:
    with socket.socket(address.family, address.kind, address.protocol) as probe:
        for level, name, value in address.options:
            probe.setsockopt(level, name, value)
        try:
            probe.bind(address.host)
        except OSError as error:
            advice = ""
            if error.errno == EADDRINUSE and _SHARED in address.options:
                advice = (
                    "whoever has it (the original?) does not share it (SO_REUSEPORT); end that process, or restore "
                    "with --listen, --inherit-fd or --net new (listen, inherit_fd, new_net)"
                )
            elif error.errno == EADDRINUSE:
                advice = (
                    "end the process that has it (the original, or another copy?), wait for its last connections, or "
                    "restore with --listen, --reuseport, --inherit-fd or --net new (listen, reuseport, inherit_fd, "
                    "new_net)"
                )
            elif error.errno == EADDRNOTAVAIL:
                advice = "this machine has no such address"
            raise RestoreError(address.title, "bind", errno=error.errno, advice=advice) from error


def _check_name(address: Address) -> None:
    with socket.socket(address.family, address.kind) as probe:
        try:
            probe.bind(address.name)
        except OSError as error:
            if error.errno == EADDRINUSE:
                raise _taken(address) from error
            raise RestoreError(address.title, "bind", errno=error.errno) from error


def _make_file_free(address: Address, path: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(path)):
            raise RestoreError(address.title, "bind", f"no directory {os.path.dirname(path)}", "create it") from None
        return
    if not modes.S_ISSOCK(found.st_mode):
        raise RestoreError(address.title, "bind", f"{path} is no socket now", "move it away and try again")
    if _is_bound(path):
        raise _taken(address)
    os.unlink(path)


def _taken(address: Address) -> RestoreError:
    advice = "end the process that has it (the original, or another copy?) and try again"
    return RestoreError(address.title, "bind", errno=EADDRINUSE, advice=advice)


def _is_bound(path: str) -> bool:
    """Whether a socket of any kind is bound to the file, in whatever network namespace."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probe:
            return probe.connect_ex(f"/proc/self/fd/{descriptor}") != ECONNREFUSED
    finally:
        os.close(descriptor)
