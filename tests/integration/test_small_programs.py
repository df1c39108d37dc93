"""Shells, static programs, one without a libc, Perl and Python readers: each against its twin, and byte by byte.

All of them are blocked in one system call when the snapshot is taken, so the whole memory of original and copy can be
compared from outside.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SYSTEM_PYTHON, VICTIMS, Builder, Victim, Victims, ask
from helpers_copies import Copies, Copy
from helpers_facts import memory_blocks, memory_differences

Command = Callable[[Path, Path], list[str | Path]]


class Piped:
    """A program that reads lines from a FIFO and appends to a file."""

    def __init__(self, victims: Victims, directory: Path, command: Command) -> None:
        directory.mkdir()
        self.requests, self.answers = directory / "requests", directory / "answers"
        os.mkfifo(self.requests)
        self.process: Victim | Copy
        self.victim = victims.start(command(self.requests, self.answers), cwd=directory)
        self.process = self.victim
        self.victim.until(lambda: self.lines() != [], "the first line")

    def lines(self) -> list[str]:
        return self.answers.read_text().splitlines()

    def ask(self, request: str) -> str:
        """Write to the FIFO, wait for one more line."""
        count = len(self.lines()) + 1
        fifo = os.open(self.requests, os.O_WRONLY | os.O_NONBLOCK)  # fails if nobody reads
        try:
            os.write(fifo, request.encode())
        finally:
            os.close(fifo)
        self.process.until(lambda: len(self.lines()) >= count, f"an answer to {request!r}")
        assert len(self.lines()) == count
        return self.lines()[-1]


def blocked(pid: int) -> bool:
    """Whether the process sleeps in a system call, and not for a disk: until a signal comes or what it waits for."""
    sleeps = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
    return sleeps and Path(f"/proc/{pid}/syscall").read_text().split()[0].isdigit()


def replace_and_compare(copies: Copies, victim: Victim) -> Copy:
    """As Copies.replace, and all memory must be equal but for the rseq area of the one thread."""
    victim.until(lambda: blocked(victim.pid), "a blocked victim")
    before = memory_blocks(victim.pid)
    copy = copies.replace(victim)
    copy.until(lambda: blocked(copy.pid), "a blocked copy")
    after = memory_blocks(copy.pid)
    different = memory_differences(before, after)
    assert len(different) <= 1, [hex(address) for address in different]
    return copy


def dash(requests: Path, answers: Path) -> list[str | Path]:
    return ["dash", VICTIMS / "counter.sh", requests, answers]


def perl(requests: Path, answers: Path) -> list[str | Path]:
    return ["perl", VICTIMS / "reader.pl", requests, answers, requests.parents[1] / "text"]


def python(requests: Path, answers: Path) -> list[str | Path]:
    return [SYSTEM_PYTHON, VICTIMS / "reader.py", requests, answers, requests.parents[1] / "text"]


@pytest.mark.parametrize(
    "command", [dash, perl, pytest.param(python, marks=pytest.mark.requires(f"program:{SYSTEM_PYTHON}"))]
)
def test_reader(run: Path, victims: Victims, copies: Copies, command: Command) -> None:
    (run / "text").write_text("".join(f"word{number % 7} {number}\n" for number in range(1, 20_000)))
    twin = Piped(victims, run / "twin", command)
    piped = Piped(victims, run / "victim", command)
    for number in range(10):
        assert piped.ask(f"before{number}\n") == twin.ask(f"before{number}\n")
    piped.process = replace_and_compare(copies, piped.victim)
    for number in range(500):
        assert piped.ask(f"after{number}\n") == twin.ask(f"after{number}\n")
    piped.process.process.terminate()
    assert piped.process.process.wait(60) == -signal.SIGTERM


def test_bash_loop(run: Path, victims: Victims, copies: Copies) -> None:
    """A loop that goes on by itself: no count may be missing or come twice, wherever the snapshot fell."""
    piped = Piped(
        victims, run / "victim", lambda requests, answers: ["bash", VICTIMS / "counter.bash", requests, answers]
    )
    piped.victim.until(lambda: len(piped.lines()) > 3, "some counts")
    for number in range(3):
        copies.snapshot(piped.victim.pid, f"x{number}")
    moving = ("descriptors", "status", "tasks", "mappings", "flags")  # tasks: SIGCHLD is blocked now and then
    copy = copies.replace(piped.victim, "x", ignore=moving)
    count = len(piped.lines())
    copy.until(lambda: len(piped.lines()) > count + 5, "more counts")
    fifo = os.open(piped.requests, os.O_WRONLY | os.O_NONBLOCK)
    os.write(fifo, b"hello\n")
    os.close(fifo)
    copy.until(lambda: "line hello 1" in piped.lines(), "the line")
    copy.process.send_signal(signal.SIGUSR1)
    copy.until(lambda: any(line.startswith("trap ") for line in piped.lines()), "the trap")
    counts = [int(line.split()[1]) for line in piped.lines() if line.startswith("count ")]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("flags", [["-static"], ["-static-pie"], []], ids=["static", "static-pie", "dynamic"])
def test_binary(run: Path, victims: Victims, copies: Copies, build: Builder, flags: list[str]) -> None:
    program = build.c("small", *flags, "-lm")
    victim, twin = (victims.start([program, run / name]) for name in ("victim", "twin"))
    for each, name in ((victim, "victim"), (twin, "twin")):
        each.listens(run / name)
    for request in ("5", "70000", "float"):
        assert ask(run / "victim", request) == ask(run / "twin", request)
    copy = replace_and_compare(copies, victim)
    for request in ("3", "float", "100000", "float", "131072", "1"):
        assert ask(run / "victim", request) == ask(run / "twin", request)
    with pytest.raises(ConnectionError):
        ask(run / "victim", "exit")
    assert copy.process.wait(60) == 7


def test_without_libc(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    program = build.c("nolibc", "-nostdlib", "-static", "-ffreestanding", "-fno-stack-protector", "-fno-builtin")

    def command(requests: Path, answers: Path) -> list[str | Path]:
        return [program, requests, answers]

    piped, twin = Piped(victims, run / "victim", command), Piped(victims, run / "twin", command)
    for byte in "abc":
        assert piped.ask(byte) == twin.ask(byte)
    piped.process = replace_and_compare(copies, piped.victim)
    for byte in "defgh":
        assert piped.ask(byte) == twin.ask(byte)
    fifo = os.open(piped.requests, os.O_WRONLY | os.O_NONBLOCK)
    os.write(fifo, b"q")
    os.close(fifo)
    assert piped.process.process.wait(60) == 7
