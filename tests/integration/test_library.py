"""The library in a program with threads, and the command line as a parent."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import Builder, Victims, alive, ask, http_get, in_threads, until
from helpers_cli import command, run_cli
from helpers_copies import Copies

import lazyrestore

SYS_SETGROUPS, SYS_SETRESGID = 116, 119  # x86-64


def test_eight_threads_restore_at_once(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    program = build.c("small", "-lm")
    snapshots = []
    for number in range(8):
        victim = victims.start([program, run / f"control{number}"])
        victim.listens(run / f"control{number}")
        for _ in range(number):
            ask(run / f"control{number}", "0")
        snapshots.append(copies.snapshot(victim.pid, f"x{number}", kill=True))
        victim.gone()

    def restore(number: int) -> None:
        copy = copies.restore(snapshots[number])
        assert copy.pid == snapshots[number].pid
        assert ask(run / f"control{number}", "0") == f"{1001 + number}\n"
        copy.kill()
        assert copy.process.returncode == -signal.SIGKILL

    for _ in range(5):
        in_threads(8, restore)


def test_snapshots_from_threads(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    """One writer at a time: each call either succeeds or says that the store is busy; none is half done."""
    program = build.c("small", "-lm")
    started = [victims.start([program, run / f"control{number}"]) for number in range(4)]
    for number, victim in enumerate(started):
        victim.listens(run / f"control{number}")
    done = []

    def snapshot(number: int) -> None:
        while True:
            try:
                copies.snapshot(started[number].pid, f"x{number}")
            except lazyrestore.errors.StoreBusy:
                continue
            done.append(f"x{number}")
            return

    in_threads(4, snapshot)
    assert sorted(done) == copies.store.names()
    for number in range(4):
        assert ask(run / f"control{number}", "0") == "1001\n"


def test_like_popen(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    victim = victims.start([build.c("small", "-lm"), run / "control"])
    victim.listens(run / "control")
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    assert snapshot.pages > 0
    assert 0 < snapshot.stored_bytes < snapshot.raw_bytes
    with copies.restore(snapshot).process as process:
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0)
        process.terminate()
    process.kill()
    process.send_signal(signal.SIGUSR1)
    assert [process.returncode, process.wait(), process.poll()] == [-signal.SIGTERM] * 3
    with copies.restore(snapshot).process as process, pytest.raises(ConnectionError):
        ask(run / "control", "exit")
    assert process.returncode == 7


def test_standard_streams(run: Path, victims: Victims, copies: Copies) -> None:
    """Pipes to the outside become the restorer's own streams."""
    reader, writer = os.pipe()
    code = "import sys; open('ready', 'w').close()\nfor line in sys.stdin: print('got', line.strip(), flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=writer,
        cwd=run,
        env={**os.environ, "LAZYRESTORE_VICTIM": victims.token},
    )
    until((run / "ready").exists, "the victim")
    snapshot = copies.snapshot(process.pid, "x", kill=True)
    process.communicate()
    os.close(writer)
    os.close(reader)
    answer = subprocess.run(
        command(run / "store", "restore", snapshot.name),
        input="hello\nthere\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout == "got hello\ngot there\n", answer.stderr
    assert answer.returncode == 0


def test_the_command_line_is_a_parent(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    """In the foreground it forwards signals and exits with the process's status."""
    victim = victims.start([build.c("small", "-lm"), run / "control"])
    victim.listens(run / "control")
    copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    for request, status in (("exit", 7), ("", 128 + signal.SIGTERM)):
        parent = subprocess.Popen(command(run / "store", "restore", "x"), stdin=subprocess.DEVNULL)
        until(lambda: ask(run / "control", "0") == "1001\n", "the copy")
        if request:
            with pytest.raises(ConnectionError):
                ask(run / "control", request)
        else:
            parent.terminate()
        assert parent.wait() == status
        until(lambda: not alive(victim.pid), "the end of the copy")


def test_a_process_that_cannot_be_told_of_is_ended(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    """The foreground tells on standard error, so that standard output is the process's alone."""
    victim = victims.start([build.c("small", "-lm"), run / "control"])
    victim.listens(run / "control")
    copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    with open("/dev/full", "w") as full:
        words = command(run / "store", "restore", "x", "--json")
        assert subprocess.run(words, stdin=subprocess.DEVNULL, stderr=full, check=False).returncode == 1
    assert not alive(victim.pid)


def test_the_main_job_on_the_command_line(run: Path, victims: Victims) -> None:
    """snapshot --kill, ls, show, restore --detach, stats, verify, rm; each answer as JSON."""
    store = run / "store"
    (run / "data").mkdir()
    for name in range(8):
        np.save(run / "data" / f"{name}.npy", np.random.default_rng(name).normal(size=(512, 1024)))
    worker = victims.python("numpy_worker.py", run / "data", run / "port")
    port = worker.until(lambda: int((run / "port").read_text()), "the port")
    expected = http_get(port, "/digest")
    worker.quiet()

    def cli(*arguments: object) -> object:
        answer = run_cli(store, *arguments)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    taken = cli("snapshot", worker.pid, "--name", "w", "--kill", "--json")
    assert isinstance(taken, dict)
    assert taken["pages"] * 4096 == taken["raw_bytes"] > taken["stored_bytes"] > 0
    worker.gone()
    assert "w" in json.dumps(cli("ls", "--json"))
    shown = json.dumps(cli("show", "w", "--json"))
    assert "numpy_worker" in shown or "python" in shown
    restored = cli("restore", "w", "--detach", "--json")
    assert isinstance(restored, dict)
    assert restored["pid"] == worker.pid
    assert restored["restore_ms"] > 0
    assert http_get(port, "/digest") == expected
    assert str(worker.pid) in json.dumps(cli("stats", worker.pid, "--json"))
    cli("verify", "w", "--json")
    run_cli(store, "rm", "w")
    assert http_get(port, "/digest") == expected  # what runs keeps what it needs
    assert "w" not in [row.get("name") for row in cli("ls", "--json")]  # type: ignore[attr-defined]
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{worker.pid}").exists(), "the end of the copy")


def test_a_caller_that_changes_its_own_settings(victims: Victims, copies: Copies) -> None:
    """A copy gets the original's CPUs and limits, whatever its parent's have become since the last restore."""
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    limits, cpus = Path(f"/proc/{victim.pid}/limits").read_text(), os.sched_getaffinity(victim.pid)
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    core, own_cpus = resource.getrlimit(resource.RLIMIT_CORE), os.sched_getaffinity(0)
    try:
        for _ in range(2):
            copy = copies.restore(snapshot)
            assert Path(f"/proc/{copy.pid}/limits").read_text() == limits
            assert os.sched_getaffinity(copy.pid) == cpus
            copy.kill()
            resource.setrlimit(resource.RLIMIT_CORE, (0 if core[0] else core[1], core[1]))
            os.sched_setaffinity(0, {min(own_cpus)})
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, core)
        os.sched_setaffinity(0, own_cpus)


def test_a_thread_with_credentials_of_its_own(victims: Victims, copies: Copies) -> None:
    """A new process inherits those of the thread that makes it: a copy gets the original's all the same."""
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    expected = credentials(victim.pid)
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()

    def restore(_: int) -> None:
        libc, group = ctypes.CDLL(None, use_errno=True), ctypes.c_uint(24)
        for change in (
            lambda: 0,
            lambda: libc.syscall(SYS_SETGROUPS, 1, ctypes.byref(group)),  # the system call is about one thread
            lambda: libc.syscall(SYS_SETRESGID, 77, 77, 0),
        ):
            assert change() == 0
            copy = copies.restore(snapshot)
            assert credentials(copy.pid) == expected
            copy.kill()

    in_threads(1, restore)


def credentials(pid: int) -> list[str]:
    """The lines of /proc/PID/status about users, groups and capabilities."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [line for line in lines if line.startswith(("Uid", "Gid", "Groups", "Cap"))]


def test_fill_that_does_not_exist(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    victim = victims.start([build.c("small", "-lm"), run / "control"])
    victim.listens(run / "control")
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    with pytest.raises(ValueError, match="fill='all'"):
        snapshot.restore(fill="all")
    assert not alive(snapshot.pid)
