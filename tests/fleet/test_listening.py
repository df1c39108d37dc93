"""Clones of what listens: on another port, sharing a port, on the caller's socket, in a network of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import Victim, Victims, alive, reserved_port, until
from helpers_cli import command, run_cli
from helpers_fleet import descriptors

import lazyrestore
from lazyrestore.resources import listeners


def listener(run: Path, victims: Victims, kind: str) -> tuple[Victim, str, int]:
    """The server, where it listens (a port or a path), and the number of its socket."""
    victim = victims.python("listener.py", run, kind)
    address, number = victim.until(lambda: (run / "address").read_text().split(), "the address")
    assert ask(address) == f"1 {victim.pid}"
    victim.quiet()
    return victim, address, int(number)


def ask(address: str | socket.socket) -> str:
    """The answer of the server that listens at a port, a path, or where a socket does."""
    where = address.getsockname() if isinstance(address, socket.socket) else address
    family = address.family if isinstance(address, socket.socket) else None
    if isinstance(where, str) and where.isdigit():
        where = ("127.0.0.1", int(where))
    if family is None:
        family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET
    with socket.socket(family) as connection:
        connection.settimeout(60)
        connection.connect(where)
        connection.sendall(b"once")
        return connection.makefile().readline().strip()


def ended(process: lazyrestore.RestoredProcess) -> None:
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


def test_on_another_port(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim, port, _ = listener(run, victims, "tcp")
    with store.snapshot(victim.pid, name="x") as snapshot, ExitStack() as reserved:
        ports = [reserved.enter_context(reserved_port()) for _ in range(3)]
        clones = [snapshot.restore(new_pid=True, listen={int(port): new}) for new in ports]
        for new in ports:
            assert [ask(str(new)) for _ in range(2)] == [f"2 {victim.pid}", f"3 {victim.pid}"]
        assert ask(port) == f"2 {victim.pid}"
        with pytest.raises(lazyrestore.errors.RestoreError, match=f"TCP port 1: listen: .*it does on: {port}"):
            snapshot.restore(new_pid=True, listen={1: 2})
        with pytest.raises(lazyrestore.errors.RestoreError, match=r"bind: .*--listen"):
            snapshot.restore(new_pid=True, listen={int(port): ports[0]})
        with pytest.raises(lazyrestore.errors.RestoreError, match=r"bind: .*does not share it"):
            snapshot.restore(new_pid=True, reuseport=True)
        for clone in clones:
            ended(clone)


def test_sharing_a_port(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim, port, _ = listener(run, victims, "tcp")
    with store.snapshot(victim.pid, name="x", kill=True) as snapshot:
        victim.gone()
        clones = snapshot.clones(3, reuseport=True)
        answers = {ask(port) for _ in range(60)}
        assert len(answers) < 60, "a count of its own in each: some come twice"
        for clone in clones:
            ended(clone)


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "unix", "epoll"])
def test_on_a_socket_of_the_caller(run: Path, victims: Victims, store: lazyrestore.Store, kind: str) -> None:
    if kind == "tcp6":
        victim = victims.python("listener.py", run, kind)
        number = int(victim.until(lambda: (run / "address").read_text().split(), "the address")[1])
        expected = 1
    else:
        victim, _, number = listener(run, victims, kind)
        expected = 2
    family = {"tcp6": socket.AF_INET6, "unix": socket.AF_UNIX}.get(kind, socket.AF_INET)
    with store.snapshot(victim.pid, name="x") as snapshot:
        before = descriptors()
        for _ in range(2):
            with socket.socket(family) as own:
                if kind == "unix":
                    own.bind(b"")  # an abstract name that the kernel chooses
                else:
                    own.bind(("::1" if kind == "tcp6" else "127.0.0.1", 0))
                own.listen()
                clone = snapshot.restore(new_pid=True, inherit_fd={number: own.fileno()})
                assert [ask(own) for _ in range(2)] == [f"{expected} {victim.pid}", f"{expected + 1} {victim.pid}"]
                ended(clone)
        # The pager's connection and template, and what the first restore makes for all: the executable, the plan's two
        # memory files, the program of the init; and the mapped files.
        assert descriptors() <= before + 6 + len(snapshot.manifest.files)


def test_what_does_not_listen_is_not_replaced(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim, _, number = listener(run, victims, "tcp")
    with store.snapshot(victim.pid, name="x") as snapshot:
        for wrong in (0, 77):
            with pytest.raises(lazyrestore.errors.RestoreError, match=f"fd {wrong}: inherit: .*fd {number}"):
                snapshot.restore(new_pid=True, inherit_fd={wrong: 0})


def test_only_a_listening_socket_of_its_kind_takes_its_place(
    run: Path, victims: Victims, store: lazyrestore.Store
) -> None:
    """With anything else the process would fail in a call that cannot fail: accept() of its own socket."""
    victim, _, number = listener(run, victims, "tcp")
    with store.snapshot(victim.pid, name="x") as snapshot, ExitStack() as owned:
        before = set(victims.marked())
        folder = os.open(run, os.O_RDONLY)
        owned.callback(os.close, folder)
        idle, unix, datagrams = (
            owned.enter_context(socket.socket(family, kind)).fileno()
            for family, kind in (
                (socket.AF_INET, socket.SOCK_STREAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
                (socket.AF_INET, socket.SOCK_DGRAM),
            )
        )
        for wrong, reason in (
            (folder, "is no socket: Socket operation on non-socket"),
            (1 << 30, "is no socket: Bad file descriptor"),
            (idle, "does not listen"),
            (unix, "of another kind"),
            (datagrams, "of another kind"),
        ):
            for start in (
                lambda fd: snapshot.restore(new_pid=True, inherit_fd=fd),
                lambda fd: snapshot.pool(1, inherit_fd=fd),
            ):
                with pytest.raises(
                    lazyrestore.errors.RestoreError, match=f"fd {number}: inherit: descriptor {wrong} .*{reason}"
                ):
                    start({number: wrong})
        assert set(victims.marked()) == before


def test_recorded_until_it_answers_at_an_address_of_its_own(
    run: Path, victims: Victims, store: lazyrestore.Store
) -> None:
    victim = victims.python("listener.py", run, "tcp6")
    port, _ = victim.until(lambda: (run / "address").read_text().split(), "the address")
    store.snapshot(victim.pid, name="x", kill=True).close()
    victim.gone()
    answer = run_cli(run / "store", "record", "x", "--until-port", port, "--request", "once", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["kept"]


def test_in_a_network_of_its_own(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """Two clones on the original's port beside the original; each answers to who enters its namespace."""
    victim, port, _ = listener(run, victims, "tcp")
    client = (
        "import os, socket, sys; from lazyrestore._native import _core; import ctypes; "
        "ctypes.CDLL(None).setns(os.open(sys.argv[1], 0), 0) == 0 or sys.exit('setns'); "
        "c = socket.create_connection(('127.0.0.1', int(sys.argv[2]))); c.sendall(b'once'); print(c.recv(100).decode())"
    )
    with store.snapshot(victim.pid, name="x") as snapshot:
        clones = snapshot.clones(2, new_net=True)
        for clone in clones:
            words = [sys.executable, "-c", client, f"/proc/{clone.pid}/ns/net", port]
            answer = subprocess.run(words, capture_output=True, text=True, check=False)
            assert answer.stdout.strip() == f"2 {victim.pid}", answer.stderr
        assert ask(port) == f"2 {victim.pid}"
        for clone in clones:
            ended(clone)


