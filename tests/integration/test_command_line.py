"""What the command line tells a person, and a script that reads its output."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest
from helpers import Victims, alive, until
from helpers_cli import command, run_cli
from helpers_copies import Copies

import lazyrestore
from lazyrestore import errors


@pytest.fixture
def pid(victims: Victims, copies: Copies) -> int:
    """The process id of the snapshot "x"; it is free."""
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    return victim.pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "the end of the copy")


def test_detach_prints_the_bare_process_id_to_a_script(run: Path, pid: int) -> None:
    answer = run_cli(run / "store", "restore", "x", "--detach")
    end(pid)
    assert answer.stdout == f"{pid}\n"


def test_detach_prints_a_sentence_to_a_terminal(run: Path, pid: int) -> None:
    ours, theirs = pty.openpty()
    subprocess.run(
        command(run / "store", "restore", "x", "--detach"), stdin=subprocess.DEVNULL, stdout=theirs, check=True
    )
    text = os.read(ours, 1000).decode()
    end(pid)
    os.close(ours)
    os.close(theirs)
    assert text.startswith(f"x: process {pid}, restored in ")


def test_rm_is_all_or_nothing(run: Path, store: lazyrestore.Store, victims: Victims, copies: Copies) -> None:
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    for name in "ab":
        copies.snapshot(victim.pid, name).close()
    for names, kind in ((["a", "c"], errors.SnapshotNotFound), (["a", "no name"], errors.BadSnapshotName)):
        answer = run_cli(run / "store", "rm", *names)
        assert (answer.returncode, answer.stdout) == (kind.exit_status, "")
        assert names[1] in answer.stderr
        assert store.names() == ["a", "b"]
    answer = run_cli(run / "store", "rm", "a", "b", "a")
    assert answer.returncode == 0, answer.stderr
    assert [line.partition(":")[0] for line in answer.stdout.splitlines()] == ["a", "b"]
    assert store.names() == []


def test_stats_show_processes_of_removed_snapshots(run: Path, pid: int) -> None:
    run_cli(run / "store", "restore", "x", "--detach")
    try:
        assert run_cli(run / "store", "rm", "x").returncode == 0
        plain = run_cli(run / "store", "stats")
        fields = json.loads(run_cli(run / "store", "stats", "--json").stdout)
        lazyrestore.Store.open(run / "other").close()
        other = run_cli(run / "other", "stats")
    finally:
        end(pid)
    head, _, row = plain.stdout.splitlines()[:3]
    assert head.startswith("(removed): ")
    assert row.split()[0] == str(pid)
    assert [(each["snapshot"], each["processes"][0]["pid"]) for each in fields] == [("(removed)", pid)]
    first, hint = other.stdout.splitlines()
    assert first == "no restored process of this store runs"
    assert "of other stores" in hint


def test_the_name_is_looked_at_before_what_the_process_holds(
    run: Path, store: lazyrestore.Store, victims: Victims, copies: Copies, pid: int
) -> None:
    victim = victims.python("unsupported.py", run / "control", "inotify", cwd=run)
    victim.listens(run / "control")
    for name, kind in (("no name", errors.BadSnapshotName), ("x", errors.SnapshotExists)):
        with pytest.raises(kind):
            store.snapshot(victim.pid, name=name)
    with pytest.raises(errors.UnsupportedResources):
        store.snapshot(victim.pid, name="x", replace=True)
