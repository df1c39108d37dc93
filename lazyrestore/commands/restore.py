"""What `lazyrestore restore` does with a snapshot: in the foreground a parent that passes signals and the terminal on,
or detached."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lazyrestore.commands import complain, end_like_ctrl_c, say, to_json

if TYPE_CHECKING:
    from lazyrestore.api import RestoredProcess, Snapshot

FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
    signal.SIGWINCH,
    signal.SIGALRM,
)
SI_KERNEL = 0x80  # a signal the kernel made, such as the terminal's Ctrl-C: the whole foreground group got it


def restore(store: str, name: str, *, detach: bool, json_output: bool) -> int:
    """Restore it as it was; returns the exit status."""
    from lazyrestore.api import Store

    with Store.open(store, create=False) as opened, opened.get(name) as snapshot:
        own = streams(pipes=not detach)
        if not detach:
            return foreground(snapshot, {"streams": own}, json_output)
        detached(snapshot, {"streams": own}, json_output)
        return 0


def detached(snapshot: Snapshot, choices: Mapping[str, Any], json_output: bool) -> None:
    """Restore and say which process it is; if nobody can read that, none is left."""
    end_like_ctrl_c()
    process = snapshot.restore(**choices, held=choices.get("new_pid", False))
    with _ended_if_unheard(process):
        say(to_json(facts(process)) if json_output else _told(process))
        process.let_go()


@contextmanager
def _ended_if_unheard(process: RestoredProcess) -> Iterator[None]:
    """If telling of it fails, the process ends: nobody would know its process id."""
    try:
        yield
    except BaseException:
        process.kill()
        process.wait()
        raise


def streams(*, pipes: bool) -> list[int]:
    """The standard streams for the process; without `pipes`, -1 for those through which a caller reads our answer:
    `$(...)` and subprocess.run() read until the last writer is gone, which would be the process."""
    return [stream if pipes or not _is_callers_pipe(stream) else -1 for stream in range(3)]


def _is_callers_pipe(stream: int) -> bool:
    """Whether it is a pipe, or a socket pair, without a name. A FIFO, or a socket that somebody listens for, such as
    the journal's, was chosen for output."""
    try:
        kind = os.readlink(f"/proc/self/fd/{stream}").partition(":")[0]
    except FileNotFoundError:
        return False
    if kind != "socket":
        return kind == "pipe"
    import socket

    with socket.socket(fileno=os.dup(stream)) as connection:
        try:
            return not connection.getpeername()
        except OSError:
            return False


def facts(process: RestoredProcess) -> dict[str, object]:
    phases = {phase: round(ms, 3) for phase, ms in process.phases.items()}
    return {"name": process.name, "pid": process.pid, "restore_ms": round(process.restore_ms, 3), "phases": phases}


def _told(process: RestoredProcess) -> str:
    """For a person a sentence, for `$(...)` the process id."""
    if not sys.stdout.isatty():
        return str(process.pid)
    return f"{process.name}: process {process.pid}, restored in {process.restore_ms:.1f} ms"


def foreground(snapshot: Snapshot, choices: Mapping[str, Any], json_output: bool) -> int:
    """Restore, be a good parent, return the exit status."""
    awaited = {*FORWARDED, signal.SIGCHLD}
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    try:
        process = snapshot.restore(**choices)
        if json_output:
            with _ended_if_unheard(process):
                complain(to_json(facts(process)))
        with _terminal_given_to(process.pid):
            same_group = os.getpgid(process.pid) == os.getpgid(0)
            while (status := process.poll()) is None:
                caught = signal.sigwaitinfo(awaited)
                if caught.si_signo == signal.SIGCHLD:
                    if not same_group and _stopped(process.pid):
                        _stop_with(process.pid)
                elif not (caught.si_code == SI_KERNEL and same_group):
                    process.send_signal(caught.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
    if status == -signal.SIGBUS:
        _explain_sigbus(process)
    return status if status >= 0 else 128 - status


def _explain_sigbus(process: RestoredProcess) -> None:
    """Say so if memory could not be brought; the pager stays long enough to be asked."""
    from lazyrestore.errors import PagerError

    try:
        poisoned = process.stats().counters.poisoned
    except PagerError:
        return
    if poisoned:
        text = f"snapshot {process.name} is damaged (see `verify {process.name}`), or there was no huge page left"
        complain(f"lazyrestore: memory that the process needed could not be brought: {text}")


def _stopped(pid: int) -> bool:
    """Whether our child `pid` has been stopped by job control since this was last asked."""
    try:
        result = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
    except ChildProcessError:
        return False
    return result is not None and result.si_code == os.CLD_STOPPED


def _stop_with(pid: int) -> None:
    """The process was stopped (Ctrl-Z): give the terminal back and stop too; `fg` continues both."""
    group = os.getpgid(pid)
    foreground = os.isatty(0) and os.getsid(pid) == os.getsid(0)
    if foreground:
        _give_terminal(os.getpgrp())
    os.kill(os.getpid(), signal.SIGSTOP)
    if foreground and os.tcgetpgrp(0) == os.getpgrp():
        _give_terminal(group)
    os.killpg(group, signal.SIGCONT)


def _give_terminal(group: int) -> None:
    handler = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # we may be in the background when we do it
    try:
        os.tcsetpgrp(0, group)
    finally:
        signal.signal(signal.SIGTTOU, handler)


@contextmanager
def _terminal_given_to(pid: int) -> Iterator[None]:
    """If the process leads a group of its own in our session, it becomes the terminal's foreground group meanwhile."""
    try:
        terminal = (
            os.isatty(0)
            and os.getsid(pid) == os.getsid(0)
            and os.getpgid(pid) == pid
            and os.tcgetpgrp(0) == os.getpgrp()
        )
    except OSError:
        terminal = False
    if not terminal:
        yield
        return
    _give_terminal(pid)
    try:
        yield
    finally:
        _give_terminal(os.getpgrp())
