"""POSIX timers (timer_create): a clock, whom an expiry tells, the time that is left, an interval.

Facts. /proc/PID/timers tells each timer's number, clock and notification, timer_gettime(2) the time that is left: of a
periodic timer whose signal is still queued, that to its next expiry. Nothing tells that a time was absolute, nor which
thread's clock a timer of CLOCK_THREAD_CPUTIME_ID counts. The kernel numbers the timers of a process from 0, and with
PR_TIMER_CREATE_RESTORE_IDS (6.15) as timer_create() is asked to. A program keeps the numbers: glibc's timer_t is one.
Since 6.13 a queued signal whose timer has been deleted or set anew stays queued, and is dropped when its turn comes.

Choice. Timers go on with the time that they had left, as timerfd does: the time between snapshot and restore does not
exist for them. They are made when all threads are there, since some notify one (SIGEV_THREAD_ID). Before 6.15 as many
timers are made, and removed again, as there are numbers below. They are asked for the time that is left before the
queued signals are read, and those that have one queued once more, behind: so an expiry in between comes once. A signal
is left out that the kernel would drop, where that shows: its timer is gone, or has more time left than its interval.

Cost. Of a timer that was stopped, or set anew for no longer than its interval, while its signal was queued, that signal
comes: nothing tells it from one that is due. Before 6.15 all of them come, as before 6.13 the kernel has it. An alarm
at a point of wall-clock time (TIMER_ABSTIME) comes later by the time that the process did not exist. Clocks of single
threads and of other processes are refused. What timer_getoverrun() says begins again at 0.
"""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Iterable, Sequence

import msgspec

from lazyrestore.errors import RestoreError
from lazyrestore.kernel import procfs
from lazyrestore.kernel.tracee import Frozen, check
from lazyrestore.program import OpList, Program, lib

ITIMERSPEC = 32  # bytes of the kernel's struct: interval, time left
CLOCKS = (
    time.CLOCK_REALTIME,
    time.CLOCK_MONOTONIC,
    -6,  # CLOCK_PROCESS_CPUTIME_ID, as the kernel keeps it: CPUCLOCK_SCHED of process 0, the timer's own
    time.CLOCK_BOOTTIME,
    8,  # CLOCK_REALTIME_ALARM
    9,  # CLOCK_BOOTTIME_ALARM
    time.CLOCK_TAI,
)
NOTIFICATIONS = {b"signal": 0, b"none": 1, b"thread": 2}  # SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD
TO_THREAD = 4  # SIGEV_THREAD_ID
SI_TIMER = -2  # asm-generic/siginfo.h; si_timerid follows
MOST_NUMBERS = 1 << 12  # that are made one after the other, some 2 µs each; they are in the program, 64 bytes each
_SIGEVENT = struct.Struct("<QiiI44x")
_TIMER = re.compile(
    rb"ID: (\d+)\nsignal: (\d+)/([0-9a-f]+)\nnotify: (\w+)/(\w+)\.(-?\d+)\nClockID: (-?\d+)\n", re.ASCII
)


class PosixTimer(msgspec.Struct, frozen=True):
    """number: its timer_t; value: what its signal carries (sigev_value); thread: the one that gets it, or 0; times: the
    kernel's struct itimerspec, the time left relative."""

    number: int
    clock: int
    signal: int
    value: int
    notification: int
    thread: int
    times: bytes


def parse(text: bytes) -> list[PosixTimer]:
    """The timers of a /proc/PID/timers, by number, without their times."""
    found = []
    for number, signal, value, notification, to, pid, clock in _TIMER.findall(text):
        thread = int(pid) if to == b"tid" else 0
        how = NOTIFICATIONS[notification] | (TO_THREAD if to == b"tid" else 0)
        found.append(PosixTimer(int(number), int(clock), int(signal), int(value, 16), how, thread, bytes(ITIMERSPEC)))
    return sorted(found, key=lambda timer: timer.number)


def unsupported(pid: int) -> list[str]:
    """What cannot be restored, one line each."""
    lines = []
    for timer in parse(procfs.read(pid, "timers")):
        if timer.clock not in CLOCKS:
            lines.append(f"POSIX timer {timer.number} of a CPU-time clock of a thread or another process")
        elif timer.notification & TO_THREAD and not os.path.exists(f"/proc/{pid}/task/{timer.thread}"):
            lines.append(f"POSIX timer {timer.number} for a thread that has ended")
    return lines


