"""Round trips of pipes and FIFOs; terminals and outside pipes replaced by the restorer's standard streams; epolls."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import socket
from pathlib import Path

import pytest
from resources.interpreter import child, record, restored, round_trip, shape

from lazyrestore.errors import FileChanged
from lazyrestore.resources import descriptors
from lazyrestore.resources.descriptor import READ, WRITE, standard_stream
from lazyrestore.resources.devices import Terminal
from lazyrestore.resources.pipe import ExternalPipe


def test_a_pipe_keeps_its_bytes() -> None:
    def body() -> None:
        _, writer = os.pipe()  # 3, 4
        os.write(writer, b"un")
        os.write(writer, b"read")
        os.dup2(writer, 100)
        os.open("/proc/self/fd/3", os.O_RDONLY | os.O_NONBLOCK)  # 5: a second reading description

    def check() -> None:
        os.write(100, b"!")
        assert os.read(5, 2) == b"un"
        assert os.read(3, 100) == b"read!"
        with pytest.raises(BlockingIOError):
            os.read(5, 1)

    table = round_trip(body, check)
    assert record(table, 4) is record(table, 100)


def test_a_full_pipe_of_another_size_and_one_in_packet_mode() -> None:
    def body() -> None:
        _, writer = os.pipe()  # 3, 4
        assert fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 18) == 1 << 18
        os.set_blocking(writer, False)
        assert os.write(writer, bytes(range(256)) * 1024) == 1 << 18
        _, packets = os.pipe2(os.O_DIRECT)  # 5, 6
        for packet in (b"one", b"two", b"three" * 100):
            os.write(packets, packet)

    def check() -> None:
        with pytest.raises(BlockingIOError):
            os.write(4, b"x")
        data = b""
        while len(data) < 1 << 18:
            data += os.read(3, 1 << 18)
        assert data == bytes(range(256)) * 1024
        assert [os.read(5, 1000) for _ in range(3)] == [b"one", b"two", b"three" * 100]

    round_trip(body, check)


def test_a_pipe_whose_packet_mode_was_switched(tmp_path: Path) -> None:
    """What was written before keeps its ends; open() takes O_DIRECT of no pipe."""
    packets, stream = os.O_DIRECT | os.O_NONBLOCK, os.O_NONBLOCK

    def switched(reader: int, writer: int, *writes: tuple[int, bytes]) -> None:
        for mode, data in writes:
            fcntl.fcntl(writer, fcntl.F_SETFL, mode)
            os.write(writer, data)
        os.set_blocking(reader, False)

    def body() -> None:
        switched(*os.pipe(), (packets, b"one"), (packets, b"two"), (stream, b"3"))  # 3, 4
        switched(*os.pipe(), (packets, b"one"))  # 5, 6
        fcntl.fcntl(6, fcntl.F_SETFL, stream)
        switched(*os.pipe(), (stream, bytes(4096)), (packets, b"one"), (packets, b"."))  # 7, 8
        switched(*os.pipe(), (stream, b"one"))  # 9, 10
        fcntl.fcntl(10, fcntl.F_SETFL, packets)
        path = tmp_path / "fifo"
        os.mkfifo(path)
        end = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # 11
        switched(end, end, (packets, b"one"), (packets, b"two"))

    def check() -> None:
        found = []
        for reader, writer in ((3, 4), (5, 6), (7, 8), (9, 10), (11, 11)):
            os.write(writer, b"new")
            found.append([data[-4:] for data in iter(lambda reader=reader: read(reader), b"")])  # type: ignore[misc]
        assert found == [
            [b"one", b"two", b"3new"],
            [b"one", b"new"],
            [b"\0one", b".", b"new"],
            [b"enew"],
            [b"one", b"two", b"new"],
        ]

    def read(number: int) -> bytes:
        try:
            return os.read(number, 1 << 16)
        except BlockingIOError:
            return b""

    round_trip(body, check)


def test_pipes_and_sockets_belong_to_whom_they_did() -> None:
    """A process that is not root opens what is its own: /dev/stdin, /proc/self/fd/N."""

    def body() -> None:
        os.pipe()  # 3, 4
        for one in socket.socketpair():  # 5, 6
            one.detach()
        socket.create_server(("127.0.0.1", 0)).detach()  # 7
        for number in (3, 5, 7):
            os.fchown(number, 1234, 567)

    def check() -> None:
        owners = [(os.fstat(number).st_uid, os.fstat(number).st_gid) for number in range(3, 8)]
        assert owners == [(1234, 567), (1234, 567), (1234, 567), (0, 0), (1234, 567)]
        os.setgroups([])
        os.setresgid(567, 567, 567)
        os.setresuid(1234, 1234, 1234)
        os.write(4, b"here")
        assert os.read(os.open("/proc/self/fd/3", os.O_RDONLY), 10) == b"here"

    round_trip(body, check)


def test_pipes_whose_other_end_is_closed() -> None:
    def body() -> None:
        reader, writer = os.pipe()  # 3
        os.write(writer, b"rest")
        os.close(writer)
        other, writer = os.pipe()  # 4, 5
        os.close(other)
        assert (reader, writer) == (3, 5)

    def check() -> None:
        assert os.read(3, 10) == b"rest"
        assert os.read(3, 10) == b""
        with pytest.raises(BrokenPipeError):
            os.write(5, b"x")

    round_trip(body, check)


def test_outside_pipes_become_the_standard_streams() -> None:
    stdin, feed = os.pipe()
    out, stdout = os.pipe()

    def body() -> None:
        os.dup2(FEED, 0)
        os.dup2(SINK, 1)
        os.dup2(SINK, 2)
        os.dup2(SINK, 9)
        os.close(FEED)
        os.close(SINK)

    # The test's own pipes reach the child under numbers that it does not close.
    FEED, SINK = 4100, 4101
    os.dup2(stdin, FEED)
    os.dup2(stdout, SINK)
    new_in, new_feed = os.pipe()
    new_out, new_stdout = os.pipe()
    new_err, new_stderr = os.pipe()
    try:
        with child(body) as original:
            table = original.survey()
        assert isinstance(record(table, 0), ExternalPipe)
        assert record(table, 1) is record(table, 2) is record(table, 9)
        assert table.unsupported == []

        def check() -> None:
            assert os.read(0, 10) == b"from new"
            os.write(1, b"to stdout")
            os.write(9, b", again")
            os.write(2, b"to stderr")

        streams = {0: new_in, 1: new_stdout, 2: new_stderr}
        with restored(table, check, streams=streams) as copy:
            assert [one.number for one in copy.survey().descriptors] == [0, 1, 2, 9]
            os.write(new_feed, b"from new")
            copy.go()
        assert os.read(new_out, 100) == b"to stdout, again"
        assert os.read(new_err, 100) == b"to stderr"
    finally:
        for number in (
            stdin,
            feed,
            out,
            stdout,
            FEED,
            SINK,
            new_in,
            new_feed,
            new_out,
            new_stdout,
            new_err,
            new_stderr,
        ):
            os.close(number)


def test_a_terminal_becomes_the_standard_streams() -> None:
    master, slave = pty.openpty()
    name = os.ttyname(slave)

    def body() -> None:
        terminal = os.open(name, os.O_RDWR | os.O_NOCTTY)
        for number in (0, 1, 2, 255):
            os.dup2(terminal, number)
        os.close(terminal)

    try:
        with child(body) as original:
            table = original.survey()
        assert record(table, 255) == Terminal(name.encode(), os.O_RDWR | 0o100000)
        out, stdout = os.pipe()
        with restored(table, lambda: os.write(1, b"hi") and None, streams={1: stdout}) as copy:
            again = copy.survey()
            assert [one.number for one in again.descriptors] == [0, 1, 2, 255]
            assert record(again, 255) is record(again, 0)
            copy.go()
        assert os.read(out, 10) == b"hi"
        os.close(out)
        os.close(stdout)
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize(
    ("number", "access", "shared", "stream"),
    [
        (0, READ, (0,), 0),
        (0, READ | WRITE, (0, 1, 2), 0),
        (1, READ | WRITE, (0, 1, 2), 1),
        (2, WRITE, (1, 2), 2),
        (1, READ, (1,), 0),
        (0, WRITE, (0,), 1),
        (7, WRITE, (2, 7), 2),
        (7, WRITE, (1, 2, 7), 1),
        (7, READ, (7,), 0),
        (255, READ | WRITE, (0, 1, 2, 255), 0),
    ],
)
def test_which_stream_stands_in(number: int, access: int, shared: tuple[int, ...], stream: int) -> None:
    assert standard_stream(number, access, shared) == stream


def test_a_fifo_keeps_its_bytes_unless_somebody_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def body() -> None:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # 3
        writer = os.open(path, os.O_WRONLY)  # 4
        os.open(path, os.O_RDWR)  # 5
        os.write(writer, b"in the fifo")
        os.set_blocking(reader, True)

    def check() -> None:
        assert os.read(3, 100) == b"in the fifo"
        os.write(4, b"more")
        assert os.read(5, 100) == b"more"

    table = round_trip(body, check)
    with child(lambda: None):  # the same with the FIFO held by us: its bytes are where they were
        holder = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            os.write(holder, b"still here")
            with restored(table, check_held) as copy:
                copy.go()
        finally:
            os.close(holder)

    path.unlink()
    with pytest.raises(FileChanged, match="mkfifo"):
        descriptors.check_files(table)


def check_held() -> None:
    assert os.read(3, 100) == b"still here"


def test_a_fifo_with_one_end_does_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    outside = os.open(path, os.O_RDWR)

    def body() -> None:
        os.open(path, os.O_WRONLY)

    try:
        with child(body) as original:
            table = original.survey()
    finally:
        os.close(outside)
    with restored(table) as copy:
        assert shape(copy.survey()) == shape(table)


def test_epolls_watch_what_they_watched() -> None:
    def body() -> None:
        reader, writer = os.pipe()  # 3, 4
        event = os.eventfd(0)  # 5
        inner = select.epoll()  # 6
        outer = select.epoll()  # 7
        inner.register(reader, select.EPOLLIN | select.EPOLLET)
        inner.register(event, select.EPOLLIN | select.EPOLLONESHOT)
        outer.register(inner.fileno(), select.EPOLLIN)
        outer.register(writer, select.EPOLLOUT)
        outer.unregister(writer)
        os.dup2(inner.fileno(), 60)
        for one in (inner, outer):
            body.kept = [*getattr(body, "kept", []), one]  # type: ignore[attr-defined]

    def check() -> None:
        inner, outer = select.epoll.fromfd(60), select.epoll.fromfd(7)
        assert outer.poll(0) == []
        os.write(4, b"x")
        assert outer.poll(0) == [(6, select.EPOLLIN)]
        assert inner.poll(0) == [(3, select.EPOLLIN)]
        assert inner.poll(0) == []
        os.eventfd_write(5, 1)
        assert inner.poll(0) == [(5, select.EPOLLIN)]
        os.eventfd_write(5, 1)
        assert inner.poll(0) == []

    round_trip(body, check)


def test_an_epoll_that_watches_a_closed_number_is_refused() -> None:
    def closed() -> None:
        event = os.eventfd(0)  # 3
        body_epoll = select.epoll()  # 4
        body_epoll.register(event, select.EPOLLIN)
        os.dup2(event, 50)
        os.close(event)
        closed.kept = body_epoll  # type: ignore[attr-defined]

    def replaced() -> None:
        closed()
        os.dup2(os.eventfd(0), 3)

    for body in (closed, replaced):
        with child(body) as original:
            (complaint,) = original.survey().unsupported
            assert complaint.startswith(
                "fd 4 (eventpoll): it still watches a closed file that was descriptor 3 (inode "
            )
