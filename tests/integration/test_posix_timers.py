"""POSIX timers: they keep number, clock, signal and value, and go on with the time that they had left."""

from __future__ import annotations

import json
import os
import signal
import struct
from pathlib import Path

import pytest
from helpers import SYSTEM_PYTHON, VICTIMS, Victim, Victims, ask, until
from helpers_cli import run_cli
from helpers_copies import Copies

import lazyrestore
from lazyrestore import errors
from lazyrestore.kernel import libc, procfs
from lazyrestore.resources import signals, threads

TICKING = ("status", "tasks")  # a signal may be pending at the instant at which /proc is read
SECOND = 1_000_000_000


@pytest.fixture
def victim(run: Path, victims: Victims) -> Victim:
    victim = victims.start([SYSTEM_PYTHON, VICTIMS / "posix_timers.py", run / "control"])
    victim.listens(run / "control")
    return victim


@pytest.mark.parametrize("numbered", [True, False])
def test_they_go_on(
    run: Path, victim: Victim, copies: Copies, monkeypatch: pytest.MonkeyPatch, *, numbered: bool
) -> None:
    """numbered: the kernel is told the numbers; otherwise they are counted up to, as before Linux 6.15."""
    if not numbered:
        monkeypatch.setattr(libc, "timers_take_numbers", lambda: False)
    elif not libc.timers_take_numbers():
        pytest.skip("PR_TIMER_CREATE_RESTORE_IDS: Linux 6.15")
    control = run / "control"
    about, times = ask(control, "about"), json.loads(ask(control, "times"))
    assert [line for line in about.splitlines() if line.startswith("ID:")] == [f"ID: {n}" for n in (5, 4, 3, 2, 0)]
    copy = copies.replace(victim, ignore=TICKING)
    assert ask(control, "about") == about
    for (interval, left), (interval_before, left_before) in zip(json.loads(ask(control, "times")), times, strict=True):
        assert interval == interval_before
        assert bool(left) == bool(left_before)
        if not interval:
            assert left_before - 100 * SECOND < left <= left_before
    counts = json.loads(ask(control, "counts"))
    copy.until(
        lambda: all(now > then + 3 for now, then in zip(json.loads(ask(control, "counts")), counts, strict=True)),
        "both timers' signals",
    )
    assert json.loads(ask(control, "another")) not in (0, 2, 3, 4, 5)


def test_the_original_keeps_them(run: Path, victim: Victim, copies: Copies) -> None:
    control = run / "control"
    about = ask(control, "about")
    copies.snapshot(victim.pid, "x")
    assert ask(control, "about") == about
    counts = json.loads(ask(control, "counts"))
    victim.until(
        lambda: all(now > then + 3 for now, then in zip(json.loads(ask(control, "counts")), counts, strict=True)),
        "both timers' signals",
    )


TWO_TIMERS = """
import ctypes, signal, struct, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGRTMIN})
libc, number = ctypes.CDLL(None), ctypes.c_int()
about = struct.pack("<QiiI44x", 0, signal.SIGRTMIN, 0, 0)
assert libc.syscall(222, time.CLOCK_MONOTONIC, about, ctypes.byref(number)) == 0
assert libc.syscall(223, number, 0, struct.pack("<4q", 0, 0, 2, 0), None) == 0
signal.setitimer(signal.ITIMER_REAL, 2)
print("set", flush=True)
time.sleep(1000000)
"""


