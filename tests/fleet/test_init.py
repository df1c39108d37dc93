"""The init of a clone's PID namespace: it reaps, passes signals on, and ends with the clone and all its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import Victims, alive, until
from helpers_fleet import awaited, descriptors, init_of, report, reporter

import lazyrestore
from lazyrestore import spawn


def namespace_of(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/pid").st_ino


def test_signals_to_the_init_reach_the_clone(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    with store.snapshot(victim.pid, name="x") as snapshot:
        clone = snapshot.restore(new_pid=True)
        path = run / f"report-{namespace_of(clone.pid)}"
        for count in ("1", "2", "3"):
            os.kill(init_of(clone), signal.SIGUSR1)
            assert awaited(path).split()[0] == count
            path.unlink()
        os.kill(init_of(clone), signal.SIGTERM)
        assert clone.wait(60) == 7
        for number, status in ((signal.SIGINT, 8), (signal.SIGALRM, -signal.SIGALRM)):
            ended = snapshot.restore(new_pid=True)
            os.kill(init_of(ended), number)
            assert ended.wait(60) == status


def test_a_stopped_init_keeps_nobody_waiting(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    with store.snapshot(victim.pid, name="x") as snapshot:
        clone = snapshot.restore(new_pid=True)
        init = init_of(clone)
        os.kill(init, signal.SIGSTOP)
        until(lambda: "State:\tT" in Path(f"/proc/{init}/status").read_text(), "a stopped init")
        clone.kill()
        waiter = threading.Thread(target=clone.wait)
        waiter.start()
        waiter.join(60)
        try:
            assert not waiter.is_alive()
            assert not alive(init)
        finally:
            with suppress(ProcessLookupError):
                os.kill(init, signal.SIGCONT)
            waiter.join()


def test_children_end_with_the_clone(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    with store.snapshot(victim.pid, name="x") as snapshot:
        clone = snapshot.restore(new_pid=True)
        for _ in range(3):
            report(run, clone.pid, signal.SIGUSR2)
        members = [pid for pid in victims.marked() if namespace_of(pid) == namespace_of(clone.pid)]
        assert len(members) == 4
        clone.terminate()
        assert clone.wait(60) == 7
        assert not any(alive(pid) for pid in members)


def test_orphans_are_reaped(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    with store.snapshot(victim.pid, name="x") as snapshot:
        clone = snapshot.restore(new_pid=True)
        report(run, clone.pid, signal.SIGUSR2)
        (orphan,) = {pid for pid in victims.marked() if namespace_of(pid) == namespace_of(clone.pid)} - {clone.pid}
        os.kill(orphan, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{orphan}").exists(), "an orphan that is gone, not a zombie")
        assert report(run, clone.pid)[0] == "2"
        clone.kill()
        clone.wait(60)


def test_a_detached_clone_outlives_its_restorer(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    store.snapshot(victim.pid, name="x").close()
    code = "import sys, lazyrestore; print(lazyrestore.Store.open(sys.argv[1]).get('x').restore(new_pid=True).pid)"
    answer = subprocess.run([sys.executable, "-c", code, run / "store"], capture_output=True, text=True, check=True)
    pid = int(answer.stdout)
    assert report(run, pid)[0] == "1"
    os.kill(pid, signal.SIGTERM)
    until(lambda: not alive(pid), "the end of the clone")


def test_a_process_that_cannot_be_started_leaves_no_descriptor_behind() -> None:
    """Nor is one closed twice: in between it may have become another thread's."""
    source = os.memfd_create("x", os.MFD_CLOEXEC)
    try:
        spawn.executable()
        before = descriptors()
        with pytest.raises(OSError, match="Invalid argument") as raised:
            spawn.start([(source, source)])  # dup3(2) refuses that
        assert raised.value.filename == "dup3"
        assert descriptors() == before
    finally:
        os.close(source)
