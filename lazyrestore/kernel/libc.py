"""The few system calls that neither Python nor `_core` has, through libc.

Facts. ctypes takes about 5 ms to load, so this module is imported where it is needed, and by the survey before the
freeze. ctypes releases the GIL around a call and keeps errno apart. kcmp has no wrapper in libc; its numbers are the
kernel's (include/uapi/linux/kcmp.h) and part of the x86-64 ABI.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from functools import cache

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.tee.restype = ctypes.c_ssize_t

_SYS_KCMP = 312
_SYS_PROCESS_MADVISE = 440
_PAGE = 4096
_KCMP_FILES = 2
_KCMP_FS = 3
_KCMP_EPOLL_TFD = 7
_SPLICE_F_NONBLOCK = 2
_PR_TIMER_CREATE_RESTORE_IDS, _GET = 77, 2
_SOL_SOCKET, _SO_GET_FILTER = 1, 26
_MCAST_MSFILTER = 48


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def tee(source: int, target: int, length: int) -> int:
    """Duplicate up to `length` bytes from one pipe into another without consuming them; returns how many. OSError."""
    flags = ctypes.c_uint(_SPLICE_F_NONBLOCK)
    return _checked(_libc.tee(ctypes.c_int(source), ctypes.c_int(target), ctypes.c_size_t(length), flags))


def timerfd_gettime(number: int) -> tuple[int, int]:
    """(remaining, interval) of a timerfd in nanoseconds. OSError."""
    value = ctypes.create_string_buffer(32)
    _checked(_libc.timerfd_gettime(ctypes.c_int(number), value))
    interval_seconds, interval_nanoseconds, seconds, nanoseconds = struct.unpack("qqqq", value.raw)
    return seconds * 1_000_000_000 + nanoseconds, interval_seconds * 1_000_000_000 + interval_nanoseconds


def timerfd_create() -> int:
    """A timerfd of the monotonic clock, not set. OSError."""
    return _checked(
        _libc.timerfd_create(ctypes.c_int(time.CLOCK_MONOTONIC), ctypes.c_int(os.O_CLOEXEC | os.O_NONBLOCK))
    )


def timerfd_set(number: int, seconds: float) -> None:
    """Let it fire once, in so many seconds, or now if that is past; it is not readable until then. OSError."""
    nanoseconds = max(1, int(seconds * 1e9))
    value = struct.pack("qqqq", 0, 0, nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000)
    _checked(_libc.timerfd_settime(ctypes.c_int(number), 0, value, None))


def timers_take_numbers() -> bool:
    """Whether timer_create(2) can be told which number a timer gets: PR_TIMER_CREATE_RESTORE_IDS, Linux 6.15."""
    return bool(_libc.prctl(_PR_TIMER_CREATE_RESTORE_IDS, *(ctypes.c_ulong(word) for word in (_GET, 0, 0, 0))) >= 0)


@cache
def madvises_itself_at_once(advice: int) -> bool:
    """Whether process_madvise(2) takes that advice about pages of the calling process; since Linux 6.13 any."""
    buffer = ctypes.create_string_buffer(2 * _PAGE)
    vector = ctypes.create_string_buffer(struct.pack("QQ", -(-ctypes.addressof(buffer) // _PAGE) * _PAGE, _PAGE))
    itself = os.pidfd_open(os.getpid())
    try:
        number, count = ctypes.c_long(_SYS_PROCESS_MADVISE), ctypes.c_size_t(1)
        return bool(_libc.syscall(number, ctypes.c_int(itself), vector, count, ctypes.c_int(advice), 0) == _PAGE)
    finally:
        os.close(itself)


def same_file_table(pid: int, tid: int) -> bool:
    """Whether two threads share their descriptor table. OSError."""
    return _kcmp(pid, tid, _KCMP_FILES, 0, None) == 0


def same_place(pid: int, tid: int) -> bool:
    """Whether two threads share working directory, root and umask. OSError."""
    return _kcmp(pid, tid, _KCMP_FS, 0, None) == 0


def epoll_watches(pid: int, number: int, epoll: int, watched: int, occurrence: int = 0) -> bool:
    """Whether descriptor `number` is the very file that the epoll's entry for number `watched` stands for. OSError."""
    slot = ctypes.create_string_buffer(struct.pack("III", epoll, watched, occurrence), 12)
    return _kcmp(pid, pid, _KCMP_EPOLL_TFD, number, slot) == 0


def has_socket_filter(number: int) -> bool:
    """Whether a program is attached to a socket (SO_ATTACH_FILTER or SO_ATTACH_BPF). OSError.

    The option's length counts instructions, not bytes, so that any room but none would be overrun: with none, the
    kernel only counts.
    """
    count = ctypes.c_uint(0)
    name = ctypes.c_int(_SO_GET_FILTER)
    try:
        _checked(_libc.getsockopt(ctypes.c_int(number), ctypes.c_int(_SOL_SOCKET), name, None, ctypes.byref(count)))
    except PermissionError:  # EACCES: an eBPF program, which cannot be read back
        return True
    return count.value > 0


def multicast_filter(number: int, level: int, interface: int, group: bytes) -> tuple[int, int] | None:
    """(mode, number of sources) of a socket's membership in a group (a struct sockaddr_storage); None: it has none."""
    filter = ctypes.create_string_buffer(struct.pack("=I4x128sII", interface, group, 0, 0), 144)
    length = ctypes.c_uint(len(filter))
    call = ctypes.c_int(number), ctypes.c_int(level), ctypes.c_int(_MCAST_MSFILTER), filter, ctypes.byref(length)
    if _libc.getsockopt(*call) < 0:
        return None
    mode, sources = struct.unpack_from("=II", filter, 136)
    return mode, sources


def _kcmp(pid: int, other: int, kind: int, first: int, second: ctypes.Array[ctypes.c_char] | None) -> int:
    return _checked(
        _libc.syscall(
            ctypes.c_long(_SYS_KCMP),
            ctypes.c_long(pid),
            ctypes.c_long(other),
            ctypes.c_long(kind),
            ctypes.c_ulong(first),
            ctypes.cast(second, ctypes.c_void_p) if second is not None else ctypes.c_void_p(0),
        )
    )
