"""Signal dispositions, process-wide pending signals and interval timers.

Facts. No file tells a handler's address: only the process can ask (rt_sigaction); /proc/PID/status tells which signals
are caught or ignored, so only those are asked for. The kernel lets nobody but the process itself queue a signal with a
kernel's si_code. The executor stops with int3; if SIGTRAP were ignored at that moment the kernel would reset it to the
default, so SIGTRAP's action is set last, by the tracer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from signal import SIGALRM, SIGPROF, SIGVTALRM

import msgspec

from lazyrestore.kernel import procfs
from lazyrestore.kernel.tracee import Frozen, check
from lazyrestore.program import OpList, Program, lib
from lazyrestore.resources.threads import pending_signals

SIGACTION = 32  # bytes of the kernel's struct sigaction: handler, flags, restorer, mask
ITIMERS = {0: SIGALRM, 1: SIGVTALRM, 2: SIGPROF}  # ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF


class Signals(msgspec.Struct, frozen=True):
    """actions: signal → the kernel's struct sigaction; timers: which → struct itimerval.

    pending: the siginfo_t of each signal in the process's queue.
    """

    actions: dict[int, bytes]
    timers: dict[int, bytes]
    pending: list[bytes]


def capture(frozen: Frozen) -> Signals:
    pid = frozen.pid
    status = procfs.parse_status(procfs.read(pid, "status"))
    handled = int(status["SigCgt"], 16) | int(status["SigIgn"], 16)
    actions, timers = {}, {}
    with frozen.calls(pid) as call:
        for signal in range(1, 65):
            if handled >> (signal - 1) & 1:
                check(call(lib.SYS_rt_sigaction, signal, 0, frozen.scratch, 8), pid, "rt_sigaction")
                actions[signal] = frozen.read(frozen.scratch, SIGACTION)
        for which in ITIMERS:
            timers[which] = _time_left(frozen, call, which)
        pending = pending_signals(pid, int(status["ShdPnd"], 16), shared=True)
        queued = {struct.unpack_from("<i", info)[0] for info in pending}
        for which, signal in ITIMERS.items():
            if signal in queued and any(timers[which]):  # it may have expired in between: it must not once more
                timers[which] = _time_left(frozen, call, which)
    # A timer whose signal is still pending has an interval, and no time left.
    return Signals(actions, {which: value for which, value in timers.items() if any(value)}, pending)


def _time_left(frozen: Frozen, call: Callable[..., int], which: int) -> bytes:
    check(call(lib.SYS_getitimer, which, frozen.scratch), frozen.pid, "getitimer")
    return frozen.read(frozen.scratch, 32)


def restore(signals: Signals, program: Program, ops: OpList) -> None:
    for signal, action in signals.actions.items():
        if signal != lib.SIGTRAP:
            with ops.serving(f"signal {signal}"):
                ops.call(lib.SYS_rt_sigaction, signal, program.place(action), 0, 8)


def restore_queue_and_timers(signals: Signals, pid: int, program: Program, ops: OpList) -> None:
    for info in signals.pending:
        with ops.serving("pending signal"):
            ops.call(lib.SYS_rt_sigqueueinfo, pid, struct.unpack_from("<i", info)[0], program.place(info))
    for which, value in signals.timers.items():
        if not any(value[16:]):
            # The kernel re-arms it when the pending signal is taken: let it expire at once, which that signal stands
            # for.
            value = value[:16] + struct.pack("<qq", 0, 1)
        with ops.serving(f"interval timer {which}"):
            ops.call(lib.SYS_setitimer, which, program.place(value), 0)
