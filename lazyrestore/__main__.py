"""The console script, and `python -m lazyrestore`: the command line with what surrounds it in a process of its own.

A command is short, and starting Python is most of it. So the collector of cyclic garbage is made rare before anything
is imported: it found nothing to free in the thousands of classes and functions that imports leave behind, and cost a
tenth of the time. And the process ends with _exit(2) once its output is written, because taking the interpreter apart
costs another tenth; whatever must happen before the end (closing the store, joining threads) a command does itself.

Standard streams that the caller has closed become /dev/null. Files that are opened later would get their numbers, and
what is written to a standard stream, here or in a restored process, would be written to one of these.
"""

from __future__ import annotations

import gc
import io
import os
import sys

COLLECT_AFTER = 100_000  # new containers, some 10 MB
LAST_STREAM = 2


def entry() -> None:
    """Run the command line and end the process with its exit status."""
    try:
        _run()
    except (KeyboardInterrupt, OSError, MemoryError) as error:  # where there was no command to end
        from lazyrestore.commands import failed

        os._exit(failed(error, debug=False))


def _run() -> None:
    gc.set_threshold(COLLECT_AFTER)
    while (null := os.open(os.devnull, os.O_RDWR)) <= LAST_STREAM:
        os.set_inheritable(null, True)
    os.close(null)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # it was closed when Python started
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115  # until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: no path is a UnicodeEncodeError
    from lazyrestore.commands import plain

    if words := plain.read(sys.argv[1:]):
        os._exit(_flushed(plain.run(words)) & 0xFF)
    from lazyrestore.stand_ins import bring

    bring("click")
    from lazyrestore.cli import main

    try:
        main()
    except SystemExit as end:
        status = end.code
        if status is not None and not isinstance(status, int):
            raise  # Python prints a message itself
        os._exit(_flushed(status or 0) & 0xFF)


def _flushed(status: int) -> int:
    """Write out what is buffered. Returns `status`, or 1 if it is 0 and output was lost, which is said in one line."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            import contextlib  # by now it is there; when this file is imported, garbage is not collected rarely yet

            if status == 0 and stream is sys.stdout and not isinstance(error, BrokenPipeError):
                reason = error.strerror if isinstance(error, OSError) else error
                with contextlib.suppress(OSError, ValueError):
                    print(f"lazyrestore: standard output: write: {reason}", file=sys.stderr)
            status = status or 1  # if it is not 0, a command that could not write has said so
    return status


if __name__ == "__main__":
    entry()
