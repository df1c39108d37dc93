"""Many clones of one snapshot: from threads, from processes, from the command line; all right, nothing left behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import Victims, alive, children_of, in_threads, sockets_of, until
from helpers_cli import command, run_cli
from helpers_fleet import descriptors, report, reporter

import lazyrestore

SYS_WRITE = 1
RESTORER = """
import os, sys, threading
sys.path[:0] = sys.argv[4:]
from pathlib import Path
import lazyrestore
from helpers import in_threads
from helpers_fleet import report
run, store, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
reports = []  # printed by one thread: print() writes a line in pieces, between which another's would come
with lazyrestore.Store.open(store) as opened, opened.get("x") as snapshot:
    def work(_):
        for _ in range(rounds):
            process = snapshot.restore(new_pid=True)
            reports.append(report(run, process.pid))
            process.kill()
            assert process.wait(60) == -9
    in_threads(2, work)
for words in reports:
    print(*words)
"""


def test_threads_restore_one_snapshot_at_once(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    expected = report(run, victim.pid)
    with store.snapshot(victim.pid, name="x") as snapshot:
        before = [0]

        def restore(_: int) -> None:
            for _ in range(5):
                process = snapshot.restore(new_pid=True)
                assert report(run, process.pid) == ["2", *expected[1:]]
                assert report(run, process.pid) == ["3", *expected[1:]]
                process.kill()
                assert process.wait(60) == -signal.SIGKILL

        restore(0)
        before[0] = descriptors()
        in_threads(8, restore)
        assert descriptors() == before[0]
    assert report(run, victim.pid) == ["2", *expected[1:]]


def test_threads_share_the_first_restore(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """Compiling, finding the pager, making the first executable: each at once from all threads."""
    victim = reporter(run, victims)
    store.snapshot(victim.pid, name="x").close()
    for _ in range(5):
        before = descriptors()
        with store.get("x") as snapshot:
            in_threads(8, lambda _, snapshot=snapshot: _ended(snapshot.restore(new_pid=True)))  # type: ignore[misc]
        assert descriptors() <= before + 1  # the executable that is kept for the next restore


def _ended(process: lazyrestore.RestoredProcess) -> None:
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


def test_a_forked_child_asks_for_itself(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """Over one connection, it would get its parent's replies, and its parent those to it."""
    victim = reporter(run, victims)
    expected = report(run, victim.pid)
    with store.snapshot(victim.pid, name="x") as snapshot:
        _ended(snapshot.restore(new_pid=True))
        connection = os.fstat(snapshot._connect()._socket.fileno()).st_ino
        child = os.fork()
        if not child:
            status = 1
            try:
                process = snapshot.restore(new_pid=True)
                alone = connection not in sockets_of(os.getpid())
                right = report(run, process.pid) == ["2", *expected[1:]]
                _ended(process)
                status = 0 if alone and right else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0) == (child, 0)
        process = snapshot.restore(new_pid=True)
        assert report(run, process.pid) == ["2", *expected[1:]]
        _ended(process)


