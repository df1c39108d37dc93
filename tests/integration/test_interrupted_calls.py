"""A signal with a handler waits while a process is frozen: its call ends or goes on as if nobody had frozen it.

Each thread of tests/victims/interrupted.c has a signal that only it lets through. signal(7) says which calls end with
EINTR whatever the handler's flags, and which are restarted with SA_RESTART.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Builder, Stuck, Victim, Victims, ask, until
from helpers_copies import Copies

import lazyrestore
from lazyrestore.kernel.tracee import Frozen

# Thread → its call's number; in the order of their signals, SIGRTMIN + 0, ….
CALLS = {
    "epoll_wait": 232,
    "epoll_pwait": 281,
    "poll": 7,
    "ppoll": 271,
    "nanosleep": 35,
    "futex": 202,
    "sigtimedwait": 128,
    "read": 0,
    "read_restart": 0,
    "sleep": 35,
    "clock_nanosleep": 230,
    "readv": 19,
}
SENDERS = {"write": 1, "writev": 20, "sendfile": 40, "connect": 42}
ACCEPT, GETPID = 43, 39
RESTART = 219  # restart_syscall: one with a timeout goes on
ENDED = {name: ("waits" if name == "read_restart" else "EINTR", 1) for name in CALLS}


@pytest.fixture
def victim(run: Path, victims: Victims, build: Builder) -> Victim:
    """All of its threads wait."""
    victim = victims.start([build.c("interrupted"), run / "control"])
    victim.until(lambda: all_wait(victim.pid), "threads that wait")
    return victim


def all_wait(pid: int, expected: dict[str, int] = CALLS) -> bool:
    """Whether each thread is in its call: a signal that comes before does not end it."""
    calls = {name: int((task / "syscall").read_text().split()[0]) for name, task in tasks(pid).items()}
    wanted = expected | {"interrupted": ACCEPT}
    return calls.keys() == wanted.keys() and all(calls[name] in (wanted[name], RESTART) for name in calls)


def tasks(pid: int) -> dict[str, Path]:
    """/proc/PID/task/TID by the thread's name."""
    return {(task / "comm").read_text().strip(): task for task in Path(f"/proc/{pid}/task").iterdir()}


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: is_stopped(pid), "a stopped process")


def is_stopped(pid: int) -> bool:
    return all(state(task) == "T" for task in tasks(pid).values())


def state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def send_all(pid: int, count: int = len(CALLS)) -> None:
    for number in range(count):
        os.kill(pid, signal.SIGRTMIN + number)


def report(control: Path) -> dict[str, tuple[str, int]]:
    return {words[0]: (words[1], int(words[2])) for words in map(str.split, ask(control, "report").splitlines())}


def check(control: Path, expected: dict[str, tuple[str, int]]) -> None:
    """Every handler ran once, and every call ended or waits as expected."""
    try:
        until(lambda: report(control) == expected, "the end of the calls")
    except Stuck:
        assert report(control) == expected


def test_without_a_snapshot(run: Path, victim: Victim) -> None:
    """What signal(7) says is what the kernel does."""
    send_all(victim.pid)
    check(run / "control", ENDED)


def test_signals_before_the_freeze(run: Path, victim: Victim, copies: Copies) -> None:
    stop(victim.pid)
    send_all(victim.pid)
    snapshot = copies.snapshot(victim.pid, "x")
    os.kill(victim.pid, signal.SIGCONT)
    check(run / "control", ENDED)
    victim.kill()
    copy = copies.restore(snapshot)
    copy.until(lambda: is_stopped(copy.pid), "a copy that is stopped, as the process was")
    os.kill(copy.pid, signal.SIGCONT)
    check(run / "control", ENDED)
    copy.check()


@pytest.mark.parametrize("diverted", [False, True], ids=["looked at", "diverted"])
def test_signals_while_frozen(run: Path, victim: Victim, diverted: bool) -> None:
    with Frozen(victim.pid) as frozen:
        if diverted:
            frozen.begin_calls()
            for tid in frozen.tids:
                with frozen.calls(tid) as call:
                    assert call(GETPID) == victim.pid
            frozen.end_calls()
        send_all(victim.pid)
    check(run / "control", ENDED)


