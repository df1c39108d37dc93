"""Holds what cannot be restored (yet). usage: unsupported.py CONTROL_SOCKET KIND... Every request gets "here"."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable

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


def in_a_thread(change: Callable[[], object]) -> int:
    """The id of a thread that has made the change to itself, and stays."""
    changed = threading.Event()
    failures: list[OSError] = []

    def run() -> None:
        try:
            change()
        except OSError as error:
            failures.append(error)
        changed.set()
        threading.Event().wait()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    changed.wait()
    if failures:
        raise failures[0]
    assert thread.native_id is not None
    return thread.native_id


def thread_seccomp() -> None:
    allow = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000))  # BPF_RET: SECCOMP_RET_ALLOW
    program = struct.pack("=H6xQ", 1, ctypes.addressof(allow))
    in_a_thread(lambda: check(libc.prctl(22, 2, program)))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def thread_network() -> None:
    in_a_thread(lambda: check(libc.unshare(0x40000000)))  # CLONE_NEWNET


def thread_place() -> None:
    in_a_thread(lambda: check(libc.unshare(0x200)))  # CLONE_FS


def thread_deadline() -> None:
    attributes = struct.pack("=IIQiIQQQ", 48, 6, 0, 0, 0, 1000000, 100000000, 100000000)  # SCHED_DEADLINE
    in_a_thread(lambda: check(libc.syscall(314, 0, attributes, 0)))


def thread_file() -> None:
    keep.append(os.open(f"/proc/self/task/{in_a_thread(lambda: None)}/comm", os.O_RDWR))


def odd_name() -> None:
    with open("shared (deleted)", "wb+") as file:
        file.truncate(4096)
        keep.append(mmap.mmap(file.fileno(), 4096))


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
    "thread-seccomp": thread_seccomp,
    "thread-network": thread_network,
    "thread-place": thread_place,
    "thread-deadline": thread_deadline,
    "thread-file": thread_file,
    "odd-name": odd_name,
    "deleted-cwd": deleted_cwd,  # after those that make files in it
}
for kind in sys.argv[2:]:
    KINDS[kind]()
control.serve(sys.argv[1], lambda request: "here")
