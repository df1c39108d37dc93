"""Waiting for a lock of the store: who wants to know is told, after a moment, and by whom it is held.

Facts. A signal ends a wait in fcntl() and flock(), so Ctrl-C does. No system call says who has a lock of an open file
description; /proc/PID/fdinfo/N lists the locks of that description (proc(5)).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

MOMENT = 1.0  # seconds: longer than whoever holds a lock briefly needs

told: Callable[[str], None] | None = None  # who is told, once; nobody in a library


def tell(listener: Callable[[str], None]) -> None:
    """From now on `listener` is called, with one line and from a thread of its own, when a wait takes longer."""
    global told
    told = listener


@contextlib.contextmanager
def patience(resource: str, descriptor: int, lock: str) -> Iterator[None]:
    """Around a wait for a lock on that file; lock: a pattern of what /proc/PID/fdinfo says of it, "FLOCK" or so."""
    if told is None:
        yield
        return
    timer = threading.Timer(MOMENT, _tell, (resource, os.fstat(descriptor), lock))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _tell(resource: str, file: os.stat_result, lock: str) -> None:
    global told
    listener, told = told, None
    if listener is not None:
        with contextlib.suppress(OSError):
            listener(f"{resource}: waiting for {_holder(file, lock)}, which writes to it; Ctrl-C gives up")


def _holder(file: os.stat_result, lock: str) -> str:
    """The process that has the lock, as far as we may look."""
    import re  # nobody waits in most processes

    pattern = re.compile(rf"^lock:.*{lock}", re.MULTILINE)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it is somebody else's, or has ended
            for number in os.listdir(f"/proc/{pid}/fd"):
                if _is(f"/proc/{pid}/fd/{number}", file) and pattern.search(_read(f"/proc/{pid}/fdinfo/{number}")):
                    stopped = re.search(r"^State:\s+T", _read(f"/proc/{pid}/status"), re.MULTILINE)
                    return f"process {pid} (stopped)" if stopped else f"process {pid}"
    return "another process"


def _is(path: str, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), file)
    except FileNotFoundError:  # a socket, or closed meanwhile
        return False


def _read(path: str) -> str:
    with open(path, errors="replace") as file:
        return file.read()
