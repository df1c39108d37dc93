"""What stands for a copy's standard streams, by how the command line was called."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import GUARD_SECONDS, Victims, alive, until
from helpers_cli import MAIN, command
from helpers_copies import Copies

ENTRY = "from lazyrestore.__main__ import entry; entry()"  # what the console script does
NULL = [os.devnull] * 3


@pytest.fixture
def pid(run: Path, victims: Victims, copies: Copies) -> int:
    """The process id of the snapshot "x", of a process whose standard streams were pipes of somebody else."""
    reader, writer = os.pipe()
    victim = subprocess.Popen(
        ["sleep", "1000"],
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=writer,
        cwd=run,
        env={**os.environ, "LAZYRESTORE_VICTIM": victims.token},
    )
    until(lambda: Path(f"/proc/{victim.pid}/comm").read_text() == "sleep\n", "the program")
    copies.snapshot(victim.pid, "x", kill=True)
    victim.communicate()
    os.close(reader)
    os.close(writer)
    return victim.pid


def streams(pid: int) -> list[str]:
    return [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)]


def ended(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "the end of the copy")


@pytest.mark.parametrize("code", [ENTRY, MAIN], ids=["console script", "library"])
@pytest.mark.parametrize("closed", [(0, 1, 2), (1,)], ids=str)
def test_closed_streams_are_none_of_the_stores_files(
    run: Path, copies: Copies, pid: int, code: str, closed: Sequence[int]
) -> None:
    """A restorer without standard streams opens the store's files under their numbers; no copy gets these."""
    closing = "import os, sys; [os.close(int(n)) for n in sys.argv[1].split()]; os.execv(sys.argv[2], sys.argv[2:])"
    words = command(run / "store", "restore", "x", "--detach", code=code)
    closer = [sys.executable, "-c", closing, " ".join(map(str, closed)), *words]
    assert subprocess.run(closer, stdin=subprocess.DEVNULL, check=False).returncode == 0
    found = streams(pid)
    ended(pid)
    assert [found[number] for number in closed] == [os.devnull] * len(closed)
    assert not copies.store.verify().damage


def test_a_detached_copy_does_not_hold_the_callers_pipes(run: Path, pid: int) -> None:
    """`$(lazyrestore restore x --detach)` ends."""
    for words in (["--detach", "--json"], ["-n", "2", "--json"]):
        answer = subprocess.run(
            command(run / "store", "restore", "x", *words),
            input="",
            capture_output=True,
            text=True,
            check=True,
            timeout=GUARD_SECONDS,
        )
        started = json.loads(answer.stdout)
        for copy in started if isinstance(started, list) else [started]:
            assert streams(copy["pid"]) == NULL
            ended(copy["pid"])


def test_a_detached_copy_keeps_pipes_when_told(run: Path, pid: int) -> None:
    words = command(run / "store", "restore", "x", "--detach", "--keep-pipes")
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as restorer:
        assert restorer.stdout is not None
        assert restorer.wait() == 0
        inode = os.fstat(restorer.stdout.fileno()).st_ino
        assert streams(pid)[1] == f"pipe:[{inode}]"
        ended(pid)


def test_a_detached_copy_keeps_what_has_a_name(run: Path, pid: int) -> None:
    """A file, and a socket that somebody listens for, as the journal does; a socket pair has no name."""
    with (run / "log").open("w") as log:
        words = command(run / "store", "restore", "x", "--detach")
        subprocess.run(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
        assert streams(pid)[1:] == [str(run / "log")] * 2
        ended(pid)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as journal:
        listener.bind(os.fspath(run / "journal"))
        listener.listen()
        journal.connect(os.fspath(run / "journal"))
        one, other = socket.socketpair()
        with one, other:
            subprocess.run(words, stdin=subprocess.DEVNULL, stdout=journal, stderr=one, check=True)
            assert streams(pid)[1:] == [f"socket:[{os.fstat(journal.fileno()).st_ino}]", os.devnull]
        ended(pid)