def test_an_expiry_during_the_snapshot_comes_once(
    victims: Victims, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that fire once do so after their time was asked for, and before the queue of signals is read."""
    victim = victims.start([SYSTEM_PYTHON, "-c", TWO_TIMERS])
    victim.until(lambda: "set" in victim.log.read_text(), "the timers")
    read = threads.pending_signals

    def wait_first(tid: int, known: int, *, shared: bool) -> list[bytes]:
        wanted = 1 << signal.SIGALRM - 1 | 1 << signal.SIGRTMIN - 1
        until(lambda: pending(tid) & wanted == wanted, "both signals")
        return read(tid, known, shared=shared)

    monkeypatch.setattr(signals, "pending_signals", wait_first)
    manifest = copies.snapshot(victim.pid, "x").manifest
    assert {struct.unpack_from("<i", info)[0] for info in manifest.signals.pending} == {signal.SIGALRM, signal.SIGRTMIN}
    assert not manifest.signals.timers
    assert [any(timer.times) for timer in manifest.posix_timers] == [False]


DROPPED = """
import ctypes, os, resource, signal, struct, sys, time
signals = [signal.SIGRTMIN + number for number in range(4)]
signal.pthread_sigmask(signal.SIG_BLOCK, [*signals, signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG])
came = []
for each in (*signals, signal.SIGUSR1, signal.SIGURG):
    signal.signal(each, lambda number, frame: came.append(number - signal.SIGRTMIN))
libc, timers = ctypes.CDLL(None), []
def arm(timer, seconds, interval=0):
    assert libc.syscall(223, timer, 0, struct.pack("<4q", interval, 0, *divmod(seconds, 10**9)), None) == 0
for each in signals:
    number = ctypes.c_int()
    assert libc.syscall(222, time.CLOCK_MONOTONIC, struct.pack("<QiiI44x", 0, each, 0, 0), ctypes.byref(number)) == 0
    timers.append(number.value)
for timer, interval in zip(timers, (0, 0, 1000, 1000)):
    arm(timer, 1, interval)
while not signal.sigpending() >= set(signals):
    pass
deleted, once, every, _ = timers
assert libc.syscall(226, deleted) == 0
arm(once, 1000 * 10**9)
arm(every, 5000 * 10**9, 1000)
resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))
signal.raise_signal(signal.SIGUSR1)
libc.sigqueue(os.getpid(), signal.SIGURG, None)
print("set", flush=True)
signal.sigwait([signal.SIGUSR2])
signal.pthread_sigmask(signal.SIG_SETMASK, [])
print("came", sorted(came), flush=True)
time.sleep(1000000)
"""


def test_which_of_the_signals_that_wait_come(victims: Victims, copies: Copies) -> None:
    """Of four timers one was deleted and two were set anew since; two others have no place in the queue."""
    if not libc.timers_take_numbers():
        pytest.skip("the kernel delivers them all: Linux 6.15")
    victim = victims.start([SYSTEM_PYTHON, "-c", DROPPED])
    victim.until(lambda: "set" in victim.log.read_text(), "the signals")
    manifest = copies.snapshot(victim.pid, "x").manifest
    waiting = [*manifest.signals.pending, *manifest.threads[0].pending]
    os.kill(victim.pid, signal.SIGUSR2)
    victim.until(lambda: "came" in victim.log.read_text(), "what came")
    came = json.loads(victim.log.read_text().rpartition("came ")[2])
    assert came == [signal.SIGUSR1 - signal.SIGRTMIN, signal.SIGURG - signal.SIGRTMIN, 3]
    assert sorted(struct.unpack_from("<i", info)[0] - signal.SIGRTMIN for info in waiting) == came


def pending(pid: int) -> int:
    return int(procfs.parse_status(procfs.read(pid, "status"))["ShdPnd"], 16)


def test_one_of_a_threads_clock_is_refused(run: Path, store: lazyrestore.Store, victims: Victims) -> None:
    code = (
        "import ctypes, time\n"
        "libc, number = ctypes.CDLL(None), ctypes.c_int()\n"
        "assert libc.syscall(222, time.CLOCK_THREAD_CPUTIME_ID, None, ctypes.byref(number)) == 0\n"
        "print('made', flush=True)\n"
        "time.sleep(1000000)\n"
    )
    victim = victims.start([SYSTEM_PYTHON, "-c", code])
    victim.until(lambda: "made" in victim.log.read_text(), "the timer")
    answer = run_cli(run / "store", "snapshot", victim.pid, "--name", "x")
    assert answer.returncode == errors.UnsupportedResources.exit_status, answer.stderr
    assert "POSIX timer 0 of a CPU-time clock" in answer.stderr
    victim.check()
