"""A reporter (tests/victims/reporter.py) that also holds some of what a restore has to make."""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "victims"))

import reporter

THREADS = 3


def main() -> None:
    waited = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT}  # by the reporter, in the main thread
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    held: list[object] = [mmap.mmap(-1, 1 << 20), os.pipe(), os.pipe2(os.O_NONBLOCK), socket.socketpair()]
    held[0][:5] = b"first"  # type: ignore[index]
    memfd = os.memfd_create("soak")
    os.ftruncate(memfd, 1 << 20)
    shared = mmap.mmap(memfd, 1 << 20)
    shared[:4] = b"soak"
    queue = select.epoll()
    event = os.eventfd(1)
    queue.register(event, select.EPOLLIN)
    listening = socket.create_server(("127.0.0.1", 0))
    beside = socket.socket(socket.AF_UNIX)
    beside.bind("")
    beside.listen()
    held += [shared, queue, event, listening, beside, os.open(__file__, os.O_RDONLY), os.open(".", os.O_RDONLY)]
    for _ in range(THREADS):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    reporter.main()


if __name__ == "__main__":
    main()
