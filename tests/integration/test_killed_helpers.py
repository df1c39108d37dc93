"""kill -9 of whoever works on a process: the snapshotter, the pager, the pager's keeper."""

from __future__ import annotations

import ctypes
import os
import random
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import Builder, Victim, Victims, alive, ask, until
from helpers_cli import command, run_cli
from helpers_copies import Copies, Copy
from helpers_threads import Threads64

from lazyrestore.errors import RestoreError
from lazyrestore.new_process import NewProcess
from lazyrestore.pager.launch import connect_existing

ROUNDS = 24
PR_SET_CHILD_SUBREAPER = 36  # the same on every architecture
# A snapshotter that says so when it holds `number` threads of its target, and then goes on, or not if it `stays`.
HOLDING = """
import sys
from lazyrestore.kernel import tracee
stop, held = tracee.Frozen._stop, []
def announced(frozen, tid):
    stop(frozen, tid)
    held.append(tid)
    if len(held) == number:
        print("held", flush=True)
        if stays:
            sys.stdin.read()
tracee.Frozen._stop = announced
from lazyrestore.__main__ import entry; entry()
"""


def tracer_of(pid: int) -> int:
    """The tracer of any thread of the process, 0 if there is none."""
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since it was listed
            for line in Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines():
                if line.startswith("TracerPid:") and (tracer := int(line.split()[1])):
                    return tracer
    return 0


