"""Everything that cannot be restored is listed, all at once; nothing is left open; a survey consumes nothing."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import pty
import re
import select
import signal
import socket
import struct
import threading
from pathlib import Path

import pytest
from helpers import open_descriptors
from resources.interpreter import child, record, round_trip

from lazyrestore._native import _core
from lazyrestore.errors import NoSuchProcess
from lazyrestore.kernel import procfs
from lazyrestore.resources import descriptors, vma
from lazyrestore.resources.pipe import PipeEnd

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_PERF_EVENT_OPEN, _SYS_USERFAULTFD, _SYS_IO_URING_SETUP, _SYS_MQ_OPEN = 298, 323, 425, 240


def _opened(number: int) -> int:
    assert number >= 0, os.strerror(ctypes.get_errno())
    return number


def test_all_at_once(tmp_path: Path) -> None:
    def connection(at: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
        os.dup2(client.detach(), at)
        os.dup2(server.detach(), at + 1)

    def body() -> None:
        queue = f"lazyrestore-{os.getpid()}".encode()
        connection(100)
        opened = {
            102: _opened(_libc.inotify_init1(0)),
            103: _opened(_libc.fanotify_init(0, 0)),
            104: _opened(_libc.syscall(_SYS_USERFAULTFD, 1)),
            105: _opened(_libc.syscall(_SYS_IO_URING_SETUP, 4, ctypes.create_string_buffer(200))),
            106: os.pidfd_open(os.getpid()),
            107: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).detach(),
            108: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).detach(),
            109: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).detach(),
            110: os.open(tmp_path, os.O_TMPFILE | os.O_RDWR),
            111: os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY),
            112: _opened(_libc.syscall(_SYS_MQ_OPEN, queue, os.O_RDWR | os.O_CREAT, 0o600, None)),
            113: os.open("/proc/self/ns/uts", os.O_RDONLY),
            114: os.open("/dev/kmsg", os.O_RDONLY),
        }
        for number, now in opened.items():
            os.dup2(now, number)
            os.close(now)
        os.closerange(3, 100)
        deleted = os.open(tmp_path / "deleted", os.O_CREAT | os.O_RDWR)
        os.unlink(tmp_path / "deleted")
        os.dup2(deleted, 120)
        replaced = os.open(tmp_path / "replaced", os.O_CREAT | os.O_RDWR)
        os.link(tmp_path / "replaced", tmp_path / "another name")
        (tmp_path / "other").touch()
        os.rename(tmp_path / "other", tmp_path / "replaced")
        os.dup2(replaced, 121)
        os.closerange(3, 100)
        left, right = socket.socketpair()
        socket.send_fds(left, [b"x"], [0])
        os.dup2(left.detach(), 122)
        os.dup2(right.detach(), 123)
        leased = os.open(tmp_path / "leased", os.O_CREAT | os.O_RDONLY)
        fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        os.dup2(leased, 124)
        filtered = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        instruction = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFF))
        program = struct.pack("HxxxxxxQ", 1, ctypes.addressof(instruction))
        filtered.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER
        os.dup2(filtered.detach(), 125)
        os.dup2(os.open("/proc/self/fdinfo/0", os.O_RDONLY), 126)
        os.dup2(os.open(f"/proc/self/task/{os.getpid()}/fdinfo/0", os.O_RDONLY), 127)
        os.mkfifo(tmp_path / "fifo")
        fifo = os.open(tmp_path / "fifo", os.O_RDWR)
        fcntl.flock(fifo, fcntl.LOCK_EX)
        os.dup2(fifo, 128)
        os.closerange(3, 100)

    expected = {
        100: r"established connection 127\.0\.0\.1:\d+ → 127\.0\.0\.1:\d+",
        101: r"established connection 127\.0\.0\.1:\d+ → 127\.0\.0\.1:\d+",
        102: r"\(inotify\)",
        103: r"\(fanotify\)",
        104: r"\(userfaultfd\)",
        105: r"\(io_uring\)",
        106: r"\(pidfd\)",
        107: "AF_NETLINK",
        108: "AF_PACKET",
        109: "SOCK_RAW",
        110: "deleted",
        111: "pseudo-terminal",
        112: "message queue",
        113: r"uts:",
        114: r"device 1:11",
        120: "deleted",
        121: "path does not lead to it",
        123: "in flight",
        124: "LEASE",
        125: "filter is attached",
        126: "belongs to a descriptor",
        127: "belongs to a descriptor",
        128: "holds a lock",
    }
    before = open_descriptors()
    with child(body) as original:
        complaints = original.survey().unsupported
        _libc.syscall(241, f"lazyrestore-{original.pid}".encode())  # mq_unlink
    assert open_descriptors() == before
    found = {int(re.match(r"fd (\d+)", line)[1]): line for line in complaints}  # type: ignore[index]
    assert sorted(found) == sorted(expected)
    for number, pattern in expected.items():
        assert re.search(pattern, found[number]), found[number]
        assert "\n" not in found[number]
        assert all(found[number].count(pair[0]) == found[number].count(pair[1]) for pair in ("()", "[]")), found[number]


SMAPS = """\
7f0000000000-7f0000002000 {permissions} 00000000 00:0e 1050                       {path}
Size:                  8 kB
VmFlags: rd wr mr mw me {flags}
"""


@pytest.mark.parametrize(
    ("permissions", "path", "flags", "complaint"),
    [
        ("rw-s", "/secretmem (deleted)", "ms lo dd", "secret memory (memfd_secret)"),
        ("r--p", "", "ac sl", "sealed memory (mseal)"),
        ("r--p", "[vvar]", "pf io de dd sl", ""),
        ("rw-p", "", "ac", ""),
    ],
)
def test_mappings(permissions: str, path: str, flags: str, complaint: str) -> None:
    mappings = procfs.parse_maps(SMAPS.format(permissions=permissions, path=path, flags=flags).encode())
    assert vma.unsupported(mappings) == ([f"mapping 7f0000000000-7f0000002000: {complaint}"] if complaint else [])


def test_a_descriptor_table_of_a_threads_own_is_refused() -> None:
    def body() -> None:
        ready = threading.Event()

        def alone() -> None:
            assert _libc.unshare(0x400) == 0  # CLONE_FILES
            ready.set()
            threading.Event().wait()

        threading.Thread(target=alone, daemon=True).start()
        ready.wait()

    with child(body) as original:
        (complaint,) = original.survey().unsupported
        assert "descriptor table of its own" in complaint


def test_a_running_process_is_not_disturbed() -> None:
    """The survey before the freeze: no contents, no change, while the process reads and writes."""

    def body() -> None:
        os.pipe()
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        left.detach()
        right.detach()

    shared = mmap.mmap(-1, mmap.PAGESIZE)
    turns, enough = memoryview(shared).cast("Q")[:1], memoryview(shared)[8:9]

    def check() -> None:
        while not enough[0]:
            message = turns[0].to_bytes(4, "little")
            os.write(4, message)
            os.write(5, message)
            assert os.read(3, 100) == message
            assert os.read(6, 100) == message
            turns[0] += 1

    with child(body, check) as original:
        os.kill(original.pid, signal.SIGCONT)
        surveys = 0
        while surveys < 100 or turns[0] < 3000:
            table = descriptors.survey(original.pid, original.pidfd)
            pipes = [one for one in table.descriptions if isinstance(one, PipeEnd)]
            assert all(one.messages == () for one in pipes)
            surveys += 1
        enough[0] = 1
        _, status = os.waitpid(original.pid, 0)
        original.alive = False
        assert status == 0, original.complaint()


def test_a_process_that_is_gone() -> None:
    with child(lambda: None) as original:
        original.go()
        with pytest.raises(NoSuchProcess):
            original.survey()


def test_a_master_terminal_and_a_big_memfd_are_refused() -> None:
    def body() -> None:
        pty.openpty()
        number = os.memfd_create("big", 0)
        os.ftruncate(number, 5 << 30)
        os.write(number, bytes(5 << 20))

    with child(body) as original:
        complaints = original.survey().unsupported
    assert [line.split(" (")[0] for line in complaints] == ["fd 3", "fd 5"]
    assert "not mapped" in complaints[1]


def test_many_descriptors() -> None:
    def body() -> None:
        for _ in range(150):
            os.pipe()
            os.eventfd(7)

    table = round_trip(body)
    assert len(table.descriptors) == 453
    assert record(table, 5).count == 7


def test_thousands_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """All eventfds share an inode: which of them are duplicates takes n log n comparisons, not n²."""
    count = 600
    compared: list[str] = []

    def body() -> None:
        for _ in range(count):
            os.eventfd(7)
        os.dup2(100, 900)
        os.dup2(50, 901)
        os.dup2(100, 902)

    class Counting:
        def __getattr__(self, name: str) -> object:
            if name == "lr_kcmp_file":
                compared.append(name)
            return getattr(_core.lib, name)

    with child(body) as original:
        monkeypatch.setattr(descriptors, "lib", Counting())
        table = original.survey()
        monkeypatch.undo()
    assert {(50, 901), (100, 900, 902)} < {tuple(numbers) for numbers in table.numbers().values() if len(numbers) > 1}
    assert len(table.descriptors) == 3 + count + 3
    assert len(compared) < 20 * count


def test_an_unaccepted_connection_of_the_process_with_itself(tmp_path: Path) -> None:
    def body() -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(tmp_path / "socket"))
        listener.detach()
        client.detach()

    with child(body) as original:
        (complaint,) = original.survey().unsupported
        assert complaint.startswith("fd 4") and "not been accepted" in complaint


def test_epoll_of_a_dup_of_the_same_file_is_exact() -> None:
    """Anonymous inodes share one number: only kcmp tells that number 3 is another eventfd than the watched one."""

    def body() -> None:
        watched = os.eventfd(0)  # 3
        epoll = select.epoll()  # 4
        epoll.register(watched, select.EPOLLIN)
        os.dup2(watched, 30)
        os.dup2(os.eventfd(0), 3)
        body.kept = epoll  # type: ignore[attr-defined]

    with child(body) as original:
        (complaint,) = original.survey().unsupported
        assert "closed file" in complaint
