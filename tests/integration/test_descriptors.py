"""One of everything that a descriptor can be: seen alike by the process, by /proc, and compared with a twin."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import SYSTEM_PYTHON, Victim, Victims, alive, ask, open_descriptors, until
from helpers_cli import command
from helpers_copies import Copies

from lazyrestore import restore_program


def start(victims: Victims, directory: Path, *oddities: str) -> Victim:
    directory.mkdir()
    victim = victims.python("fdzoo.py", directory / "control", *oddities, cwd=directory)
    victim.listens(directory / "control")
    return victim


def compare(wanted: str, got: str) -> None:
    """Equal JSON objects; only what differs is shown."""
    left, right = json.loads(wanted), json.loads(got)
    different = {name: (left.get(name), right.get(name)) for name in left | right if left.get(name) != right.get(name)}
    assert not different


@pytest.mark.parametrize("oddity", ["", "half-pipes", "packets", "half-sockets", "path", "sparse"])
def test_descriptors(run: Path, victims: Victims, copies: Copies, oddity: str) -> None:
    twin = start(victims, run / "twin", oddity)
    victim = start(victims, run / "zoo", oddity)
    before = ask(run / "zoo" / "control", "observe")
    copies.replace(victim)
    compare(before, ask(run / "zoo" / "control", "observe"))
    compare(ask(run / "twin" / "control", "drain"), ask(run / "zoo" / "control", "drain"))
    assert ask(run / "zoo" / "control", "timers") == "expired"
    twin.check()


def test_the_original_keeps_its_descriptors(run: Path, victims: Victims, copies: Copies) -> None:
    """What a snapshot looks at (queued bytes, counters, signals) is still there afterwards."""
    start(victims, run / "twin")
    victim = start(victims, run / "zoo")
    before = ask(run / "zoo" / "control", "observe")
    for number in range(3):
        copies.snapshot(victim.pid, f"x{number}")
    compare(before, ask(run / "zoo" / "control", "observe"))
    compare(ask(run / "twin" / "control", "drain"), ask(run / "zoo" / "control", "drain"))
    assert ask(run / "zoo" / "control", "timers") == "expired"


def test_no_descriptor_is_left(victims: Victims, copies: Copies) -> None:
    """The library's own descriptors, before and after fifty restores."""
    victim = victims.start(["sleep", "1000000"])
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()

    def once() -> None:
        process = snapshot.restore()
        process.kill()
        assert process.wait() == -signal.SIGKILL

    once()
    before = open_descriptors()
    for _ in range(50):
        once()
    assert open_descriptors() == before


def asleep(victims: Victims, **options: int) -> Victim:
    victim = victims.start(["sleep", "1000000"], **options)
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    return victim


def test_what_runs_once_is_compiled_once(
    run: Path, victims: Victims, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that writes unread bytes back into a FIFO is for one restore only."""
    os.mkfifo(run / "fifo")
    fifo = os.open(run / "fifo", os.O_RDWR)
    os.write(fifo, b"unread")
    victim = asleep(victims, stdin=fifo)
    os.close(fifo)
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    compiled = []
    make_plan = restore_program.make_plan

    def counted(*arguments: Any, **more: Any) -> Any:
        compiled.append(arguments)
        return make_plan(*arguments, **more)

    monkeypatch.setattr(restore_program, "make_plan", counted)
    for number in range(2):
        copy = copies.restore(snapshot)
        assert len(compiled) == number + 1
        fifo = os.open(run / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        assert os.read(fifo, 100) == b"unread"
        copy.kill()
        os.close(fifo)


def test_a_caller_with_more_descriptors_than_a_copy_is_handed(victims: Victims, copies: Copies) -> None:
    """None of ours, whatever its number, may be overwritten by one that is handed over, before the copy has it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"at most {hard} descriptors are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    victim = asleep(victims)
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    held: list[int] = []
    try:
        for count in (980, 990, 995, 996, 997, 998, 999, 1000, 1001, 1002, 1003, 1010, 1100):
            while len(os.listdir("/proc/self/fd")) < count:
                held.append(os.dup(0))
            copies.restore(snapshot).kill()
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_in_each_others_way_than_the_soft_limit_has_room_for(run: Path, victims: Victims, copies: Copies) -> None:
    """1024 is what most shells have; the handed-over descriptors lie just below."""
    code = (
        "import os, select, socket, time; kept = []\n"
        "for _ in range(60):\n"
        "    kept += [os.pipe(), os.eventfd(7), open('/etc/passwd'), socket.socketpair(), select.epoll()]\n"
        "os.mkdir('ready'); time.sleep(1000000)"
    )
    victim = victims.start([sys.executable, "-c", code], cwd=run)
    victim.until((run / "ready").exists, "its descriptors")
    before = kinds_of(victim.pid)
    assert len(before) > 400
    copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    limited = "import os, resource, sys; hard = resource.getrlimit(7)[1]; resource.setrlimit(7, (1024, hard)); "
    limited += "os.execv(sys.argv[1], sys.argv[1:])"
    words = command(run / "store", "restore", "x", "--detach")
    answer = subprocess.run([sys.executable, "-c", limited, *words], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    after = kinds_of(victim.pid)
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: not alive(victim.pid), "the end of the copy")
    assert after == before


def test_no_free_number_below_the_handed_over_ones(run: Path, victims: Victims, copies: Copies) -> None:
    """From 0 to above 1000 each number is taken, as in a large server: what the restore opens lies above them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"at most {hard} descriptors are allowed")
    code = (
        "import os, resource, time; resource.setrlimit(7, (1500, resource.getrlimit(7)[1]))\n"
        "while os.open('/dev/null', os.O_RDONLY) < 1200: pass\n"
        "os.mkdir('ready'); time.sleep(1000000)"
    )
    victim = victims.start([sys.executable, "-c", code], cwd=run)
    victim.until((run / "ready").exists, "its descriptors")
    before = kinds_of(victim.pid)
    assert len(before) == 1201
    copy = copies.replace(victim)
    assert kinds_of(copy.pid) == before


def kinds_of(pid: int) -> dict[int, str]:
    """Descriptor → what it is, without inode numbers."""
    folder = Path(f"/proc/{pid}/fd")
    return {int(entry.name): os.readlink(entry).split(":[")[0] for entry in folder.iterdir()}


LISTENER = """
import os, socket, sys
os.setresgid(567, 567, 567)
os.setresuid(1234, 1234, 1234)
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0" + sys.argv[1])
listener.listen(3)
while True:
    connection, _ = listener.accept()
    connection.close()
"""


def test_clients_are_told_whose_a_listener_is(run: Path, victims: Victims, copies: Copies) -> None:
    """Not the restorer's, which is root here."""
    name = f"\0{run}"

    def told() -> tuple[int, ...]:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(name)
            return struct.unpack("=3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))

    def listens() -> bool:
        try:
            return bool(told())
        except ConnectionRefusedError:
            return False

    victim = victims.start([SYSTEM_PYTHON, "-c", LISTENER, name[1:]])
    victim.until(listens, "the listener")
    copies.replace(victim)
    assert told() == (victim.pid, 1234, 567)
