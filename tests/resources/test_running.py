"""The look at a running process, before it is frozen: what it closes or ends meanwhile is no reason to refuse it."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyrestore.resources import descriptors, threads

_PTRACE_SEIZE, _WALL = 0x4206, 0x40000000
_THREAD = """
import signal, sys, threading
def run():
    print(threading.get_native_id(), flush=True)
    sys.stdin.readline()
threading.Thread(target=run).start()
signal.pause()
"""
_libc = ctypes.CDLL(None, use_errno=True)


def _complaints(number: int, change: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of `number` of this process, when `change` comes between finding the first descriptors and looking
    at them."""
    group = descriptors._group
    changes = [change]

    def and_change(*arguments: object) -> object:
        views = group(*arguments)  # type: ignore[arg-type]
        if changes:
            changes.pop()()
        return views

    pidfd = os.pidfd_open(os.getpid())
    try:
        with monkeypatch.context() as patch:
            patch.setattr(descriptors, "_group", and_change)
            found = descriptors.lasting_complaints(os.getpid(), pidfd)
    finally:
        os.close(pidfd)
    return [line for line in found if line.startswith(f"fd {number} ")]


@pytest.mark.parametrize("how", ["close", "unregister"])
def test_an_epoll_whose_connection_is_closed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with select.epoll() as epoll, socket.socket() as sock:
        epoll.register(sock, select.EPOLLIN)
        change = sock.close if how == "close" else lambda: epoll.unregister(sock)
        assert _complaints(epoll.fileno(), change, monkeypatch) == []


def test_an_epoll_that_watches_a_closed_connection_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with select.epoll() as epoll, socket.socket() as sock:
        number, inode = sock.fileno(), os.fstat(sock.fileno()).st_ino
        epoll.register(sock, select.EPOLLIN)
        kept = os.dup(number)
        sock.close()
        (complaint,) = _complaints(epoll.fileno(), lambda: None, monkeypatch)
        assert complaint.endswith(f"it still watches a closed file that was descriptor {number} (inode {inode})")
        os.close(kept)


def test_a_pair_that_another_thread_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look sees one end only, as when it comes between the two numbers of a new pair."""
    left, right = socket.socketpair()
    accesses = []

    def forget(survey: descriptors.Survey, *arguments: object) -> object:
        views = group(survey, *arguments)  # type: ignore[arg-type]
        if not accesses:
            accesses.append(survey.accesses.pop((os.fstat(left.fileno()).st_dev, os.fstat(left.fileno()).st_ino)))
        return views

    group = descriptors._group
    pidfd = os.pidfd_open(os.getpid())
    with left, right, monkeypatch.context() as patch:
        patch.setattr(descriptors, "_group", forget)
        found = descriptors.lasting_complaints(os.getpid(), pidfd)
        assert accesses
        assert [line for line in found if line.startswith(f"fd {right.fileno()} ")] == []
    os.close(pidfd)


def test_a_number_that_means_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as other:
        assert _complaints(sock.fileno(), lambda: os.dup2(other.fileno(), sock.fileno()), monkeypatch) == []
    with socket.socket() as sock, open("/dev/null", "rb") as file:
        assert _complaints(sock.fileno(), lambda: os.dup2(file.fileno(), sock.fileno()), monkeypatch) == []


def test_a_file_that_is_deleted_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with path.open("w") as file:
        number = file.fileno()

        def change() -> None:
            path.unlink()
            file.close()

        assert _complaints(number, change, monkeypatch) == []


def test_a_file_that_is_deleted_and_kept_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with path.open("w") as file:
        path.unlink()
        (complaint,) = _complaints(file.fileno(), lambda: None, monkeypatch)
        assert "path" in complaint


def test_a_thread_that_ends() -> None:
    """It has given back its descriptor table, directory and namespaces: they are not ones of its own."""
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen([sys.executable, "-c", _THREAD], stdin=pipe, stdout=pipe, stderr=null) as process:
        assert process.stdin and process.stdout
        tid = int(process.stdout.readline())
        try:
            # A traced thread stays as it ends until its tracer has heard of it.
            assert _libc.ptrace(_PTRACE_SEIZE, tid, None, None) == 0, os.strerror(ctypes.get_errno())
            process.stdin.write(b"\n")
            process.stdin.flush()
            os.waitid(os.P_PID, tid, os.WEXITED | os.WNOWAIT | _WALL)
            pidfd = os.pidfd_open(process.pid)
            assert threads.unsupported(process.pid) == []
            assert descriptors.survey(process.pid, pidfd).unsupported == []
            os.close(pidfd)
        finally:
            process.kill()
            os.waitpid(tid, _WALL)  # else the process would stay, too
