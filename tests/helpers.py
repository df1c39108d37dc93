"""Start real programs, talk to them, wait for conditions, and leave none of them behind.

Every victim carries a token in its environment. A restored copy has the same environment, and so has whatever either of
them forks: the token finds all of them at the end of a test, whichever way it ended.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

VICTIMS = Path(__file__).parent / "victims"
SYSTEM_PYTHON = "/usr/bin/python3.11"
TOKEN_NAME = "LAZYRESTORE_VICTIM"
GUARD_SECONDS = 60.0  # ends a wait that would never end; no test asserts how fast anything is

T = TypeVar("T")


class Stuck(AssertionError):
    """A condition did not become true within GUARD_SECONDS."""


def until(condition: Callable[[], T | None], what: str, alive: Callable[[], object] = lambda: None) -> T:
    """Poll `condition` until it gives something true, and return that; `alive` may raise to end the wait early.

    OSError and ValueError from the condition count as "not yet": a file that is not there, a port that does not listen.
    """
    deadline = time.monotonic() + GUARD_SECONDS
    failure: Exception | None = None
    idle = select.poll()
    while time.monotonic() < deadline:
        with_error = None
        try:
            if value := condition():
                return value
        except (OSError, ValueError) as error:
            with_error = error
        failure = with_error
        alive()
        idle.poll(2)
    raise Stuck(f"{what}: not within {GUARD_SECONDS:.0f} s" + (f" (last: {failure!r})" if failure else ""))


def ask(path: str | Path, request: str, timeout: float = GUARD_SECONDS) -> str:
    """One request to a victim's Unix socket: a line there, everything until the end back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(os.fspath(path))
        connection.sendall(request.encode() + b"\n")
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    answer = b"".join(parts).decode()
    if not answer:
        raise ConnectionError(f"no answer to {request!r}")
    return answer


