"""What a process is, besides memory and descriptors: credentials, limits, signals, timers, names."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SYSTEM_PYTHON, VICTIMS, Builder, Victim, Victims, alive, ask, until
from helpers_cli import MAIN, run_cli
from helpers_copies import Copies

# The interval timer's SIGALRM may be pending at the instant at which /proc is read.
TICKING = ("status", "tasks")


Start = Callable[[str, str], tuple[Victim, Path]]


@pytest.fixture
def start(run: Path, victims: Victims) -> Start:
    def start(kind: str, name: str) -> tuple[Victim, Path]:
        directory = run / name
        directory.mkdir()
        directory.chmod(0o777)
        command: list[str | Path] = [SYSTEM_PYTHON, VICTIMS / "attributes.py", "./control", kind]
        environment = {"ODD": "näme\n=x", "EMPTY": ""}
        victim = victims.start(command, environment=environment, cwd=directory)
        victim.listens(directory / "control")
        return victim, directory / "control"

    return start


def steady(text: str) -> dict[str, object]:
    """The observation without a SIGALRM that happens to be pending."""
    seen: dict[str, object] = json.loads(text)
    pending = seen["pending"]
    assert isinstance(pending, list)
    seen["pending"] = [number for number in pending if number != 14]
    return seen


@pytest.mark.parametrize("kind", ["PLAIN", "NOBODY"])
def test_attributes(copies: Copies, start: Start, kind: str) -> None:
    _, twin = start(kind, "twin")
    victim, control = start(kind, "victim")
    before = steady(ask(control, "observe"))
    copy = copies.replace(victim, ignore=TICKING)
    after = steady(ask(control, "observe"))
    assert {name: (before[name], after[name]) for name in before if before[name] != after[name]} == {}
    for request in ("pending", "handlers", "grow", "alarm"):
        assert ask(control, request) == ask(twin, request), request
    status = Path(f"/proc/{copy.pid}/status").read_text()
    assert os.path.samefile(f"/proc/{copy.pid}/exe", SYSTEM_PYTHON)
    assert f"Uid:\t{65534 if kind == 'NOBODY' else 0}\t" in status


def test_the_original_keeps_its_signals_and_timers(copies: Copies, start: Start) -> None:
    _, twin = start("NOBODY", "twin")
    victim, control = start("NOBODY", "victim")
    before = steady(ask(control, "observe"))
    for number in range(3):
        copies.snapshot(victim.pid, f"x{number}")
    assert steady(ask(control, "observe")) == before
    for request in ("pending", "handlers", "grow", "alarm"):
        assert ask(control, request) == ask(twin, request), request


def test_chroot(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    """A static program whose root holds nothing but itself, in a directory below it."""
    inner = run / "root" / "inner"
    inner.mkdir(parents=True)
    shutil.copy(build.c("small", "-static", "-lm"), inner / "small")

    def enter() -> None:
        os.chroot(run / "root")
        os.chdir("/inner")

    victim = victims.start(["./small", "./control"], prepare=enter)
    victim.listens(inner / "control")
    wanted = int(ask(inner / "control", "10"))
    copies.replace(victim)
    assert int(ask(inner / "control", "0")) == 1002
    assert wanted > 1001


def test_what_the_restorer_is_set_to_is_not_the_copys(
    run: Path, victims: Victims, copies: Copies, build: Builder
) -> None:
    """Huge pages off and merging of equal pages on are inherited by every process that it starts."""
    victim = victims.start([build.c("small", "-lm"), run / "control"], cwd=run)
    victim.listens(run / "control")
    before = inheritable(victim.pid)
    copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    code = f"import ctypes; prctl = ctypes.CDLL(None).prctl; prctl(41, 1, 0, 0, 0); prctl(67, 1, 0, 0, 0); {MAIN}"
    answer = run_cli(run / "store", "restore", "x", "--detach", code=code)
    assert answer.returncode == 0, answer.stderr
    after = inheritable(victim.pid)
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: not alive(victim.pid), "the end of the copy")
    assert after == before


def inheritable(pid: int) -> list[str]:
    texts = [path.read_text() for path in (Path(f"/proc/{pid}/status"), Path(f"/proc/{pid}/ksm_stat")) if path.exists()]
    return [line for text in texts for line in text.splitlines() if line.startswith(("THP_enabled", "ksm_merge_any"))]
