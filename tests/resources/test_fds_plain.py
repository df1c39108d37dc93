"""Round trips of files, directories, devices, eventfds, timerfds, signalfds and memfds, in real processes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from resources.interpreter import child, record, restored, round_trip

from lazyrestore.errors import FileChanged, RestoreError
from lazyrestore.resources import descriptors
from lazyrestore.resources.files import Directory, Lock, RegularFile

_libc = ctypes.CDLL(None, use_errno=True)


def test_a_file_keeps_offset_flags_and_sharing(tmp_path: Path) -> None:
    path = tmp_path / "a file\nwith a newline and \udcff"
    path.write_bytes(b"0123456789")

    def body() -> None:
        reader = os.open(path, os.O_RDONLY)  # 3
        os.lseek(reader, 4, os.SEEK_SET)
        os.dup2(reader, 40, inheritable=True)
        os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)  # 4
        os.open(path, os.O_RDONLY)  # 5: at the same offset as the next, but another description
        os.open(path, os.O_RDONLY)  # 6

    def check() -> None:
        assert os.read(3, 2) == b"45"
        assert os.read(40, 1) == b"6"
        os.write(4, b"ab")
        assert os.read(5, 100) == b"0123456789ab"
        assert os.lseek(6, 0, os.SEEK_CUR) == 0
        assert not os.get_inheritable(3)
        assert os.get_inheritable(40)

    table = round_trip(body, check, ignore=("size",))
    assert record(table, 3) is record(table, 40)
    assert record(table, 5) is not record(table, 6)


def test_numbers_with_gaps_and_in_each_others_way(tmp_path: Path) -> None:
    def body() -> None:
        for number in (0, 1, 2):
            os.close(number)
        for number in (7, 650, 3, 1):
            path = tmp_path / str(number)
            path.write_text(str(number))
            opened = os.open(path, os.O_RDONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)

    def check() -> None:
        for number in (7, 650, 3, 1):
            assert os.read(number, 10) == str(number).encode()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(0)

    assert [one.number for one in round_trip(body, check, ignore=("position",)).descriptors] == [1, 3, 7, 650]


def test_directories_locations_and_devices(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("nowhere")

    def body() -> None:
        os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)  # 3
        os.open(tmp_path / "link", os.O_PATH | os.O_NOFOLLOW)  # 4
        os.open(tmp_path, os.O_PATH)  # 5
        for name in ("null", "zero", "full", "random", "urandom"):
            os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK)  # 6 … 10
        os.open("/proc/self/comm", os.O_RDONLY)  # 11

    def check() -> None:
        assert sorted(os.listdir(3)) == [*"abcdef", "link"]
        assert os.readlink(b"", dir_fd=4) == b"nowhere"
        assert len(os.read(7, 10)) == 10
        assert os.read(11, 100) == Path("/proc/self/comm").read_bytes()

    table = round_trip(body, check)
    assert isinstance(record(table, 3), Directory)
    assert record(table, 11).path == b"/proc/self/comm"


def test_locks_are_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "locked"
    path.write_bytes(bytes(100))

    def body() -> None:
        first = os.open(path, os.O_RDWR)
        fcntl.flock(first, fcntl.LOCK_EX)
        fcntl.lockf(first, fcntl.LOCK_EX, 10, 20)
        second = os.open(path, os.O_RDWR)
        fcntl.lockf(second, fcntl.LOCK_SH, 0, 50)

    table = round_trip(body)
    assert set(record(table, 3).locks) == {Lock("FLOCK", True, 0, 0), Lock("POSIX", True, 20, 10)}
    assert set(record(table, 4).locks) == {Lock("POSIX", False, 50, 0)}
    with path.open() as other, restored(table):
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(AssertionError, match=r"fd 3 \(file .*locked\): flock"), restored(table):
            pass


def test_eventfds() -> None:
    def body() -> None:
        os.eventfd(5)
        os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
        os.eventfd_write(os.eventfd(0), (1 << 64) - 2)
        os.dup(os.eventfd(0))

    def check() -> None:
        assert os.eventfd_read(3) == 5
        assert [os.eventfd_read(4) for _ in range(3)] == [1, 1, 1]
        with pytest.raises(BlockingIOError):
            os.eventfd_read(4)
        assert os.eventfd_read(5) == (1 << 64) - 2
        os.eventfd_write(6, 1)
        assert os.eventfd_read(7) == 1

    round_trip(body, check)


def _timer(clock: int, value_ns: int, interval_ns: int, flags: int = 0) -> int:
    number = int(_libc.timerfd_create(clock, os.O_NONBLOCK))
    times = struct.pack("4q", *divmod(interval_ns, 10**9), *divmod(value_ns, 10**9))
    assert _libc.timerfd_settime(number, flags, times, None) == 0
    return number


def test_timerfds() -> None:
    def body() -> None:
        _timer(time.CLOCK_MONOTONIC, 10**12, 0)  # 3
        _timer(time.CLOCK_REALTIME, time.time_ns() + 10**12, 10**9, flags=1)  # 4
        _timer(time.CLOCK_BOOTTIME, 0, 0)  # 5
        expired = _timer(time.CLOCK_MONOTONIC, 1, 0)  # 6
        periodic = _timer(time.CLOCK_MONOTONIC, 1, 10**12)  # 7: one tick, the next one far away
        for number in (expired, periodic):
            select.select([number], [], [])

    def check() -> None:
        for number in (3, 4, 5):
            with pytest.raises(BlockingIOError):
                os.read(number, 8)
        assert os.read(6, 8) == os.read(7, 8) == struct.pack("Q", 1)

    table = round_trip(body, check, ignore=("remaining", "expires"))
    wall_clock = record(table, 4)
    assert abs(wall_clock.expires - time.time_ns() - 10**12) < 100 * 10**9
    assert wall_clock.settime_flags == 1
    assert 900 * 10**9 < record(table, 3).remaining <= 10**12
    assert 900 * 10**9 < record(table, 4).remaining <= 1001 * 10**9
    assert record(table, 5).remaining == record(table, 6).remaining == 0
    assert (record(table, 6).ticks, record(table, 7).ticks) == (1, 1)
    assert 900 * 10**9 < record(table, 7).remaining <= 10**12
    with restored(table) as copy:
        again = copy.survey()
        for number in range(3, 8):
            assert record(again, number).remaining <= record(table, number).remaining
        assert abs(record(again, 4).expires - wall_clock.expires) < 10**9
        assert record(again, 7).remaining > 900 * 10**9


def test_a_timer_that_is_due_is_not_taken_for_one_that_was_stopped() -> None:
    """Its interrupt is late by some microseconds, on another CPU than ours."""
    with reader_of_timers(20, 200_000) as (pid, pidfd, numbers):
        for _ in range(200):
            table = descriptors.survey(pid, pidfd, contents=True)
            assert all(record(table, number).remaining for number in numbers)


@contextmanager
def reader_of_timers(count: int, interval_ns: int) -> Iterator[tuple[int, int, list[int]]]:
    """A process on another CPU than ours, if there is one, that waits for each of its timers in turn."""
    before = os.sched_getaffinity(0)
    numbers = [_timer(time.CLOCK_MONOTONIC, interval_ns, interval_ns) for _ in range(count)]
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {max(before)})
        for number in numbers:
            os.set_blocking(number, True)
        while True:
            for number in numbers:
                os.read(number, 8)
    pidfd = os.pidfd_open(pid)
    try:
        os.sched_setaffinity(0, {min(before)})
        yield pid, pidfd, numbers
    finally:
        os.sched_setaffinity(0, before)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        for number in (pidfd, *numbers):
            os.close(number)


def test_a_signalfd_reads_its_signals() -> None:
    def body() -> None:
        _libc.signalfd(-1, struct.pack("Q", 1 << signal.SIGUSR1 - 1 | 1 << signal.SIGRTMIN - 1), os.O_NONBLOCK)

    def check() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert struct.unpack_from("I", os.read(3, 128))[0] == signal.SIGUSR1

    round_trip(body, check)


def test_an_unmapped_memfd_keeps_contents_and_seals() -> None:
    def body() -> None:
        number = os.memfd_create("a name", os.MFD_ALLOW_SEALING)
        os.ftruncate(number, 300_000)
        os.pwrite(number, b"start", 0)
        os.pwrite(number, b"end", 200_000)
        os.lseek(number, 77, os.SEEK_SET)
        os.open(f"/proc/self/fd/{number}", os.O_RDONLY)
        os.fchmod(number, 0o640)
        os.fchown(number, 5, 6)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
        os.memfd_create("empty", 0)
        os.ftruncate(os.memfd_create("a hole", 0), 1 << 40)

    def check() -> None:
        assert os.pread(3, 5, 0) == b"start"
        assert os.pread(4, 3, 200_000) == b"end"
        assert (os.fstat(3).st_uid, os.fstat(3).st_gid, os.fstat(3).st_mode & 0o7777) == (5, 6, 0o640)
        assert os.lseek(3, 0, os.SEEK_CUR) == 77
        assert os.lseek(4, 0, os.SEEK_CUR) == 0
        with pytest.raises(PermissionError):
            os.write(3, b"x")

    round_trip(body, check)


def test_an_unmapped_memfd_with_pages_beyond_its_end() -> None:
    """As of a huge page (shmem_enabled), or by fallocate: they are no contents."""

    def body() -> None:
        keep_size = 1
        number = os.memfd_create("small", 0)
        os.write(number, b"contents")
        if ctypes.CDLL(None).fallocate(number, keep_size, ctypes.c_long(0), ctypes.c_long(4 << 20)):
            raise OSError
        assert os.fstat(number).st_blocks * 512 == 4 << 20

    def check() -> None:
        assert os.pread(3, 100, 0) == b"contents"

    round_trip(body, check)


def test_a_mapped_memfd_is_opened_from_what_is_handed_over() -> None:
    import mmap

    def body() -> None:
        number = os.memfd_create("shared", os.MFD_ALLOW_SEALING)
        os.ftruncate(number, 8192)
        body.kept = mmap.mmap(number, 8192)  # type: ignore[attr-defined]
        os.lseek(number, 5, os.SEEK_SET)
        os.dup(number)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)

    with child(body) as original:
        table = original.survey()
    (file,) = table.memory_files()
    key = descriptors.shared_object_key(file)
    with pytest.raises(RestoreError, match="does not hold its contents"), restored(table):
        pass
    handed = os.memfd_create("handed over", os.MFD_ALLOW_SEALING)
    os.ftruncate(handed, 8192)
    os.pwrite(handed, b"12345678", 0)

    def check() -> None:
        assert os.read(3, 2) == b"67"
        assert os.read(5, 1) == b"8"
        with pytest.raises(PermissionError):
            os.ftruncate(3, 100_000)

    try:
        with restored(table, check, shared={key: handed}) as copy:
            assert copy.survey().unsupported == []
            copy.go()
    finally:
        os.close(handed)


def test_async_mode_is_restored_for_the_process_itself() -> None:
    def body() -> None:
        reader, _ = os.pipe()
        fcntl.fcntl(reader, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGUSR2)
        fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)

    with child(body) as original:
        (owner,) = original.survey().owners
        assert (owner.pid, owner.signal, owner.description) == (original.pid, signal.SIGUSR2, 1)

    def foreign() -> None:
        body()
        fcntl.fcntl(3, fcntl.F_SETSIG, signal.SIGURG)  # which is ignored
        fcntl.fcntl(3, fcntl.F_SETOWN, os.getppid())

    with child(foreign) as original:
        (complaint,) = original.survey().unsupported
        assert complaint.startswith("fd 3 (pipe:[") and "O_ASYNC" in complaint


def test_an_owner_who_waits_for_the_mode_is_kept() -> None:
    """F_SETOWN and F_SETSIG may come long before O_ASYNC."""

    def body() -> None:
        for number in os.pipe():  # 3, 4
            fcntl.fcntl(number, fcntl.F_SETSIG, signal.SIGUSR2)
        fcntl.fcntl(3, fcntl.F_SETOWN, os.getpid())

    with child(body) as original:
        first, second = original.survey().owners
        assert (first.pid, first.signal, first.on) == (original.pid, signal.SIGUSR2, False)
        assert (second.pid, second.signal, second.on) == (0, signal.SIGUSR2, False)


def test_what_became_of_a_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(100))

    def body() -> None:
        os.lseek(os.open(path, os.O_RDONLY), 50, os.SEEK_SET)

    with child(body) as original:
        table = original.survey()
    path.write_bytes(bytes(200))
    descriptors.check_files(table)
    path.write_bytes(bytes(50))
    descriptors.check_files(table)
    path.write_bytes(bytes(49))
    with pytest.raises(FileChanged, match=r"fd 3 \(file .*data\): open: is 49 bytes long now"):
        descriptors.check_files(table)
    path.unlink()
    with pytest.raises(FileChanged, match=r"No such file or directory; put .* back"):
        descriptors.check_files(table)
    path.mkdir()
    with pytest.raises(FileChanged, match="was a regular file, is a directory now"):
        descriptors.check_files(table)
    assert isinstance(record(table, 3), RegularFile)
