"""Everything a process is, besides its memory and descriptors. usage: attributes.py CONTROL_SOCKET PLAIN|NOBODY

Requests: "observe": what the process sees of itself, as JSON, equal in a copy; "pending": takes the pending signals, in
order; "grow": the heap by brk; "alarm": waits for the interval timer's handler; "handlers": raises signals and tells
which handlers ran.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import threading

import control

libc = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534
SYS_RT_SIGACTION, SYS_CAPGET, SYS_CAPSET, SYS_MEMBARRIER = 13, 125, 126, 324
PR_GET = {"dumpable": 3, "keepcaps": 7, "timerslack": 30, "securebits": 27, "no_new_privs": 39, "thp_disable": 42}
PR_SET_NAME, PR_SET_KEEPCAPS, PR_SET_SECUREBITS, PR_SET_TIMERSLACK, PR_SET_NO_NEW_PRIVS = 15, 8, 28, 29, 38
PR_SET_THP_DISABLE, PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER, PR_CAP_AMBIENT = 41, 36, 37, 47
ADDR_NO_RANDOMIZE, SHORT_INODE = 0x0040000, 0x1000000
CAPABILITIES = 1 << 10 | 1 << 12  # CAP_NET_BIND_SERVICE, CAP_NET_ADMIN
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
alarms = 0
ran: list[int] = []


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def on_alarm(number: int, frame: object) -> None:
    global alarms
    alarms += 1


def set_up(kind: str) -> None:
    os.umask(0o027)
    os.setpriority(os.PRIO_PROCESS, 0, 4)
    resource.setrlimit(resource.RLIMIT_NOFILE, (321, 654))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 1 << 20))
    resource.setrlimit(resource.RLIMIT_STACK, (9 << 20, 99 << 20))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    check(libc.personality(ADDR_NO_RANDOMIZE | SHORT_INODE))
    for command in (1 << 2, 1 << 4, 1 << 6):  # membarrier: registered for the global, the private, that of cores
        check(libc.syscall(SYS_MEMBARRIER, command, 0, 0))
    os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    check(libc.prctl(PR_SET_NAME, b"odd) R 1 (name"))
    check(libc.prctl(PR_SET_TIMERSLACK, 123456))
    check(libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0))
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1))
    for name, text in (("oom_score_adj", "77"), ("coredump_filter", "0x13")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    signal.signal(signal.SIGALRM, on_alarm)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda number, frame: ran.append(number))
    signal.signal(signal.SIGRTMIN + 9, lambda number, frame: ran.append(number))
    signal.siginterrupt(signal.SIGUSR1, False)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10000, 5000)
    signal.setitimer(signal.ITIMER_PROF, 20000)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    pending = [signal.SIGUSR2, signal.SIGRTMIN + 1, signal.SIGRTMIN + 2, signal.SIGWINCH]
    signal.pthread_sigmask(signal.SIG_BLOCK, [*pending, signal.SIGRTMIN + 20])
    libc.sigqueue.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    os.kill(os.getpid(), signal.SIGUSR2)
    for value in (5, 6, 7):
        check(libc.sigqueue(os.getpid(), signal.SIGRTMIN + 1, value))
    signal.pthread_kill(threading.get_ident(), signal.SIGWINCH)
    check(libc.sigqueue(os.getpid(), signal.SIGRTMIN + 2, 8))
    if kind == "NOBODY":
        os.setgroups([4, 24, 1000, 123456])
        os.setresgid(NOBODY, NOBODY - 1, NOBODY - 2)
        check(libc.prctl(PR_SET_KEEPCAPS, 1))
        os.setresuid(NOBODY, NOBODY, NOBODY)
        header = struct.pack("<Ii", 0x20080522, 0)
        check(libc.syscall(SYS_CAPSET, header, struct.pack("<6I", *[CAPABILITIES] * 3, 0, 0, 0)))
        check(libc.prctl(PR_CAP_AMBIENT, 2, 10, 0, 0))
        check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    else:
        check(libc.prctl(PR_SET_SECUREBITS, 1 << 2))  # SECBIT_NO_SETUID_FIXUP


def actions() -> list[str]:
    """The kernel's struct sigaction of all signals: handler, flags, restorer, mask."""
    found = []
    for number in range(1, 65):
        buffer = ctypes.create_string_buffer(32)
        check(libc.syscall(SYS_RT_SIGACTION, number, None, buffer, 8))
        found.append(buffer.raw.hex())
    return found


def observe() -> str:
    umask = os.umask(0)
    os.umask(umask)
    subreaper = ctypes.c_int()
    check(libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(subreaper)))
    capabilities = ctypes.create_string_buffer(24)
    check(libc.syscall(SYS_CAPGET, struct.pack("<Ii", 0x20080522, 0), capabilities))
    seen = {
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "umask": umask,
        "membarrier": [libc.syscall(SYS_MEMBARRIER, 1 << bit, 0, 0) for bit in (3, 5, 9)],
        "scheduler": os.sched_getscheduler(0),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "limits": [resource.getrlimit(number) for number in range(16)],
        "uids": os.getresuid(),
        "gids": os.getresgid(),
        "groups": os.getgroups(),
        "capabilities": capabilities.raw.hex(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "personality": libc.personality(0xFFFFFFFF),
        "actions": actions(),
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "pending": sorted(signal.sigpending()),
        "prctl": {name: libc.prctl(number, 0, 0, 0, 0) for name, number in PR_GET.items()},
        "subreaper": subreaper.value,
        "brk": libc.sbrk(0),
        "intervals": [signal.getitimer(timer)[1] for timer in TIMERS],
        "armed": [bool(signal.getitimer(timer)[0]) for timer in TIMERS],
        "arguments": sys.argv,
        "environment": dict(os.environ),
    }
    return json.dumps(seen, sort_keys=True)


def pending() -> str:
    """Takes them one by one: number, code, sender is ourselves, value."""
    taken = []
    wanted = [signal.SIGUSR2, signal.SIGRTMIN + 1, signal.SIGRTMIN + 2, signal.SIGWINCH]
    bits = struct.pack("<Q", sum(1 << (number - 1) for number in wanted))
    info = ctypes.create_string_buffer(128)
    while libc.syscall(128, bits, info, struct.pack("<qq", 0, 0), 8) > 0:
        number, _, code = struct.unpack_from("<iii", info)
        pid, uid, value = struct.unpack_from("<iii", info, 16)
        taken.append((number, code, pid == os.getpid(), uid, value if code == -1 else 0))
    return json.dumps(taken)


def grow() -> str:
    libc.sbrk.restype = ctypes.c_void_p
    start = libc.sbrk(ctypes.c_long(1 << 20))
    block = (ctypes.c_ubyte * (1 << 20)).from_address(start)
    if any(block[4096:]):
        return "what brk grew by is not zero"
    ctypes.memset(start, 0xAB, 1 << 20)
    good = bytes(block) == b"\xab" * (1 << 20) and libc.sbrk(0) == start + (1 << 20)
    libc.sbrk(ctypes.c_long(-(1 << 20)))
    return "ok" if good else "brk"


def alarm() -> str:
    before = alarms
    while alarms == before:
        signal.pause()
    return "ok"


def handlers() -> str:
    ran.clear()
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGRTMIN + 9, signal.SIGUSR1):
        signal.raise_signal(number)
    return json.dumps(ran)


set_up(sys.argv[2])
requests = {"observe": observe, "pending": pending, "grow": grow, "alarm": alarm, "handlers": handlers}
control.serve(sys.argv[1], lambda request: requests[request]())
