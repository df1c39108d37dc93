"""The 64-thread victim: start it, read its report, wait until each of its threads has moved on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from helpers import Builder, Stuck, Victim, Victims, ask, until
from helpers_copies import Copy


class Report(NamedTuple):
    """errors: how many the victim saw; messages: the first of them; rounds: per thread."""

    errors: int
    messages: list[str]
    rounds: dict[str, int]


def parse(text: str) -> Report:
    lines = text.splitlines()
    rounds = {" ".join(words[1:3]): int(words[3]) for line in lines if (words := line.split())[0] == "thread"}
    assert len(rounds) == 64, text
    return Report(int(lines[0].split()[1]), [line for line in lines if line.startswith("error ")], rounds)


def where_threads_are(pid: int) -> str:
    """A line for each thread: number, name, system call, where in the kernel it waits."""
    tasks = sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda task: int(task.name))
    parts = ("comm", "syscall", "wchan")
    return "\n".join(" ".join([task.name, *((task / part).read_text().strip() for part in parts)]) for task in tasks)


class Threads64:
    """tests/victims/threads64.c, running in `directory`.

    interruptions: how many calls may have returned EINTR to the victim in its life; 0 but for one test.
    """

    interruptions = 0

    def __init__(self, victims: Victims, build: Builder, directory: Path) -> None:
        directory.mkdir()
        self.socket = directory / "control"
        self.process: Victim | Copy
        self.victim = victims.start([build.c("threads64", "-lm"), self.socket], cwd=directory)
        self.process = self.victim
        self.victim.listens(self.socket)
        self.moved_on()

    def report(self) -> Report:
        return parse(ask(self.socket, "report"))

    def moved_on(self, rounds: int = 2) -> None:
        """Wait until every thread has made `rounds` more rounds; fail if any of them saw an error."""
        before = self.report()
        self.check(before)

        def moved() -> bool:
            now = self.report()
            self.check(now)
            return all(now.rounds[name] >= before.rounds[name] + rounds for name in now.rounds)

        try:
            until(moved, "progress of all threads", self.process.check)
        except Stuck as error:
            now = self.report().rounds
            late = [name for name in now if now[name] < before.rounds[name] + rounds]
            raise Stuck(f"{error}: {', '.join(late)}\n{where_threads_are(self.process.pid)}") from None

    def check(self, report: Report) -> None:
        assert report.errors <= self.interruptions, report.messages
        assert all("Interrupted system call" in message for message in report.messages), report.messages

    def finish(self) -> Report:
        """End all threads; what only the end shows (tid addresses, robust mutex, rseq counters) is in the report."""
        return parse(ask(self.socket, "finish"))
