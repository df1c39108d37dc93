"""Start victims, ask them something, end them: only by PID, and only those started here.

Facts: a restored process is a child of whoever restored it, or an orphan if that one has exited; PID 1 of a container
  does not always reap orphans, and a zombie occupies its PID, which the next restore needs.
Choice: the benchmark is a child subreaper, so every victim and every copy ends as its child and is reaped here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
CLASSES = REPO / ".cache" / "bench" / "classes"
PR_SET_CHILD_SUBREAPER = 36
PATIENCE = 300.0  # seconds after which a victim that does not answer is an error, never a figure
WARM_UP = 20  # requests


class Unresponsive(Exception):
    """A victim did not answer, or answered wrongly."""


@dataclass(frozen=True)
class Kind:
    """A program that answers on the Unix socket that it is given as the last argument but `more`."""

    name: str
    command: tuple[str, ...]
    more: tuple[str, ...] = ()
    forks: bool = False  # it can answer /fork from a child of fork()
    http: bool = True

    def start(self, path: Path) -> Victim:
        """Start it in its own session, with /dev/null as its streams."""
        path.unlink(missing_ok=True)
        process = subprocess.Popen(
            [*self.command, str(path), *self.more],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OPENBLAS_NUM_THREADS": "2"},
        )
        process.returncode = 0  # reaped by end(), not by Popen's destructor
        return Victim(process.pid, path, self.http)


def worker(megabytes: int, name: str = "") -> Kind:
    """The numpy worker with a data set of so many MiB; with the interpreter and numpy it has about 58 more."""
    return Kind(name, (sys.executable, str(HERE / "worker.py")), (str(megabytes),), forks=True)


def hoard(megabytes: int, mode: str) -> Kind:
    """hoard.py with so many MiB, in one of its modes."""
    return Kind("hoard", (sys.executable, str(HERE / "hoard.py")), (str(megabytes), mode), http=False)


WORKER = worker(70, "numpy, 128 MiB")
SET = (
    WORKER,
    worker(450, "numpy, 512 MiB"),
    worker(1990, "numpy, 2 GiB"),
    Kind("Node", ("node", str(HERE / "node_worker.js"))),
    # Its performance data lie in a file that any other JVM removes when it finds the process gone.
    Kind("JVM", ("java", "-XX:-UsePerfData", "-Xmx512m", "-cp", str(CLASSES), "JvmWorker")),
)


def prepare(kinds: Iterable[Kind]) -> None:
    """Bring what these victims need: Debian's Node and JDK by tools/setup, if absent. Raises CalledProcessError."""
    programs = {kind.command[0] for kind in kinds}
    if any(shutil.which(program) is None for program in programs) or ("java" in programs and not shutil.which("javac")):
        print("bench: no Node or JDK here; tools/setup --test installs Debian's", file=sys.stderr)
        subprocess.run([REPO / "tools" / "setup", "--test", "--quiet"], check=True)
    if "java" in programs:
        subprocess.run(["javac", "-d", CLASSES, HERE / "JvmWorker.java"], check=True)


@dataclass(frozen=True)
class Victim:
    """A running process of ours and the Unix socket it answers on."""

    pid: int
    path: Path
    http: bool

    def ask(self, what: str = "/") -> str:
        """The answer to one request, asked as soon as the victim listens. Raises Unresponsive."""
        with self.asking(what) as answer:
            return answer

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[str]:
        """The same with our side of the connection still open. Raises Unresponsive."""
        deadline = time.monotonic() + PATIENCE
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    answer = _ask(client, self.path, what, self.http)
                except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError) as error:
                    if time.monotonic() > deadline or not Path(f"/proc/{self.pid}").exists():
                        raise Unresponsive(f"process {self.pid} does not answer on {self.path}: {error}") from error
                    select.select([], [], [], 0.0005)
                    continue
                yield answer
                return

    def warm_up(self) -> str:
        """The answer after some requests, which must all be alike."""
        answers = {self.ask() for _ in range(WARM_UP)}
        if len(answers) != 1:
            raise Unresponsive(f"process {self.pid} gives different answers")
        return answers.pop()


def become_subreaper() -> None:
    """Adopt orphaned descendants. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end(pid: int) -> None:
    """Kill a process and wait until its PID is free; it may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    reap(pid)


def reap(pid: int) -> None:
    """Wait for the end of a process, reap it if it is ours, and return when its PID is free."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            select.select([pidfd], [], [])
        finally:
            os.close(pidfd)
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}").exists():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            raise Unresponsive(f"process {pid} has ended, but nobody reaps it")
        select.select([], [], [], 0.0005)


@contextlib.contextmanager
def running(kind: Kind, path: Path) -> Iterator[Victim]:
    """A victim that is ended on the way out, whoever runs under its PID then (it or its restored copy)."""
    victim = kind.start(path)
    try:
        yield victim
    finally:
        end(victim.pid)


def _ask(client: socket.socket, path: Path, what: str, http: bool) -> str:
    client.settimeout(PATIENCE)
    client.connect(str(path))
    client.sendall(f"GET {what} HTTP/1.0\r\n\r\n".encode() if http else b"?")
    answer = b""
    while piece := client.recv(65536):
        answer += piece
    if not answer:
        raise ConnectionResetError(f"empty answer from {path}")
    return answer.rpartition(b"\r\n\r\n")[2].decode()
