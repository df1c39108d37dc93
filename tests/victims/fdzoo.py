"""One of everything that a descriptor can be. usage: fdzoo.py CONTROL_SOCKET [ODDITY...], in a directory of its own.

Requests: "observe": what can be seen without changing anything, as JSON; equal before and after. "drain": read, receive
and wait for everything that is queued, as JSON; equal in the copy and in a twin that was never snapshotted. "timers":
what armed timers do from now on. The oddities are half-pipes, packets, half-sockets, path, sparse.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import termios
from pathlib import Path

import control

libc = ctypes.CDLL(None, use_errno=True)
F_GETPIPE_SZ, F_SETPIPE_SZ, F_ADD_SEALS, F_GET_SEALS = 1032, 1031, 1033, 1034
SYS_KCMP, KCMP_FILE = 312, 0
EPOLL_CTL_ADD = 1
CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME = 0, 1, 7
names: dict[str, int] = {}
oddities = sys.argv[2:]
keep: list[object] = []


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Itimerspec(ctypes.Structure):
    _fields_ = (("interval", Timespec), ("value", Timespec))


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def add(name: str, fd: int, *, inheritable: bool = False) -> int:
    os.set_inheritable(fd, inheritable)
    names[name] = fd
    return fd


def at(name: str, fd: int, number: int) -> int:
    """Move a descriptor to a number, leaving a gap."""
    os.dup2(fd, number)
    os.close(fd)
    return add(name, number)


def settime(fd: int, first: float, interval: float, absolute: bool) -> None:
    def split(seconds: float) -> Timespec:
        return Timespec(int(seconds), int(seconds % 1 * 1e9))

    spec = Itimerspec(split(interval), split(first))
    check(libc.timerfd_settime(fd, int(absolute), ctypes.byref(spec), None))


def files() -> None:
    Path("text").write_bytes(bytes(range(256)) * 64)
    add("offset", os.open("text", os.O_RDONLY))
    os.lseek(names["offset"], 1234, os.SEEK_SET)
    add("offset duplicate", os.dup(names["offset"]), inheritable=True)
    add("offset own", os.open("text", os.O_RDWR | os.O_NOATIME))
    os.lseek(names["offset own"], 77, os.SEEK_SET)
    add("append", os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640))
    os.write(names["append"], b"first line\n")
    add("sparse", os.open("sparse", os.O_RDWR | os.O_CREAT, 0o600))
    os.lseek(names["sparse"], 1 << 33, os.SEEK_SET)
    fcntl.flock(add("locked", os.open("locked", os.O_RDWR | os.O_CREAT, 0o600)), fcntl.LOCK_EX)
    add("range", os.open("locked", os.O_RDWR))
    fcntl.lockf(names["range"], fcntl.LOCK_EX, 10, 5)
    at("high", os.open("text", os.O_RDONLY), 900)
    add("duplicate of high", os.dup(900))
    add("directory", os.open(".", os.O_RDONLY | os.O_DIRECTORY))
    if "path" in oddities:
        add("path", os.open("text", os.O_PATH))
    for device in ("null", "zero", "full", "urandom", "random"):
        add(device, os.open(f"/dev/{device}", os.O_RDWR if device in ("null", "zero") else os.O_RDONLY))
    at("null high", os.open("/dev/null", os.O_WRONLY | os.O_NONBLOCK), 901)


def pipes() -> None:
    reader, writer = os.pipe()
    add("pipe reader", reader)
    add("pipe writer", writer)
    fcntl.fcntl(writer, F_SETPIPE_SZ, 1 << 18)
    os.write(writer, bytes(range(250)) * 400)
    reader, writer = os.pipe2(os.O_NONBLOCK)
    add("pipe empty reader", reader)
    at("pipe empty writer", writer, 700)
    if "half-pipes" in oddities:
        reader, writer = os.pipe()
        os.write(writer, b"the writer is gone")
        os.close(writer)
        add("pipe half reader", reader)
        reader, writer = os.pipe()
        os.close(reader)
        add("pipe half writer", writer)
    if "packets" in oddities:
        reader, writer = os.pipe2(os.O_DIRECT)
        add("packets reader", reader)
        add("packets writer", writer)
        for packet in (b"one", b"two two", b"three three three"):
            os.write(writer, packet)
    os.mkfifo("fifo")
    add("fifo both", os.open("fifo", os.O_RDWR | os.O_NONBLOCK))
    add("fifo reader", os.open("fifo", os.O_RDONLY))
    add("fifo writer", os.open("fifo", os.O_WRONLY))
    os.write(names["fifo writer"], b"in the fifo")


def events() -> None:
    add("eventfd", os.eventfd(41, os.EFD_NONBLOCK))
    add("semaphore", os.eventfd(3, os.EFD_NONBLOCK | os.EFD_SEMAPHORE))
    for name, clock, first, interval, absolute in (
        ("periodic", CLOCK_MONOTONIC, 0.02, 0.02, False),
        ("once", CLOCK_BOOTTIME, 0.3, 0, False),
        ("expired", CLOCK_MONOTONIC, 0.000001, 0, False),
        ("disarmed", CLOCK_REALTIME, 0, 0, False),
        ("never", CLOCK_MONOTONIC, 1e6, 0.5, False),
        ("absolute", CLOCK_REALTIME, 4e9, 0, True),
    ):
        fd = check(libc.timerfd_create(clock, os.O_NONBLOCK | os.O_CLOEXEC))
        add(f"timerfd {name}", fd)
        settime(fd, first, interval, absolute)
    select.select([names["timerfd expired"]], [], [])
    mask = {signal.SIGUSR1, signal.SIGRTMIN + 3}
    signal.pthread_sigmask(signal.SIG_BLOCK, mask)
    bits = ctypes.c_uint64(sum(1 << (number - 1) for number in mask))
    add("signalfd", check(libc.syscall(289, -1, ctypes.byref(bits), 8, os.O_NONBLOCK | os.O_CLOEXEC)))
    os.kill(os.getpid(), signal.SIGUSR1)
    libc.sigqueue.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    for value in (11, 22):
        check(libc.sigqueue(os.getpid(), signal.SIGRTMIN + 3, value))


def epolls() -> None:
    outer = add("epoll", check(libc.epoll_create1(os.O_CLOEXEC)))
    inner = add("epoll inner", check(libc.epoll_create1(os.O_CLOEXEC)))
    for epoll, name, mask, data in (
        (outer, "pipe reader", select.EPOLLIN, 0x1111111111111111),
        (outer, "pipe empty reader", select.EPOLLIN | select.EPOLLET, 0xFFFFFFFFFFFFFFFF),
        (outer, "eventfd", select.EPOLLIN | select.EPOLLOUT | select.EPOLLET, 7),
        (outer, "semaphore", select.EPOLLIN | select.EPOLLONESHOT, 8),
        (outer, "timerfd never", select.EPOLLIN | select.EPOLLPRI, 9),
        (inner, "fifo both", select.EPOLLIN, 10),
        (outer, "epoll inner", select.EPOLLIN, 11),
        (inner, "tcp4", select.EPOLLIN | select.EPOLLEXCLUSIVE, 12),
    ):
        event = struct.pack("<IQ", mask & 0xFFFFFFFF, data)
        check(libc.epoll_ctl(epoll, EPOLL_CTL_ADD, names[name], event))


def memfds() -> None:
    fd = add("memfd", os.memfd_create("zoo", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.write(fd, b"contents" * 5000)
    os.lseek(fd, 4097, os.SEEK_SET)
    fcntl.fcntl(fd, F_ADD_SEALS, 0x0002 | 0x0004)  # shrink, grow
    fd = add("memfd sparse", os.memfd_create("hole", 0), inheritable=True)
    os.ftruncate(fd, 1 << 30 if "sparse" in oddities else 1 << 19)
    os.pwrite(fd, b"island", 1 << 18)


def sockets() -> None:
    def put(name: str, made: socket.socket) -> socket.socket:
        names[name] = made.fileno()
        keep.append(made)
        return made

    for name, family, address in (("tcp4", socket.AF_INET, "127.0.0.1"), ("tcp6", socket.AF_INET6, "::1")):
        made = put(name, socket.socket(family, socket.SOCK_STREAM))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 3)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 70000)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((address, 0))
        made.listen(17)
    for name, address in (("unix listening", "./zoo.socket"), ("abstract", f"\0lazyrestore-zoo-{os.getpid()}")):
        made = put(name, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        made.bind(address)
        made.setblocking(False)
        made.listen(5)
    made = put("unix datagram", socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    made.bind("./datagram.socket")
    for name, family, address in (("udp4", socket.AF_INET, "127.0.0.1"), ("udp6", socket.AF_INET6, "::1")):
        made = put(name, socket.socket(family, socket.SOCK_DGRAM))
        made.bind((address, 0))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 60000)
    put("udp unbound", socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    put("tcp fresh", socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    for name, kind in (
        ("stream", socket.SOCK_STREAM),
        ("seqpacket", socket.SOCK_SEQPACKET),
        ("dgram", socket.SOCK_DGRAM),
    ):
        left, right = socket.socketpair(socket.AF_UNIX, kind)
        put(f"{name} left", left)
        put(f"{name} right", right)
        for message in (b"first", b"second message", b"x" * 3000):
            left.send(message)
        right.send(b"backwards")
    if "half-sockets" not in oddities:
        return
    left, right = socket.socketpair()
    put("half left", left).send(b"last words")
    put("half right", right)
    left.shutdown(socket.SHUT_WR)
    left, right = socket.socketpair()
    left.send(b"the peer is gone")
    left.close()
    put("orphan", right)


OPTIONS = {
    "reuse": (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    "reuseport": (socket.SOL_SOCKET, socket.SO_REUSEPORT),
    "keepalive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    "broadcast": (socket.SOL_SOCKET, socket.SO_BROADCAST),
    "rcvbuf": (socket.SOL_SOCKET, socket.SO_RCVBUF),
    "sndbuf": (socket.SOL_SOCKET, socket.SO_SNDBUF),
    "accepts": (socket.SOL_SOCKET, socket.SO_ACCEPTCONN),
    "type": (socket.SOL_SOCKET, socket.SO_TYPE),
    "nodelay": (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    "defer": (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT),
    "v6only": (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
}


def observe_socket(fd: int) -> dict[str, object]:
    seen: dict[str, object] = {}
    with socket.socket(fileno=os.dup(fd)) as made:
        seen["family"], seen["name"] = made.family, str(made.getsockname())
        for name, (level, option) in OPTIONS.items():
            try:
                seen[name] = made.getsockopt(level, option)
            except OSError as error:
                seen[name] = error.errno
    return seen


def same_file(left: int, right: int) -> bool:
    pid = os.getpid()
    return check(libc.syscall(SYS_KCMP, pid, pid, KCMP_FILE, left, right)) == 0


def epoll_table(fd: int) -> list[str]:
    """Targets, event masks and data of an epoll, without what belongs to the target's inode."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return sorted(line.split("pos:")[0].strip() for line in lines if line.startswith("tfd"))


