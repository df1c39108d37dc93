"""`--pid new`: the old process id in a PID namespace of its own, while the original or other copies have it outside."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers import Victims, alive, children_of, open_descriptors, until
from helpers_cli import command

import lazyrestore

PROGRAM = """
import os, sys, time, threading
directory = sys.argv[1]
threading.Thread(target=lambda: [time.sleep(0.05) for _ in iter(int, 1)], daemon=True).start()
tids = sorted(int(name) for name in os.listdir("/proc/self/task"))
open(directory + "/ready", "w").close()
while not os.path.exists(directory + "/go"):
    time.sleep(0.02)
seen = sorted(int(name) for name in os.listdir("/proc/self/task"))
orphan = os.fork()
if not orphan:
    if os.fork():
        os._exit(0)
    while True:
        time.sleep(1)
os.waitpid(orphan, 0)
me = os.getpid()
name = f"{directory}/report-{os.stat('/proc/self/ns/pid').st_ino}"
open(name + ".part", "w").write(f"{me} {os.readlink('/proc/self')} {tids == seen} {os.getppid()}")
os.rename(name + ".part", name)
time.sleep(0.2)
sys.exit(7)
"""


def started(run: Path, victims: Victims) -> int:
    script = run / "program.py"
    script.write_text(PROGRAM)
    victim = victims.start(["/usr/bin/python3", script, run])
    victim.until((run / "ready").exists, "a ready victim")
    return victim.process.pid


def test_several_copies_beside_the_original(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    pid = started(run, victims)
    snapshot = store.snapshot(pid, name="x")
    copies = [snapshot.restore(new_pid=True) for _ in range(3)]
    inits = [copy._namespace.pid for copy in copies if copy._namespace]
    assert len({pid, *(copy.pid for copy in copies)}) == 4
    (run / "go").touch()
    reports = until(lambda: found if len(found := list(run.glob("report-*[0-9]"))) == 4 else None, "four reports")
    texts = sorted(report.read_text() for report in reports)
    inside = [text for text in texts if text == f"{pid} {pid} True 0"]
    assert len(inside) == 3, texts
    assert [copy.wait(60) for copy in copies] == [7, 7, 7]
    for init in inits:  # and with it the orphan that each left
        assert not os.path.exists(f"/proc/{init}")


def test_end_of_the_init_ends_the_copy(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    snapshot = store.snapshot(started(run, victims), name="x")
    copy = snapshot.restore(new_pid=True)
    assert copy._namespace is not None
    os.kill(copy._namespace.pid, 9)
    assert copy.wait(60) == -9


def test_copy_that_is_killed_leaves_nothing(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    snapshot = store.snapshot(started(run, victims), name="x")
    before = open_descriptors()
    for _ in range(5):
        copy = snapshot.restore(new_pid=True)
        assert copy._namespace is not None
        init = copy._namespace.pid
        copy.kill()
        assert copy.wait(60) == -9
        assert not os.path.exists(f"/proc/{init}")
    snapshot.close()
    assert len(open_descriptors()) <= len(before)


FORKING = """
import os, sys, time
directory, data = sys.argv[1], os.urandom(8 << 20)
open(directory + "/ready", "w").close()
while not os.path.exists(directory + "/go"):
    time.sleep(0.02)
if os.fork():
    os.wait()
sum(data[::4096])
open(directory + "/part", "w").write(str(os.getpid()))
os.rename(directory + "/part", directory + "/report")
while True:
    time.sleep(1)
"""


def test_stats_name_a_forked_child(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """In the pager's PID namespace, though its faults tell of its thread in another one."""
    script = run / "forking.py"
    script.write_text(FORKING)
    victim = victims.start(["/usr/bin/python3", script, run])
    victim.until((run / "ready").exists, "a ready victim")
    with store.snapshot(victim.pid, name="x", kill=True) as snapshot, snapshot.restore(new_pid=True) as copy:
        (run / "go").touch()
        inside = until((run / "report").read_text, "the child's report")
        outside = next(space.pid for space in copy.stats().spaces if space.generation == 1)
        status = Path(f"/proc/{outside}/status").read_text()
        assert next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1] == inside
        assert f"\nPPid:\t{copy.pid}\n" in status
        copy.kill()


def is_let_go(pid: int) -> bool:
    """Nobody traces it."""
    return "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("words", [("restore", "x"), ("record", "x", "--for", "86400")])
def test_a_killed_command_takes_its_copy_along(
    run: Path, victims: Victims, store: lazyrestore.Store, words: tuple[str, ...]
) -> None:
    """Nobody else is responsible for it, or knows its process id; and what it leaves behind ends with it."""
    pid = started(run, victims)
    store.snapshot(pid, name="x").close()
    with subprocess.Popen(command(run / "store", *words, "--pid", "new"), stdin=subprocess.DEVNULL) as process:
        mine = until(lambda: set(victims.marked()) - {pid}, "a copy")
        until(lambda: all(map(is_let_go, children_of(process.pid))), "a copy and its init that run by themselves")
        process.kill()
    until(lambda: not any(alive(copy) for copy in mine), "the end of the copy")
    assert set(victims.marked()) == {pid}


def test_a_copy_that_ends_with_its_caller_wants_a_namespace(
    run: Path, victims: Victims, store: lazyrestore.Store
) -> None:
    pid = started(run, victims)
    with store.snapshot(pid, name="x") as snapshot, pytest.raises(ValueError, match="new_pid"):
        snapshot.restore(ends_with_caller=True)