def http_get(port: int, path: str) -> bytes:
    """GET by HTTP/1.0 over a connection of its own, the body back; the server closes first."""
    with socket.create_connection(("127.0.0.1", port), timeout=GUARD_SECONDS) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\nConnection: close\r\n\r\n".encode())
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0] + b" ":
        raise ConnectionError(f"GET {path}: {head!r}")
    return body


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(0)` … `work(count - 1)` at once; raise the first error."""
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def open_descriptors() -> list[str]:
    """This process's descriptors; those that earlier tests have left to the garbage collector are closed first."""
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))


@contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port of 127.0.0.1 that nobody is given by chance: only who asks for it, with SO_REUSEADDR, gets it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def children_of(pid: int) -> list[int]:
    """PIDs of the children of all threads of `pid`."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def alive(pid: int) -> bool:
    """Whether `pid` exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def sockets_of(pid: int) -> set[int]:
    """Inodes of the process's sockets."""
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            target = os.readlink(entry.path)
            if target.startswith("socket:"):
                found.add(int(target[8:-1]))
    return found


def connections_of(pid: int) -> set[int]:
    """Inodes of the process's TCP sockets that do not listen: connections, and what is left of them.

    A socket that is closed but still held stands in no table of the kernel, so whatever is in none counts too.
    """
    base = Path(f"/proc/{pid}")
    harmless: set[int] = set()
    for table in ("tcp", "tcp6"):
        rows = [line.split() for line in (base / "net" / table).read_text().splitlines()[1:]]
        harmless |= {int(row[9]) for row in rows if row[3] == "0A"}
    for table, column in (("udp", 9), ("udp6", 9), ("unix", 6), ("netlink", 9)):
        rows = [line.split() for line in (base / "net" / table).read_text().splitlines()[1:]]
        harmless |= {int(row[column]) for row in rows}
    return sockets_of(pid) - harmless


class Victim:
    """A program under test, in a session of its own; `log` is its standard output and error."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.log = log

    def check(self) -> None:
        """Raise if the program has ended."""
        if (status := self.process.poll()) is not None:
            raise AssertionError(f"the victim ended with {status}: {self.log.read_text()[-2000:]}")

    def until(self, condition: Callable[[], T | None], what: str) -> T:
        return until(condition, what, self.check)

    def listens(self, path: Path) -> None:
        """Wait until the process listens on a Unix socket of that name, in whatever directory (it may be chrooted)."""

        def listening() -> bool:
            own = sockets_of(self.pid)
            rows = [line.split() for line in Path(f"/proc/{self.pid}/net/unix").read_text().splitlines()[1:]]
            return any(int(row[6]) in own and row[3] == "00010000" and Path(row[-1]).name == path.name for row in rows)

        self.until(listening, f"a listening socket {path}")

    def quiet(self, sockets: int | None = None) -> None:
        """Wait until the process holds no connection: what a client closed it closes too, but later.

        sockets: wait also until it holds no more than so many sockets; for servers of Unix sockets, where the kernel
        does not tell a connection whose peer is gone from others.
        """
        self.until(lambda: not connections_of(self.pid), f"{self.pid} without connections")
        if sockets is not None:
            self.until(lambda: len(sockets_of(self.pid)) <= sockets, f"{self.pid} with {sockets} sockets")

    def gone(self) -> None:
        """Wait for the end after a snapshot with kill=True, and reap it, so that the PID is free."""
        until(lambda: self.process.poll() is not None, f"the end of the original {self.pid}")

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Victims:
    """Starts victims, and ends everything that carries its token."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.token = uuid.uuid4().hex
        self.leftovers: list[str] = []  # files that victims leave outside their directory, with {pid} in the name
        self._count = 0
        self._started: list[Victim] = []

    def start(
        self,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        prepare: Callable[[], None] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> Victim:
        """Start `command`; `prepare` runs in the child before exec."""
        self._count += 1
        log = self.directory / f"victim{self._count}.log"
        env = {**os.environ, TOKEN_NAME: self.token, "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
        with log.open("ab") as output:
            process = subprocess.Popen(
                [os.fspath(word) for word in command],
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                start_new_session=True,
                preexec_fn=prepare,  # noqa: PLW1509 (given only where the test has no other thread)
            )
        victim = Victim(process, log)
        self._started.append(victim)
        return victim

    def python(self, name: str, *arguments: str | Path, **options: object) -> Victim:
        """Start tests/victims/NAME under this test run's own interpreter."""
        return self.start([sys.executable, VICTIMS / name, *arguments], **options)  # type: ignore[arg-type]

    def log_of(self, pid: int) -> Path:
        """The log of the victim that has or had that PID."""
        return next(victim.log for victim in self._started if victim.pid == pid)

    def marked(self) -> Iterator[int]:
        """PIDs of all processes that carry the token, zombies aside."""
        needle = f"{TOKEN_NAME}={self.token}".encode()
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with suppress(OSError):
                    if needle in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                        yield int(entry)

    def end(self) -> None:
        """Kill everything that carries the token and reap what is ours."""
        while found := list(self.marked()):
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until(lambda: not any(alive(pid) for pid in found), f"the end of {found}")
        for victim in self._started:
            victim.kill()
            for name in self.leftovers:
                Path(name.format(pid=victim.pid)).unlink(missing_ok=True)


class Builder:
    """Compiles C victims, once per test run, into one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def c(self, name: str, *flags: str) -> Path:
        """Compile tests/victims/NAME.c with warnings as errors; return the executable."""
        suffix = "".join(flag for flag in flags).replace("/", "").replace("=", "")
        output = self.directory / f"{name}{suffix}"
        if not output.exists():
            command = ["cc", "-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]
            subprocess.run([*command, VICTIMS / f"{name}.c", "-o", output, *flags], check=True)
        return output

    def java(self, name: str) -> Path:
        """Compile tests/victims/NAME.java; return the class path."""
        output = self.directory / name
        if not output.exists():
            subprocess.run(["javac", "-d", output, VICTIMS / f"{name}.java"], check=True)
        return output

    def go(self, name: str) -> Path:
        """Compile tests/victims/NAME.go, which imports the standard library only; return the executable."""
        output = self.directory / name
        if not output.exists():
            offline = {"GO111MODULE": "off", "GOPROXY": "off", "GOTOOLCHAIN": "local", "GOFLAGS": ""}
            environment = {**os.environ, **offline, "GOCACHE": str(self.directory / "go-cache")}
            subprocess.run(["go", "build", "-o", output, VICTIMS / f"{name}.go"], check=True, env=environment)
        return output
