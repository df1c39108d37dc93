"""The fdinfo parsers: round trips in the kernel's formats (fs/proc/fd.c, the kinds' show_fdinfo), and garbage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyrestore.kernel import fdinfo

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
NANOSECONDS = st.integers(0, 999_999_999)
SECONDS = st.integers(0, 1 << 40)


@given(st.integers(0, (1 << 63) - 1), st.integers(0, 0o77777777), st.integers(0, 1 << 31), U64, st.binary(max_size=50))
def test_head(position: int, flags: int, mount: int, inode: int, rest: bytes) -> None:
    text = b"pos:\t%d\nflags:\t0%o\nmnt_id:\t%d\nino:\t%d\n%s" % (position, flags, mount, inode, rest)
    assert fdinfo.parse(text) == (position, flags, mount, inode, rest)


def test_head_before_linux_5_14() -> None:
    assert fdinfo.parse(b"pos:\t0\nflags:\t02\nmnt_id:\t15\neventfd-count:  1\n") == (
        0,
        2,
        15,
        0,
        b"eventfd-count:  1\n",
    )


@given(U64, st.integers(0, 1 << 31), st.booleans())
def test_eventfd(count: int, identity: int, semaphore: bool) -> None:
    rest = b"eventfd-count: %16x\neventfd-id: %d\neventfd-semaphore: %d\n" % (count, identity, semaphore)
    assert fdinfo.eventfd(rest) == (count, identity, semaphore)


def test_eventfd_of_a_kernel_that_does_not_tell() -> None:
    with pytest.raises(ValueError, match="semaphore"):
        fdinfo.eventfd(b"eventfd-count:                0\neventfd-id: 3\n")


@given(st.integers(0, 11), U64, st.sampled_from([0, 1, 3]), SECONDS, NANOSECONDS, SECONDS, NANOSECONDS)
def test_timerfd(clock: int, ticks: int, flags: int, left: int, left_ns: int, every: int, every_ns: int) -> None:
    rest = b"clockid: %d\nticks: %d\nsettime flags: 0%o\nit_value: (%d, %d)\nit_interval: (%d, %d)\n" % (
        *(clock, ticks, flags),
        *(left, left_ns, every, every_ns),
    )
    assert fdinfo.timerfd(rest) == (clock, ticks, flags, left * 10**9 + left_ns, every * 10**9 + every_ns)


@given(U64)
def test_signal_mask(mask: int) -> None:
    assert fdinfo.signal_mask(b"sigmask:\t%016x\n" % mask) == mask


@given(st.lists(st.tuples(st.integers(0, 99_999), U32, U64, U64, U32)))
def test_epoll_targets(entries: list[tuple[int, int, int, int, int]]) -> None:
    rest = b"".join(
        b"tfd: %8d events: %8x data: %16x  pos:%d ino:%x sdev:%x\n" % (number, events, data, -1, inode, device)
        for number, events, data, inode, device in entries
    )
    assert fdinfo.targets(rest) == entries


@given(st.sampled_from(["FLOCK", "POSIX", "OFDLCK"]), st.sampled_from(["READ", "WRITE"]), st.integers(0, 1 << 62))
def test_locks(kind: str, access: str, start: int) -> None:
    line = f"lock:\t1: {kind:6} ADVISORY  {access} 123 fe:00:42 {start} "
    rest = f"{line}EOF\nlock:\t2: -> POSIX  ADVISORY  WRITE 5 fe:00:42 0 EOF\n{line}{start + 9}\n".encode()
    assert fdinfo.locks(rest) == [(kind, access, start, None), (kind, access, start, start + 9)]


def test_a_lease_and_passed_descriptors() -> None:
    rest = b"scm_fds: 3\nlock:\t1: LEASE  ACTIVE    READ  6577 fe:00:2146546 0 EOF\n"
    assert fdinfo.locks(rest) == [("LEASE", "READ", 0, None)]
    assert fdinfo.passed_descriptors(rest) == 3
    assert fdinfo.passed_descriptors(b"") == 0


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_never_guessed(text: bytes) -> None:
    for parser in (fdinfo.eventfd, fdinfo.timerfd, fdinfo.signal_mask):
        with pytest.raises(ValueError, match=r"unexpected|does not tell"):
            parser(b"x" + text.replace(b"\n", b""))
    with pytest.raises(ValueError, match="unexpected fdinfo"):
        fdinfo.parse(b"x" + text)
    with pytest.raises(ValueError, match="unexpected epoll"):
        fdinfo.targets(b"x" + text + b"\n")
    with pytest.raises(ValueError, match="unexpected lock"):
        fdinfo.locks(b"lock:\tx" + text.replace(b"\n", b"").replace(b"\r", b""))
