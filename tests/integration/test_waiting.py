"""Commands that wait for another process's lock of the store: they say so, and Ctrl-C ends the wait."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Victims, until
from helpers_cli import command
from helpers_copies import Copies
from helpers_fleet import reporter
from helpers_store import Child, child

from lazyrestore.kernel import procfs

pytestmark = pytest.mark.requires("root")
FREES = """
from lazyrestore.store.locks import WriterLock
with WriterLock(store.path, brief=True):
    say("has it")
    hear()
"""
WRITES = "store._environment.alone(lambda: (say('has it'), hear()))"
CASES = [(FREES, "snapshot"), (FREES, "rm"), (WRITES, "snapshot"), (WRITES, "rm"), (WRITES, "record")]


@pytest.fixture
def pid(run: Path, victims: Victims, copies: Copies) -> int:
    """A process; there is a snapshot of another one, which has ended, "x"."""
    other = victims.start(["sleep", "1000000"])
    other.until(lambda: Path(f"/proc/{other.pid}/comm").read_text() == "sleep\n", "the program")
    copies.snapshot(other.pid, "x", kill=True)
    other.gone()
    return reporter(run, victims).pid


@pytest.fixture
def holder(run: Path, pid: int, request: pytest.FixtureRequest) -> Iterator[Child]:
    """A process that has the lock, until it is told."""
    with child(run / "store", request.param) as started:
        assert started.hear() == "has it"
        yield started


def waiting(run: Path, words: list[object], holder: Child, state: str = "") -> subprocess.Popen[str]:
    """A command that has said whom it waits for, and nothing else."""
    waiter = subprocess.Popen(
        command(run / "store", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert waiter.stderr
    who = f"process {holder.process.pid}{state}"
    assert waiter.stderr.readline() == (
        f"lazyrestore: store {run / 'store'}: waiting for {who}, which writes to it; Ctrl-C gives up\n"
    )
    return waiter


def words_of(name: str, pid: int) -> list[object]:
    return {
        "snapshot": ["snapshot", pid, "--name", "y"],
        "rm": ["rm", "x"],
        "record": ["record", "x", "--for", "0.1", "--pid", "new"],
    }[name]


def is_free(pid: int) -> bool:
    """Nobody has stopped it."""
    status = procfs.parse_status(procfs.read(pid, "status"))
    return status["TracerPid"] == "0" and status["State"][0] in "SR"


@pytest.mark.parametrize(("holder", "name"), CASES, indirect=["holder"], ids=str)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["", "json"])
def test_who_waits_says_so_and_goes_on(
    run: Path, pid: int, holder: Child, copies: Copies, name: str, more: list[object]
) -> None:
    with waiting(run, words_of(name, pid) + more, holder) as waiter:
        assert is_free(pid)
        holder.say()
        said, complained = waiter.communicate()
    assert (waiter.returncode, complained, said.count("\n")) == (0, "", 1)
    assert sorted(copies.store.names()) == {"snapshot": ["x", "y"], "rm": [], "record": ["x"]}[name]


@pytest.mark.parametrize(("holder", "name"), CASES, indirect=["holder"], ids=str)
def test_ctrl_c_ends_the_wait(run: Path, pid: int, holder: Child, copies: Copies, name: str) -> None:
    holder.process.send_signal(signal.SIGSTOP)
    until(lambda: "State:\tT" in Path(f"/proc/{holder.process.pid}/status").read_text(), "a stopped holder")
    with waiting(run, words_of(name, pid), holder, " (stopped)") as waiter:
        waiter.send_signal(signal.SIGINT)
        said, complained = waiter.communicate()
    assert (waiter.returncode, said, complained) == (130, "", "lazyrestore: interrupted\n")
    assert is_free(pid)
    holder.process.send_signal(signal.SIGCONT)
    holder.say()
    assert copies.store.names() == ["x"]
    assert not copies.store.verify().damage
