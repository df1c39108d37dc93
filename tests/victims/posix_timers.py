"""Holds POSIX timers of every kind, with a hole in their numbers, and tells what they are: posix_timers.py SOCKET."""

from __future__ import annotations

import ctypes
import json
import signal
import struct
import sys
import threading
import time
from pathlib import Path

from control import serve

CREATE, SETTIME, GETTIME, DELETE = 222, 223, 224, 226  # <asm/unistd_64.h>
TO_PROCESS, TO_NOBODY, TO_THREAD = 0, 1, 4  # SIGEV_...
TICK, THREADS_TICK = signal.SIGRTMIN + 1, signal.SIGRTMIN + 2
SECOND = 1_000_000_000
libc = ctypes.CDLL(None, use_errno=True)
counts = {int(TICK): 0, int(THREADS_TICK): 0}


def call(number: int, *words: object) -> None:
    if libc.syscall(ctypes.c_long(number), *words) < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")


def create(clock: int, notification: int, number: int = 0, value: int = 0, thread: int = 0) -> int:
    """Returns the new timer's number."""
    made = ctypes.c_int(-1)
    about = struct.pack("<QiiI44x", value, number, notification, thread)
    call(CREATE, ctypes.c_int(clock), about, ctypes.byref(made))
    return made.value


def arm(timer: int, first: int, interval: int = 0) -> None:
    """Times in nanoseconds."""
    times = struct.pack("<4q", *divmod(interval, SECOND), *divmod(first, SECOND))
    call(SETTIME, ctypes.c_int(timer), ctypes.c_int(0), times, None)


def times(timer: int) -> tuple[int, int]:
    """(interval, time left) in nanoseconds."""
    value = ctypes.create_string_buffer(32)
    call(GETTIME, ctypes.c_int(timer), value)
    words = struct.unpack("<4q", value.raw)
    return words[0] * SECOND + words[1], words[2] * SECOND + words[3]


def count(number: int, frame: object) -> None:
    counts[number] += 1


def answer(request: str) -> str:
    if request == "times":
        return json.dumps([times(timer) for timer in timers])
    if request == "counts":
        return json.dumps(list(counts.values()))
    if request == "another":
        number = create(time.CLOCK_MONOTONIC, TO_NOBODY)
        arm(number, SECOND * 1000)
        return json.dumps(number)
    return Path("/proc/self/timers").read_text()


for each in (TICK, THREADS_TICK):
    signal.signal(each, count)
waiting = threading.Thread(target=threading.Event().wait, daemon=True)
waiting.start()
timers = [create(time.CLOCK_MONOTONIC, TO_PROCESS, TICK, 0xDEADBEEF_12345678)]
hole = create(time.CLOCK_MONOTONIC, TO_NOBODY)
timers.append(create(time.CLOCK_REALTIME, TO_THREAD, THREADS_TICK, 7, waiting.native_id or 0))
call(DELETE, ctypes.c_int(hole))
timers.append(create(time.CLOCK_BOOTTIME, TO_NOBODY))
timers.append(create(time.CLOCK_PROCESS_CPUTIME_ID, TO_PROCESS, signal.SIGUSR1))
timers.append(create(time.CLOCK_MONOTONIC, TO_PROCESS, signal.SIGUSR2))  # never armed
arm(timers[0], SECOND // 50, SECOND // 50)
arm(timers[1], SECOND // 40, SECOND // 40)
arm(timers[2], SECOND * 5000)
arm(timers[3], SECOND * 9000)
serve(sys.argv[1], answer)
