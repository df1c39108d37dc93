"""Processes of which there is no snapshot: a clear error with its own exit status, and nothing has happened to them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from helpers import Builder, Victim, Victims, alive, ask, until
from helpers_cli import AS_NOBODY, MAIN, run_cli

import lazyrestore
from lazyrestore import errors

# What the victim holds, and a word by which a person recognises it in the message.
UNSUPPORTED = {
    "connection": "127.0.0.1",
    "child": "child process",
    "io_uring": "io_uring",
    "inotify": "inotify",
    "deleted-file": "deleted",
    "pseudo-terminal": "terminal",
    "raw-socket": "socket",
    "lease": "lease",
    "perf-event": "descriptor",
    "thread-seccomp": "seccomp filters of thread",
    "thread-network": "namespace of its own",
    "thread-place": "umask",
    "thread-deadline": "SCHED_DEADLINE",
    "thread-file": "threads are made after",
    "odd-name": "shared, of a file",
    "deleted-cwd": "working directory",
}


ACCEPT4 = "288 "  # the number of the system call


def switches(pid: int) -> int:
    """How often the process has gone to sleep by itself: unchanged means that nothing woke it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches:"):
            return int(line.split()[1])
    raise AssertionError("no voluntary_ctxt_switches")


def refused(store: lazyrestore.Store, directory: Path, pid: int, kind: type[errors.LazyrestoreError]) -> str:
    """The library raises `kind`, the command line exits with its status and one line; the store holds nothing."""
    with pytest.raises(kind) as caught:
        store.snapshot(pid, name="x")
    assert type(caught.value) is kind
    answer = run_cli(directory / "store", "snapshot", pid, "--name", "x")
    assert answer.returncode == kind.exit_status, answer.stderr
    assert str(pid) in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    assert store.names() == []
    return str(caught.value)


def sleeper(victims: Victims) -> Victim:
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    return victim


def test_no_such_process(run: Path, store: lazyrestore.Store, victims: Victims) -> None:
    victim = sleeper(victims)
    victim.kill()
    refused(store, run, victim.pid, errors.NoSuchProcess)


def test_kernel_thread(run: Path, store: lazyrestore.Store) -> None:
    if Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("process 2 is no kernel thread here (a container)")
    refused(store, run, 2, errors.KernelThread)


def test_zombie(run: Path, store: lazyrestore.Store, victims: Victims) -> None:
    victim = sleeper(victims)
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: not alive(victim.pid), "a zombie")
    refused(store, run, victim.pid, errors.ZombieProcess)


def test_traced(run: Path, store: lazyrestore.Store, victims: Victims) -> None:
    victim = sleeper(victims)
    tracer = victims.python("tracer.py", victim.pid.__str__(), run / "ready")
    tracer.until((run / "ready").exists, "the tracer")
    message = refused(store, run, victim.pid, errors.AlreadyTraced)
    assert str(tracer.pid) in message
    tracer.check()
    victim.check()


def test_32_bit(run: Path, store: lazyrestore.Store, victims: Victims, build: Builder) -> None:
    try:
        program = build.c("nolibc32", "-m32", "-nostdlib", "-static")
        victim = victims.start([program])
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"no 32-bit programs here: {error}")
    refused(store, run, victim.pid, errors.WrongArchitecture)
    victim.check()


def test_somebody_elses(run: Path, victims: Victims) -> None:
    victim = sleeper(victims)
    theirs = run / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    answer = run_cli(theirs / "store", "snapshot", victim.pid, "--name", "x", code=AS_NOBODY)
    assert answer.returncode == errors.NotPermitted.exit_status, answer.stderr
    victim.check()
    assert Path(f"/proc/{victim.pid}/wchan").exists()


def test_ourselves(run: Path, store: lazyrestore.Store) -> None:
    with pytest.raises(errors.OwnProcess):
        store.snapshot(os.getpid(), name="x")
    code = f"import os, sys; sys.argv[sys.argv.index('SELF')] = str(os.getpid()); {MAIN}"
    answer = run_cli(run / "store", "snapshot", "SELF", "--name", "x", code=code)
    assert answer.returncode == errors.OwnProcess.exit_status, answer.stderr


def start_unsupported(victims: Victims, run: Path, *kinds: str) -> tuple[Victim, Path]:
    victim = victims.python("unsupported.py", run / "control", *kinds, cwd=run)
    victim.listens(run / "control")
    return victim, run / "control"


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported(run: Path, store: lazyrestore.Store, victims: Victims, kind: str) -> None:
    victim, control = start_unsupported(victims, run, kind)
    message = refused(store, run, victim.pid, errors.UnsupportedResources)
    assert UNSUPPORTED[kind] in message
    assert ask(control, "still") == "here"


def test_all_that_is_unsupported_at_once_and_without_a_freeze(
    run: Path, store: lazyrestore.Store, victims: Victims
) -> None:
    victim, control = start_unsupported(victims, run, *UNSUPPORTED)
    victim.until(lambda: Path(f"/proc/{victim.pid}/syscall").read_text().startswith(ACCEPT4), "a waiting victim")
    before = switches(victim.pid)
    with pytest.raises(errors.UnsupportedResources) as caught:
        store.snapshot(victim.pid, name="x")
    assert switches(victim.pid) == before, "the victim was woken"
    assert all(word in str(caught.value) for word in UNSUPPORTED.values()), caught.value.items
    assert len(caught.value.items) >= len(UNSUPPORTED)
    assert store.names() == []
    assert ask(control, "still") == "here"


def test_a_file_behind_a_closed_directory(run: Path, victims: Victims) -> None:
    """Its user is told why its path is of no use; not that somebody replaced the file."""
    closed, theirs = run / "closed", run / "theirs"
    closed.mkdir(mode=0o700)
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)

    def become_nobody() -> None:
        os.dup2(os.open(closed / "log", os.O_CREAT | os.O_WRONLY), 1)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

    victim = victims.start(["sleep", "1000000"], prepare=become_nobody)
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    answer = run_cli(theirs / "store", "snapshot", victim.pid, "--name", "x", code=AS_NOBODY)
    assert answer.returncode == errors.UnsupportedResources.exit_status, answer.stderr
    assert "its path may not be looked at by this user" in answer.stderr
    victim.check()