@pytest.fixture
def new() -> Iterator[int]:
    """A port that nobody listens on."""
    with reserved_port() as port:
        yield port


def test_on_the_command_line(run: Path, victims: Victims, store: lazyrestore.Store, new: int) -> None:
    victim, port, number = listener(run, victims, "tcp")
    store.snapshot(victim.pid, name="x").close()
    restore = ["restore", "x", "--detach", "--pid", "new", "--json"]
    answer = run_cli(run / "store", *restore, "--listen", f"{port}:{new}")
    assert answer.returncode == 0, answer.stderr
    assert ask(str(new)) == f"2 {victim.pid}"
    pids = [json.loads(answer.stdout)["pid"]]
    with socket.create_server(("127.0.0.1", 0)) as own:
        answer = run_cli(run / "store", *restore, "--inherit-fd", f"{number}:{own.fileno()}", pass_fds=[own.fileno()])
        assert answer.returncode == 0, answer.stderr
        pids.append(json.loads(answer.stdout)["pid"])
        assert ask(own) == f"2 {victim.pid}"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in pids), "the end of the clones")
    twice = ["--listen", f"{port}:{new}", "--listen", f"{port}:{new + 1}"]
    huge = ["--inherit-fd", f"{number}:99999999999999999999"]
    wrong = (["--listen", "80"], ["--listen", "80:x"], twice, ["--inherit-fd", "x"], ["--inherit-fd", "3:999"], huge)
    for words in (*wrong, ["--inherit-fd", f"{number}:0", "--inherit-fd", f"{number}:1"]):
        answer = run_cli(run / "store", *restore, *words)
        assert (answer.returncode, words[0] in answer.stderr) == (2, True), answer.stderr


def test_explained(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """--explain shows the program that the same words without it would run, and refuses what they refuse."""
    victim, port, number = listener(run, victims, "tcp")
    store.snapshot(victim.pid, name="x").close()
    for words, expected, unexpected in (
        (["--listen", f"{port}:1"], "(TCP listener 127.0.0.1:1)", f"127.0.0.1:{port})"),
        (["--reuseport"], f", {socket.SOL_SOCKET}, {socket.SO_REUSEPORT}, data", "unshare("),
        (["--inherit-fd", f"{number}:0"], "# the caller's socket", " bind("),
        (["--net", "new"], "network namespace", "PID namespace"),
        (["--pid", "new"], "PID namespace", "network namespace"),
        (["-n", "2"], "PID namespace", "network namespace"),
    ):
        answer = run_cli(run / "store", "restore", "x", "--explain", *words)
        assert answer.returncode == 0, answer.stderr
        assert expected in answer.stdout
        assert unexpected not in answer.stdout
    for words, status in ((["--listen", "1:2"], 30), (["--inherit-fd", "0:1"], 30)):
        assert run_cli(run / "store", "restore", "x", "--explain", *words).returncode == status


def test_sockets_of_systemd(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """LISTEN_FDS descriptors from 3 on, for the process LISTEN_PID."""
    victim, _, number = listener(run, victims, "tcp")
    store.snapshot(victim.pid, name="x").close()
    words = command(run / "store", "restore", "x", "--pid", "new", "--inherit-fd", number)
    handing_over = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3, inheritable=True); "
        "os.execve(sys.argv[2], sys.argv[2:], {**os.environ, 'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())})"
    )
    with socket.create_server(("127.0.0.1", 0)) as own:
        handed = own.fileno()
        assert handed in listeners.from_systemd({"LISTEN_FDS": "9" * 15, "LISTEN_PID": "1"}, 1)  # what is open, at once
        restorer = subprocess.Popen([sys.executable, "-c", handing_over, str(handed), *words], pass_fds=[handed])
        assert ask(own) == f"2 {victim.pid}"
        restorer.terminate()
        assert restorer.wait() == 128 + signal.SIGTERM