def capture(frozen: Frozen) -> list[PosixTimer]:
    return _ask(frozen, parse(procfs.read(frozen.pid, "timers")))


def ask_again(frozen: Frozen, timers: list[PosixTimer], pending: Iterable[bytes]) -> list[PosixTimer]:
    """The timers, of those whose signal is in `pending` (siginfo_t) with the time that is left now."""
    infos = (struct.unpack_from("<8xi4xi", info) for info in pending)
    expired = {number for code, number in infos if code == SI_TIMER}
    asked = {timer.number: timer for timer in _ask(frozen, [timer for timer in timers if timer.number in expired])}
    return [asked.get(timer.number, timer) for timer in timers]


def without_dropped(pending: list[bytes], timers: Sequence[PosixTimer]) -> list[bytes]:
    """Queued signals (siginfo_t) without those that the kernel will drop; timers: as ask_again() has them."""
    from lazyrestore.kernel import libc

    if not pending or not libc.timers_take_numbers():
        return pending
    by_number = {timer.number: timer for timer in timers}
    return [info for info in pending if not _is_dropped(info, by_number)]


def _is_dropped(info: bytes, timers: dict[int, PosixTimer]) -> bool:
    code, number = struct.unpack_from("<8xi4xi", info)
    if code != SI_TIMER:
        return False
    if number not in timers:
        return True
    seconds, nanoseconds, seconds_left, nanoseconds_left = struct.unpack("<4q", timers[number].times)
    # 1 ns left is what the kernel says of a timer that is due and has not fired.
    return (seconds_left, nanoseconds_left) > (seconds, nanoseconds + 1)


def _ask(frozen: Frozen, timers: list[PosixTimer]) -> list[PosixTimer]:
    pid = frozen.pid
    found = []
    with frozen.calls(pid) as call:
        for timer in timers:
            check(call(lib.SYS_timer_gettime, timer.number, frozen.scratch), pid, "timer_gettime")
            found.append(msgspec.structs.replace(timer, times=frozen.read(frozen.scratch, ITIMERSPEC)))
    return found


def restore(timers: Sequence[PosixTimer], program: Program, ops: OpList) -> None:
    """Append them to the leader's list, behind the start of the threads. RestoreError if the kernel cannot number."""
    if not timers:
        return
    from lazyrestore.kernel import libc

    numbered = libc.timers_take_numbers()
    if not numbered and timers[-1].number >= MOST_NUMBERS:
        advice = f"Linux 6.15 or newer; before, numbers below {MOST_NUMBERS}"
        raise RestoreError(f"POSIX timer {timers[-1].number}", "timer_create", "it would take too many calls", advice)
    if numbered:
        _number(lib.PR_TIMER_CREATE_RESTORE_IDS_ON, ops)
    following = 0
    for timer in timers:
        with ops.serving(f"POSIX timer {timer.number}"):
            about = program.place(_SIGEVENT.pack(timer.value, timer.signal, timer.notification, timer.thread))
            number = program.place(struct.pack("<i4x", timer.number))
            if not numbered:
                _skip(following, timer.number, program, ops)
                following = timer.number + 1
            ops.call(lib.SYS_timer_create, timer.clock, about, number)
            ops.call(lib.SYS_timer_settime, timer.number, 0, program.place(timer.times), 0)
    if numbered:
        _number(lib.PR_TIMER_CREATE_RESTORE_IDS_OFF, ops)


def _number(how: int, ops: OpList) -> None:
    with ops.serving("POSIX timers"):
        note = "PR_TIMER_CREATE_RESTORE_IDS"
        ops.call(lib.SYS_prctl, lib.PR_TIMER_CREATE_RESTORE_IDS, how, 0, 0, 0, note=note)


def _skip(first: int, end: int, program: Program, ops: OpList) -> None:
    """Use up the numbers from `first` to before `end`."""
    silent = program.place(_SIGEVENT.pack(0, 0, NOTIFICATIONS[b"none"], 0))
    number = program.place(bytes(8))
    for skipped in range(first, end):
        ops.call(lib.SYS_timer_create, time.CLOCK_MONOTONIC, silent, number)
        ops.call(lib.SYS_timer_delete, skipped)
