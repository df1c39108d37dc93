"""Holds what cannot be restored (yet). usage: unsupported.py CONTROL_SOCKET KIND... Every request gets "here"."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import sys

import control

libc = ctypes.CDLL(None, use_errno=True)
keep: list[object] = []


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def connection() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    keep.extend([listener, client, listener.accept()])


def child() -> None:
    if os.fork() == 0:
        while True:
            signal.pause()


def io_uring() -> None:
    check(libc.syscall(425, 8, ctypes.create_string_buffer(120)))


def inotify() -> None:
    check(libc.inotify_init1(0))


def deleted_file() -> None:
    keep.append(open("deleted", "w"))  # noqa: SIM115
    os.unlink("deleted")


def pseudo_terminal() -> None:
    keep.append(os.openpty())


def raw_socket() -> None:
    keep.append(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))


def lease() -> None:
    file = open("leased", "w")  # noqa: SIM115
    keep.append(file)
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)


def perf_event() -> None:
    attributes = (1).to_bytes(4, "little") + (112).to_bytes(4, "little") + bytes(104)
    check(libc.syscall(298, attributes, 0, -1, -1, 0))


def deleted_cwd() -> None:
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")


KINDS = {
    "connection": connection,
    "child": child,
    "io_uring": io_uring,
    "inotify": inotify,
    "deleted-file": deleted_file,
    "pseudo-terminal": pseudo_terminal,
    "raw-socket": raw_socket,
    "lease": lease,
    "perf-event": perf_event,
    "deleted-cwd": deleted_cwd,  # after those that make files in it
}
for kind in sys.argv[2:]:
    KINDS[kind]()
control.serve(sys.argv[1], lambda request: "here")
