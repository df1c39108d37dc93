"""READY=1 from a restored process, at the socket that its environment names.

Facts (sd_notify(3), unix(7)). A service says READY=1 in a datagram to the Unix socket in $NOTIFY_SOCKET: a path, or "@"
and an abstract name. The variable is read when it is used, so it cannot be changed for a process that runs; its first
value stands in memory at the process's env_start. A path of a Unix socket leads to an inode, so a socket that is
bind-mounted over another's path is the one that is met there.

Choice. We listen at the very address that the process was started with, if nobody else does. Under systemd somebody
does (/run/systemd/notify): in a mount namespace of its own (`--pid new`) the copy finds our socket mounted over it.

Cost. Whoever reaches the address can end the recording early. A process that connected its socket long ago (few do)
still talks to who listened then. Only a READY=1 that comes after the restore is met: a service that has said it before
its snapshot says it again only if it is made to (systemd's notify-reload).
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Self

from lazyrestore.errors import RestoreError
from lazyrestore.manifest import Manifest
from lazyrestore.store import StoredImage

VARIABLE = b"NOTIFY_SOCKET"
LONGEST_MESSAGE = 4096  # systemd's own limit (NOTIFY_BUFFER_MAX)
LOOK_SECONDS = 0.1  # how soon the end of the process is noticed


def address_in(manifest: Manifest, image: StoredImage) -> str:
    """The NOTIFY_SOCKET that the process was started with, "" if it had none. Raises ChunkInvalid."""
    memory = manifest.attributes.memory
    for entry in image.read(memory.env_start, memory.env_end - memory.env_start).split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == VARIABLE:
            return os.fsdecode(value)
    return ""


class ReadySocket:
    """Listens where a restored process will say READY=1. close() it, or use it as a context manager.

    mounts: what the process must find in its mount namespace, (path of ours, path that it is mounted over).
    """

    def __init__(self, name: str, manifest: Manifest, image: StoredImage, *, own_mounts: bool) -> None:
        """own_mounts: the process gets a mount namespace of its own. Raises RestoreError, ChunkInvalid."""
        self.mounts: tuple[tuple[str, str], ...] = ()
        self._what = f"snapshot {name}"
        self._owned = ExitStack()
        address = address_in(manifest, image)
        if not address:
            raise self._error("the process was started without NOTIFY_SOCKET in its environment")
        if address[0] not in "@/":
            raise self._error(f"NOTIFY_SOCKET={address} is neither a path nor an abstract name")
        self._socket = self._owned.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        try:
            if address[0] == "@":
                self._socket.bind("\0" + address[1:])
            else:
                self._bind(manifest.attributes.root.rstrip("/") + address, own_mounts)
        except OSError as error:
            self.close()
            advice = ""
            if error.errno == errno.EADDRINUSE:
                advice = "somebody else listens there, or did; " + (
                    "end that one" if address[0] == "@" else "remove it, or restore with --pid new (new_pid=True)"
                )
            raise RestoreError(self._what, f"listen at {address}", errno=error.errno, advice=advice) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more."""
        self._owned.close()

    def wait(self, ended: Callable[[], int | None], timeout: float | None = None) -> None:
        """Wait for READY=1. `ended`: the process's exit status, None while it runs.

        Raises RestoreError if it ends first, TimeoutError after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        while True:
            left = LOOK_SECONDS if deadline is None else min(LOOK_SECONDS, deadline - time.monotonic())
            status = ended()  # asked first: what it said before it ended is still to be read
            if poller.poll(max(0, left) * 1000):
                # Descriptors that come along (FDSTORE=1, BARRIER=1) are closed, which lets a barrier's sender go on.
                if b"READY=1" in self._socket.recv(LONGEST_MESSAGE).split(b"\n"):
                    return
            elif status is not None:
                raise self._error(f"the process ended with {status} before it said READY=1", step="wait")
            elif left <= 0:
                raise TimeoutError(f"no READY=1 within {timeout} s")

    def _bind(self, path: str, own_mounts: bool) -> None:
        """At the path, or where it can be mounted over it."""
        try:
            self._socket.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not own_mounts:
                raise
            folder = tempfile.mkdtemp(prefix="lazyrestore-")
            self._owned.callback(shutil.rmtree, folder, ignore_errors=True)
            self.mounts = ((f"{folder}/notify", path),)
            path = self.mounts[0][0]
            self._socket.bind(path)
        self._owned.callback(_remove, path)
        os.chmod(path, 0o666)  # as systemd's: the process may be anybody

    def _error(self, reason: str, step: str = "listen for READY=1") -> RestoreError:
        return RestoreError(self._what, step, reason)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
