"""What commands have in common that are run by click, or without it: the store, output, errors, signals."""

from __future__ import annotations

import errno
import os
import sys
from typing import TextIO

from lazyrestore.errors import LazyrestoreError

INTERRUPTED = 130  # the exit status, 128 + SIGINT


def default_store() -> str:
    """The store that is used when none is named: per user, root's in /var/lib."""
    if os.geteuid() == 0:
        return "/var/lib/lazyrestore"
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(base, "lazyrestore")


def say(text: str, stream: TextIO | None = None) -> None:
    """A line of output, written at once. Raises OSError if it cannot be."""
    print(text, file=stream, flush=True)


def to_json(value: object) -> str:
    """One line of JSON. Its module is imported here, since most calls are not for programs."""
    import json

    return json.dumps(value)


def failed(error: BaseException, *, debug: bool) -> int:
    """Say in one line why a command ended, with a traceback if wanted; returns the exit status."""
    if debug:
        import traceback

        traceback.print_exc()
    if isinstance(error, KeyboardInterrupt):
        text, status = "interrupted", INTERRUPTED
    elif isinstance(error, LazyrestoreError):
        text, status = str(error), error.exit_status
    elif isinstance(error, OSError):
        large = error.errno == errno.EFBIG  # memory files are files too
        text, status = f"{error}{'; raise the limit on file sizes: ulimit -f unlimited' if large else ''}", 1
    else:
        raise error
    if not isinstance(error, BrokenPipeError):
        say(f"lazyrestore: {text}", sys.stderr)
    return status


def end_like_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt too: what was begun is ended, and no copy stays behind unknown."""
    import signal

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, interrupt)
