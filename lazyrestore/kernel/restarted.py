"""Which call restart_syscall() goes on with.

Facts. A call with a time-out that a stop interrupts is not made again with its old number: the kernel lets the thread
make restart_syscall(), which goes on from what the kernel keeps of the call (its restart block). The arguments stay in
the registers, the number is gone: a thread that is stopped once more in it shows restart_syscall, everywhere. Another
process has no such block, there restart_syscall() answers EINTR. Four calls leave one: poll, nanosleep, clock_nanosleep
and the waits of futex. Source: kernel/signal.c, fs/select.c, kernel/time, kernel/futex.

Consequence. The instruction before the syscall instruction tells (mov $number, %eax: glibc, Go). Where the number came
in a register (syscall(3), musl), the arguments do: which of them are addresses, and whether a futex has its value.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from lazyrestore._native import _core

lib = _core.lib

_CALLS = (lib.SYS_poll, lib.SYS_nanosleep, lib.SYS_clock_nanosleep, lib.SYS_futex)
_FUTEX_WAITS = (0, 9)  # FUTEX_WAIT, FUTEX_WAIT_BITSET: linux/futex.h
_FUTEX_FLAGS = 128 | 256  # FUTEX_PRIVATE_FLAG, FUTEX_CLOCK_REALTIME
_LOWEST, _HIGHEST = 1 << 16, 1 << 47  # of a program's addresses: vm.mmap_min_addr's default
_LOW = 0xFFFFFFFF
_BEFORE = struct.Struct("<BIH")  # mov $…, %eax; syscall
_WORD, _TIMESPEC = struct.Struct("<I"), struct.Struct("<qq")
_MOV, _SYSCALL = 0xB8, 0x050F


Read = Callable[[int, int], bytes]


def interrupted_call(registers: dict[str, int], read: Read) -> int:
    """The number of the call that the thread, stopped in restart_syscall(), has made; `read` reads its memory."""
    mov, number, syscall = _unpack(_BEFORE, registers["rip"] - _BEFORE.size, read) or (0, 0, 0)
    if (mov, syscall) == (_MOV, _SYSCALL) and number in _CALLS:
        return number
    return int(_by_arguments(registers, read))


def _by_arguments(registers: dict[str, int], read: Read) -> Any:
    first, second, third, fourth = (registers[name] for name in ("rdi", "rsi", "rdx", "r10"))
    if not _is_address(first):
        return lib.SYS_clock_nanosleep if _is_address(third) else lib.SYS_poll
    if _is_address(second):
        return lib.SYS_nanosleep
    waits = second & _LOW & ~_FUTEX_FLAGS in _FUTEX_WAITS and _is_address(fourth)
    if waits and _unpack(_WORD, first, read) == (third & _LOW,):
        return lib.SYS_futex
    if second:
        return lib.SYS_poll
    # A sleep that was given no place for the rest, or a poll of nothing.
    time = _unpack(_TIMESPEC, first, read)
    return lib.SYS_nanosleep if time is not None and 0 <= time[1] < 1_000_000_000 else lib.SYS_poll


def _unpack(layout: struct.Struct, address: int, read: Read) -> tuple[int, ...] | None:
    """What is there; None: nothing."""
    try:
        return layout.unpack(read(address, layout.size))
    except (OSError, struct.error):
        return None


def _is_address(value: int) -> bool:
    return _LOWEST <= value < _HIGHEST and not 1 << 31 <= value < 1 << 32  # a negative int: the clock of a process