def observe() -> str:
    seen: dict[str, object] = {"open": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1]}
    for name, fd in names.items():
        status = os.fstat(fd)
        here: dict[str, object] = {
            "fd": fd,
            "type": stat.S_IFMT(status.st_mode),
            "size": status.st_size if stat.S_ISREG(status.st_mode) else 0,
            "mode": status.st_mode if not stat.S_ISSOCK(status.st_mode) else 0,
            "flags": fcntl.fcntl(fd, fcntl.F_GETFL),
            "cloexec": fcntl.fcntl(fd, fcntl.F_GETFD),
            "same": [other for other, number in names.items() if same_file(fd, number)],
        }
        if stat.S_ISREG(status.st_mode) and name != "path":
            here["offset"] = os.lseek(fd, 0, os.SEEK_CUR)
        if stat.S_ISFIFO(status.st_mode):
            here["capacity"] = fcntl.fcntl(fd, F_GETPIPE_SZ)
            here["queued"] = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0]
        if stat.S_ISSOCK(status.st_mode):
            here |= observe_socket(fd)
        if name.startswith("memfd"):
            here["seals"] = fcntl.fcntl(fd, F_GET_SEALS)
            here["link"] = os.readlink(f"/proc/self/fd/{fd}")
        if name.startswith("epoll"):
            here["table"] = epoll_table(fd)
        if name.startswith("timerfd"):
            spec = Itimerspec()
            check(libc.timerfd_gettime(fd, ctypes.byref(spec)))
            info = Path(f"/proc/self/fdinfo/{fd}").read_text()
            here["interval"] = spec.interval.seconds * 10**9 + spec.interval.nanoseconds
            here["clock"] = [line for line in info.splitlines() if line.startswith(("clockid", "settime flags"))]
            if name in ("timerfd expired", "timerfd disarmed", "timerfd never", "timerfd absolute"):
                here["armed"] = bool(spec.value.seconds or spec.value.nanoseconds)
            if name in ("timerfd expired", "timerfd disarmed", "timerfd never", "timerfd absolute"):
                here["ticks"] = [line for line in info.splitlines() if line.startswith("ticks")]
        seen[name] = here
    return json.dumps(seen, sort_keys=True)