def a_copy_waits(run: Path, copies: Copies, snapshot: lazyrestore.Snapshot) -> None:
    """Nothing ends in it, until a signal comes."""
    copy = copies.restore(snapshot)
    copy.until(lambda: all_wait(copy.pid), "threads that wait again")
    assert report(run / "control") == dict.fromkeys(CALLS, ("waits", 0))
    send_all(copy.pid)
    check(run / "control", ENDED)
    copy.check()


def test_no_signal(run: Path, victim: Victim, copies: Copies) -> None:
    """Nothing ends, in the original and in the copy; and a signal that comes later ends it as ever."""
    snapshot = copies.snapshot(victim.pid, "x")
    victim.until(lambda: all_wait(victim.pid), "threads that wait again")
    assert report(run / "control") == dict.fromkeys(CALLS, ("waits", 0))
    send_all(victim.pid)
    check(run / "control", ENDED)
    victim.kill()
    a_copy_waits(run, copies, snapshot)


def test_a_second_snapshot(run: Path, victim: Victim, copies: Copies) -> None:
    """The first has made restart_syscall() of calls with a time-out; a copy has nothing that this could restart."""
    copies.snapshot(victim.pid, "x")
    victim.until(lambda: all_wait(victim.pid), "threads that wait again")
    snapshot = copies.snapshot(victim.pid, "y")
    victim.kill()
    a_copy_waits(run, copies, snapshot)


def test_senders_with_a_timeout(run: Path, victims: Victims, build: Builder) -> None:
    """A stop ends them with EINTR; they are made again."""
    calls = CALLS | SENDERS
    victim = victims.start([build.c("interrupted"), run / "control", "senders"])
    for _ in range(2):
        victim.until(lambda: all_wait(victim.pid, calls), "threads that wait")
        with Frozen(victim.pid):
            pass
    assert report(run / "control") == dict.fromkeys(calls, ("waits", 0))
    victim.until(lambda: all_wait(victim.pid, calls), "threads that wait again")
    send_all(victim.pid, len(calls))
    check(run / "control", ENDED | dict.fromkeys(SENDERS, ("EINTR", 1)))


def test_an_exec_before_the_freeze(victims: Victims, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened of the process before belongs to the program that it no longer is."""
    reader, writer = os.pipe()
    victim = victims.start(["/bin/sh", "-c", "read line; exec sleep 1000000"], stdin=reader)
    freeze = Frozen._freeze

    def exec_first(frozen: Frozen) -> None:
        os.write(writer, b"\n")
        victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "the exec")
        freeze(frozen)

    monkeypatch.setattr(Frozen, "_freeze", exec_first)
    with Frozen(victim.pid) as frozen:
        frozen.begin_calls()
        with frozen.calls(victim.pid) as call:
            assert call(GETPID) == victim.pid
    victim.check()
    os.close(reader)
    os.close(writer)


# Diverts one thread, says so, and waits to be killed.
DIVERT = """
import sys
from lazyrestore.kernel.tracee import Frozen
with Frozen(int(sys.argv[1])) as frozen:
    frozen.begin_calls()
    with frozen.calls(int(sys.argv[2])) as call:
        call(39)
        print("diverted", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("name", CALLS)
def test_killed_tracer(run: Path, victim: Victim, name: str) -> None:
    """With the thread in the stub, which then cannot ask the kernel about SA_RESTART."""
    stop(victim.pid)
    send_all(victim.pid)
    tid = tasks(victim.pid)[name].name
    with subprocess.Popen(
        [sys.executable, "-c", DIVERT, str(victim.pid), tid], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as tracer:
        assert tracer.stdout
        assert tracer.stdout.readline() == b"diverted\n"
        tracer.kill()
    os.kill(victim.pid, signal.SIGCONT)
    check(run / "control", ENDED | ({"read": ("waits", 1)} if name == "read" else {}))
