"""What commands do, without click, which `lazyrestore.cli` reads their words with; here, what they have in common."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

from lazyrestore.errors import LazyrestoreError, OutOfMemory

OF_LIMITS = {
    errno.EFBIG: "raise the limit on file sizes: ulimit -f unlimited",  # memory files are files too
    errno.EMFILE: "raise the limit on open files: ulimit -n 1024",
    errno.ENOMEM: "free some memory, or raise the limit on it: ulimit -v unlimited",
}
INTERRUPTED = 130  # the exit status, 128 + SIGINT


class Misunderstood(LazyrestoreError):
    """The words of a command cannot be understood; nothing was done."""

    exit_status = 2


def default_store() -> str:
    """The store that is used when none is named: per user, root's in /var/lib."""
    if os.geteuid() == 0:
        return "/var/lib/lazyrestore"
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(base, "lazyrestore")


def nothing_stored(store: str) -> bool:
    """Whether it is the default store and was not made yet: then it is as good as empty. One that was named must be."""
    return store == default_store() and not os.path.lexists(store)


def say(text: str, done: str = "") -> None:
    """A line of output, written at once. Raises BrokenPipeError if nobody reads it, LazyrestoreError if it cannot be
    written otherwise, which tells `done`: what the command has done already."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable(error, done) from error


def unwritable(error: OSError, done: str = "") -> LazyrestoreError:
    """What stands for a failed write to standard output."""
    advice = done or OF_LIMITS.get(error.errno or 0, "send it to another file")
    return LazyrestoreError("standard output", "write", advice=advice, errno=error.errno)


def complain(text: str) -> None:
    """A line on standard error, written at once. Raises OSError if it cannot be."""
    print(text, file=sys.stderr, flush=True)


def tell_of_waiting() -> None:
    """Say so once, on standard error, if another process's lock of the store is waited for."""
    from lazyrestore.store import waiting

    waiting.tell(lambda text: complain(f"lazyrestore: {text}"))


def to_json(value: object) -> str:
    """One line of JSON, as json.dumps() has it. Importing its module takes longer than most answers."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_json(str(key))}: {to_json(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_json, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", False: "false", True: "true"}[value]
    if isinstance(value, int):
        return repr(value)
    if isinstance(value, float) and value - value == 0:  # neither infinite nor NaN
        return repr(value)
    if isinstance(value, str) and value.isascii() and value.isprintable() and '"' not in value and "\\" not in value:
        return f'"{value}"'
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
        advice = f"; {OF_LIMITS[errno.EMFILE]}" if error.errno == errno.EMFILE else ""
        text, status = f"{error}{advice}", error.exit_status
    elif isinstance(error, OSError):
        advice = OF_LIMITS.get(error.errno or 0, "")
        text, status = f"{error}; {advice}" if advice else str(error), 1
    elif isinstance(error, MemoryError):
        text, status = f"out of memory; {OF_LIMITS[errno.ENOMEM]}", OutOfMemory.exit_status
    else:
        raise error
    if not isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError):  # who cannot be told has the exit status
            complain(f"lazyrestore: {text}")
    return status


def end_like_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt too: what was begun is ended, and no copy stays behind unknown."""
    import signal

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, interrupt)