def receive(name: str, size: int) -> str:
    with socket.socket(fileno=os.dup(names[name])) as made:
        try:
            return made.recv(size, socket.MSG_DONTWAIT).decode()
        except OSError as error:
            return f"errno {error.errno}"


def read(name: str, size: int) -> str:
    try:
        return os.read(names[name], size).hex()
    except OSError as error:
        return f"errno {error.errno}"


def locked(operation: str) -> bool:
    """Whether another process is refused the lock."""
    code = "import fcntl, sys\nwith open('locked', 'r+') as file: "
    return os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", f"{code} {operation}") != 0


def drain() -> str:
    seen: dict[str, object] = {}
    seen["flock"] = locked("fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)")
    for start in (9, 12, 15, 5):
        seen[f"lockf {start}"] = locked(f"fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, {start})")
    buffer = ctypes.create_string_buffer(12 * 32)
    for name in ("epoll", "epoll inner", "epoll"):
        count = check(libc.epoll_wait(names[name], buffer, 32, 0))
        found = sorted(struct.unpack_from("<IQ", buffer.raw, 12 * index) for index in range(count))
        seen[f"{name} {'again' if name in seen else ''}"] = found
        seen[name] = found
    os.write(names["pipe empty writer"], b"edge")
    count = check(libc.epoll_wait(names["epoll"], buffer, 32, 0))
    seen["epoll edge"] = sorted(struct.unpack_from("<IQ", buffer.raw, 12 * index) for index in range(count))
    seen["offsets"] = [
        read("offset", 10),
        read("offset duplicate", 10),
        read("offset own", 10),
        read("duplicate of high", 4),
    ]
    os.write(names["append"], b"second line\n")
    seen["append"] = Path("log").read_text()
    seen["sparse"] = os.write(names["sparse"], b"end")
    seen["entries"] = sorted(os.listdir(names["directory"]))
    if "path" in names:
        seen["path"] = os.readlink(f"/proc/self/fd/{names['path']}").rpartition("/")[2]
    seen["devices"] = [read("null", 5), read("zero", 5), read("full", 5), len(os.read(names["urandom"], 9))]
    seen["pipe"] = read("pipe reader", 1 << 20)
    os.write(names["pipe writer"], b"more")
    seen["pipe more"] = read("pipe reader", 100)
    seen["pipe empty"] = [read("pipe empty reader", 10), read("pipe empty reader", 10)]
    if "half-pipes" in oddities:
        seen["pipe half"] = [read("pipe half reader", 100), read("pipe half reader", 100)]
        try:
            os.write(names["pipe half writer"], b"x")
        except BrokenPipeError:
            seen["pipe broken"] = True
    if "packets" in oddities:
        seen["packets"] = [read("packets reader", 100) for _ in range(3)]
    seen["fifo"] = read("fifo reader", 100)
    os.write(names["fifo both"], b"again")
    seen["fifo again"] = read("fifo both", 100)
    seen["eventfd"] = [read("eventfd", 8), read("eventfd", 8)]
    seen["semaphore"] = [read("semaphore", 8) for _ in range(4)]
    seen["expired"] = [read("timerfd expired", 8), read("timerfd expired", 8), read("timerfd disarmed", 8)]
    signals = []
    for _ in range(4):
        try:
            info = os.read(names["signalfd"], 128)
            number, _, code = struct.unpack_from("IiI", info)
            value = struct.unpack_from("i", info, 44)[0] if code == 0xFFFFFFFF else 0
            signals.append((number, struct.unpack_from("I", info, 12)[0] == os.getpid(), code, value))
        except BlockingIOError:
            signals.append((0, False, 0, 0))
    seen["signals"] = signals
    seen["memfd"] = [read("memfd", 20), os.pread(names["memfd sparse"], 10, (1 << 18) - 2).hex()]
    try:
        os.ftruncate(names["memfd"], 1)
    except PermissionError:
        seen["sealed"] = True
    for kind in ("stream", "seqpacket", "dgram"):
        seen[f"{kind} pair"] = [receive(f"{kind} right", 100) for _ in range(3)]
        seen[f"{kind} rest"] = [
            receive(f"{kind} right", 5000),
            receive(f"{kind} left", 100),
            receive(f"{kind} left", 9),
        ]
    if "half-sockets" in oddities:
        seen["half"] = [receive("half right", 100), receive("half right", 100)]
        seen["orphan"] = [receive("orphan", 100), receive("orphan", 100)]
    seen["connections"] = [connect(name) for name in ("tcp4", "tcp6", "unix listening", "abstract")]
    seen["datagrams"] = [datagram(name) for name in ("udp4", "udp6", "unix datagram")]
    return json.dumps(seen, sort_keys=True)


def connect(name: str) -> str:
    """A connection to a listening socket of ours, over which the client speaks first."""
    with socket.socket(fileno=os.dup(names[name])) as listener, socket.socket(listener.family) as client:
        client.connect(listener.getsockname())
        client.send(b"hello")
        select.select([listener], [], [])
        accepted, _ = listener.accept()
        with accepted:
            accepted.setblocking(True)
            return accepted.recv(10).decode()


def datagram(name: str) -> str:
    with (
        socket.socket(fileno=os.dup(names[name])) as receiver,
        socket.socket(receiver.family, socket.SOCK_DGRAM) as sender,
    ):
        sender.sendto(b"datagram", receiver.getsockname())
        return receiver.recv(100).decode()


def timers() -> str:
    """Armed timers expire: each of these selects ends only if its timer runs."""
    for name in ("timerfd periodic", "timerfd once", "timerfd periodic"):
        select.select([names[name]], [], [])
        assert struct.unpack("Q", os.read(names[name], 8))[0] >= 1
    return "expired"


for make in (files, pipes, events, memfds, sockets, epolls):
    make()
control.serve(sys.argv[1], lambda request: {"observe": observe, "drain": drain, "timers": timers}[request]())