def test_killed_snapshotter(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    """At random moments: anywhere in its life; with some threads stopped; from the first stopped thread on.

    A stop makes epoll_wait and a few others return EINTR (signal(7)), and the snapshotter puts that right some
    microseconds later, before it stops the next thread. No tracer can do both in one step, so a kill in between is
    seen, about once in eight hundred kills on an idle machine: one such EINTR for each kill is let pass, no more.
    """
    threads = Threads64(victims, build, run / "threads")
    target, chance = threads.victim.pid, random.Random(os.getpid())
    for number in range(ROUNDS):
        stays = number % 4 == 1
        code = f"number, stays = {chance.randint(1, 64) if stays else 1}, {stays}{HOLDING}"
        with subprocess.Popen(
            command(run / "store", "snapshot", target, "--name", f"x{number}", code=code),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            if number % 2:
                assert process.stdout
                assert process.stdout.readline() == b"held\n"
            if stays:
                assert tracer_of(target) == process.pid
            else:
                select.select([], [], [], chance.random() * (0.03 if number % 2 else 0.6))
            process.kill()
        threads.interruptions += 1
        until(lambda: tracer_of(target) == 0, "the end of tracing")
        threads.moved_on(1)
    verified = run_cli(run / "store", "verify")
    assert verified.returncode == 0, verified.stderr

    threads.process = copies.replace(threads.victim, "last", ignore=("status", "tasks"))
    threads.moved_on()
    threads.check(threads.finish())
    assert threads.process.process.wait(60) == 0


def start(run: Path, victims: Victims, build: Builder) -> tuple[Victim, Path, str]:
    """The memory victim, its control socket, and its digest according to a twin."""
    found = []
    for name in ("twin", "zoo"):
        (run / name).mkdir()
        victim = victims.start([build.c("memzoo"), run / name / "control"], cwd=run / name)
        victim.listens(run / name / "control")
        found.append(victim)
    victims.leftovers.append("/dev/shm/lazyrestore-zoo-{pid}")
    return found[1], run / "zoo" / "control", ask(run / "twin" / "control", "digest")


def answer_or_death(control: Path, pid: int, expected: str) -> str:
    """The victim's digest, or as much of it as came before it died."""
    try:
        answer = ask(control, "digest")
    except OSError:
        answer = ""
    if answer != expected:
        until(lambda: not alive(pid), "the end of a process that does not answer")
    return answer


def pager_and_keeper(copy: Copy) -> tuple[int, int]:
    client = connect_existing(copy.process._key, copy.process.name)
    assert client is not None
    with client:
        return client.pids()


@pytest.mark.parametrize("touched", [False, True], ids=["untouched", "touched"])
def test_killed_pager(run: Path, victims: Victims, copies: Copies, build: Builder, touched: bool) -> None:
    """The process dies, or is served by another: what it answers is right, never zeros."""
    victim, control, expected = start(run, victims, build)
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    for _ in range(5):
        copy = copies.restore(snapshot)
        if touched:
            assert ask(control, "digest") == expected
        pager, _ = pager_and_keeper(copy)
        os.kill(pager, signal.SIGKILL)
        until(lambda: not alive(pager), "the end of the pager")  # noqa: B023
        answer = answer_or_death(control, copy.pid, expected)
        assert expected.startswith(answer)
        if answer != expected:
            assert copy.process.wait(60) == -signal.SIGKILL
        snapshot.close()
        copy.kill()
        snapshot = copies.store.get("x")


def test_killed_pager_of_a_forked_child(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    """fork() in a loop while the pager is killed: no child sees other bytes than its parent."""
    victim, control, _ = start(run, victims, build)
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    chance = random.Random(os.getpid())
    for _ in range(5):
        copy = copies.restore(snapshot)
        asking = subprocess.Popen(
            ["python3", "-c", ASK_FORKS, control], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        select.select([], [], [], chance.random() * 0.05)
        os.kill(pager_and_keeper(copy)[0], signal.SIGKILL)
        answers, _ = asking.communicate()
        assert set(answers.split()) <= {"ok", "gone"}, answers
        copy.kill()
        until(lambda: not list(marked_but_twin(victims, run)), "the end of all children")
        snapshot.close()
        snapshot = copies.store.get("x")


# Asks for forks until the victim is gone, or until it has answered twenty times.
ASK_FORKS = """
import socket, sys
for _ in range(20):
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(sys.argv[1])
            connection.sendall(b"fork\\n")
            answer = connection.recv(1000).decode()
    except OSError:
        answer = ""
    print(answer or "gone")
    if not answer:
        break
"""


def marked_but_twin(victims: Victims, run: Path) -> list[int]:
    found = []
    for pid in victims.marked():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if os.readlink(f"/proc/{pid}/cwd") != str(run / "twin"):
                found.append(pid)
    return found


def test_killed_keeper(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    """The pager starts another keeper and serves on."""
    victim, control, expected = start(run, victims, build)
    copy = copies.replace(victim)
    _, keeper = pager_and_keeper(copy)
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not alive(keeper), "the end of the keeper")
    assert ask(control, "digest") == expected
    copy.check()


def test_killed_restorer(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    """kill -9 of the command line that restores: the process is there and right, or not there at all."""
    victim, control, expected = start(run, victims, build)
    copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    chance = random.Random(os.getpid())
    for _ in range(15):
        process = subprocess.Popen(
            command(run / "store", "restore", "x", "--detach"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        select.select([], [], [], chance.random() * 0.4)
        process.kill()
        process.wait()
        for pid in marked_but_twin(victims, run):
            assert expected.startswith(answer_or_death(control, pid, expected))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        vanished(victim.pid)
    restored = run_cli(run / "store", "restore", "x", "--detach", "--json")
    assert restored.returncode == 0, restored.stderr
    assert ask(control, "digest") == expected
    os.kill(victim.pid, signal.SIGKILL)
    vanished(victim.pid)


# Starts a process that is given so many descriptors that this takes a while.
START_SLOWLY = """
import os, resource, sys
from lazyrestore import spawn
_, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
null = os.open(os.devnull, os.O_RDONLY)
pairs = [(null, number) for number in range(100, limit - 16)] * (300_000 // limit + 1)
spawn.start(pairs, new_pid_namespace=sys.argv[1] == "new")
"""


@pytest.mark.requires("root")
@pytest.mark.parametrize("namespace", ["old", "new"])
def test_killed_while_a_process_starts(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever inherits the new process would be its tracer, and leave it in its first stop for ever."""
    libc = ctypes.CDLL(None)
    assert not libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        restorer = subprocess.Popen([sys.executable, "-c", START_SLOWLY, namespace])
        children = Path(f"/proc/{restorer.pid}/task/{restorer.pid}/children")
        child = int(until(children.read_text, "a child"))
        restorer.kill()
        restorer.wait()
        _, status = os.waitpid(child, 0)
        if os.WIFSTOPPED(status):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert os.WIFEXITED(status) or os.WIFSIGNALED(status)
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def vanished(pid: int) -> None:
    """Wait until init has collected it: nothing half-made may keep the PID."""
    until(lambda: not Path(f"/proc/{pid}").exists(), f"a free process id {pid}")


def test_killed_before_its_settings() -> None:
    """What has ended has no core dump filter to be read: an error of the restore like any other."""
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    process = NewProcess.__new__(NewProcess)
    process.pid = ended.pid
    with pytest.raises(RestoreError, match="somebody ended it"):
        process._set("coredump_filter", 0x33, 16)
    ended.wait()