def test_processes_restore_one_snapshot_at_once(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    expected = report(run, victim.pid)
    store.snapshot(victim.pid, name="x").close()
    words = [sys.executable, "-c", RESTORER, run, run / "store", "3", *sys.path]
    restorers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for restorer in restorers:
        output, _ = restorer.communicate()
        assert restorer.returncode == 0
        assert output.splitlines() == [" ".join(["2", *expected[1:]])] * 6


def test_a_pager_per_pid_namespace(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """One in a namespace below could not end the processes above when it dies, as all do with their namespace."""
    victim = reporter(run, victims)
    expected = report(run, victim.pid)
    with store.snapshot(victim.pid, name="x") as snapshot:
        restore = command(run / "store", "restore", "x", "--pid", "new", "--detach", "--no-record")
        unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
        below = victims.start([*unshare, "sh", "-c", f"{shlex.join(restore)} && touch {run}/restored && sleep 1000"])
        below.until((run / "restored").exists, "a restored process in a namespace of its own")
        process = snapshot.restore(new_pid=True, record=False)
        assert process.pid in [space.pid for space in process.stats().spaces]
        (init,) = children_of(below.pid)
        os.kill(init, signal.SIGKILL)
        below.process.wait(60)  # the end of the init is that of its whole namespace
        assert report(run, process.pid) == ["2", *expected[1:]]
        process.kill()
        process.wait(60)


def test_clones_in_the_library(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    expected = report(run, victim.pid)
    with store.snapshot(victim.pid, name="x") as snapshot:
        clones = snapshot.clones(5)
        assert len({victim.pid, *(clone.pid for clone in clones)}) == 6
        for clone in clones:
            assert report(run, clone.pid) == ["2", *expected[1:]]
        for clone in clones:
            _ended(clone)


def test_clones_are_all_or_none(
    run: Path, victims: Victims, store: lazyrestore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = reporter(run, victims)
    with store.snapshot(victim.pid, name="x") as snapshot:
        restore, started = snapshot.restore, []

        def fails_late(**options: object) -> lazyrestore.RestoredProcess:
            if len(started) == 3:
                raise lazyrestore.errors.RestoreError("the fourth")
            started.append(restore(**options))  # type: ignore[arg-type]
            return started[-1]

        monkeypatch.setattr(snapshot, "restore", fails_late)
        with pytest.raises(lazyrestore.errors.RestoreError, match="the fourth"):
            snapshot.clones(5)
        assert [process.returncode for process in started] == [-signal.SIGKILL] * 3


def test_clones_on_the_command_line(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    expected = report(run, victim.pid)
    store.snapshot(victim.pid, name="x").close()
    answer = run_cli(run / "store", "restore", "x", "-n", 6, "--json")
    assert answer.returncode == 0, answer.stderr
    started = json.loads(answer.stdout)
    pids = [clone["pid"] for clone in started]
    assert len(set(pids)) == 6
    assert all(clone["restore_ms"] > 0 and clone["name"] == "x" for clone in started)
    answer = run_cli(run / "store", "restore", "x", "-n", 2)
    pids += [int(line) for line in answer.stdout.splitlines()]
    assert len(set(pids)) == 8
    for pid in pids:
        assert report(run, pid) == ["2", *expected[1:]]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in pids), "the end of the clones")


def test_the_pager_lingers_as_long_as_asked(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """But not for a snapshot that was removed."""
    victim = reporter(run, victims)
    store.snapshot(victim.pid, name="x").close()
    answer = run_cli(run / "store", "restore", "x", "-n", 1, "--linger", 86400)
    assert answer.returncode == 0, answer.stderr
    with store.get("x") as snapshot:
        pager, _ = snapshot._connect().pids()
    assert b"--linger\x0086400000\x00" in Path(f"/proc/{pager}/cmdline").read_bytes()
    os.kill(int(answer.stdout), signal.SIGKILL)
    until(lambda: not alive(int(answer.stdout)), "the end of the clone")
    assert alive(pager)
    store.remove("x")
    until(lambda: not alive(pager), "the end of the pager")


def test_a_number_and_the_old_process_id_exclude_each_other(run: Path, store: lazyrestore.Store) -> None:
    answer = run_cli(run / "store", "restore", "x", "-n", 2, "--pid", "same")
    assert answer.returncode == 2
    assert "-n" in answer.stderr


def test_clones_that_nobody_hears_of_are_ended(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    store.snapshot(victim.pid, name="x").close()
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command(run / "store", "restore", "x", "-n", 3), stdout=full, check=False)
    assert ended.returncode != 0
    assert set(victims.marked()) == {victim.pid}


@pytest.mark.parametrize("choice", [("-n", 3), ("--detach", "--pid", "new")])
def test_copies_end_with_a_restorer_that_is_killed_before_it_tells_of_them(
    run: Path, victims: Victims, store: lazyrestore.Store, choice: tuple[str | int, ...]
) -> None:
    victim = reporter(run, victims)
    store.snapshot(victim.pid, name="x").close()
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    restorer = subprocess.Popen(command(run / "store", "restore", "x", *choice), stdout=write)
    writes = f"{SYS_WRITE} 0x1 "
    until(lambda: Path(f"/proc/{restorer.pid}/syscall").read_text().startswith(writes), "it tells of them")
    copies = set(victims.marked()) - {victim.pid}
    assert len(copies) == (3 if "-n" in choice else 1)
    restorer.kill()
    restorer.wait()
    until(lambda: set(victims.marked()) == {victim.pid}, "the copies end")
    os.close(read)
    os.close(write)


def test_held_clones_live_on_once_they_are_let_go(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    store.snapshot(victim.pid, name="x").close()
    with store.get("x") as snapshot:
        first, second = snapshot.clones(2, held=True)
        init = set(children_of(os.getpid())) - {victim.pid, first.pid, second.pid}
        first.kill()
        assert first.wait() == -signal.SIGKILL
        assert len(init & set(children_of(os.getpid()))) == 1
        first.let_go()  # which does nothing any more
        second.let_go()
        second.let_go()
        second.kill()
        assert second.wait() == -signal.SIGKILL
        assert not init & set(children_of(os.getpid()))
