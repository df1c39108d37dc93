"""`record --until-ready`: the copy says READY=1 at the socket that its environment names, and meets us there."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import GUARD_SECONDS, Victim, Victims, alive, until
from helpers_cli import command, run_cli
from helpers_copies import Copies

from lazyrestore.errors import RestoreError

DATA = 4 << 20  # what the notifier reads before it is ready


def notifier(run: Path, victims: Victims, address: str) -> Victim:
    victim = victims.python("notifier.py", run / "go", environment={"NOTIFY_SOCKET": address})
    victim.until(lambda: "waits" in victim.log.read_text(), "a waiting notifier")
    return victim


def stored(run: Path, copies: Copies, victim: Victim) -> None:
    """The snapshot n of the victim, which ends; its copy may go."""
    copies.snapshot(victim.pid, "n", kill=True)
    victim.gone()
    (run / "go").touch()


def address_of(run: Path, kind: str) -> str:
    return f"@{run}" if kind == "abstract" else f"{run}/notify"


@pytest.mark.parametrize("pid", ["same", "new"])
@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_until_ready(run: Path, victims: Victims, copies: Copies, kind: str, pid: str) -> None:
    stored(run, copies, notifier(run, victims, address_of(run, kind)))
    done = run_cli(run / "store", "record", "n", "--until-ready", "--pid", pid, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kept"]
    assert told["bytes"] > DATA  # so it was not the first state that ended it
    assert not (run / "notify").exists()
    assert not set(victims.marked())


def test_beside_who_listens_there(run: Path, victims: Victims, copies: Copies) -> None:
    """As under systemd: only a copy with mounts of its own can be made to talk to us; nobody else notices."""
    address = address_of(run, "path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(address)
        stored(run, copies, notifier(run, victims, address))
        refused = run_cli(run / "store", "record", "n", "--until-ready")
        assert refused.returncode == RestoreError.exit_status
        assert address in refused.stderr and "--pid new" in refused.stderr
        done = run_cli(run / "store", "record", "n", "--until-ready", "--pid", "new", "--json")
        assert json.loads(done.stdout)["bytes"] > DATA, done.stderr
        with pytest.raises(BlockingIOError):
            supervisor.recv(100, socket.MSG_DONTWAIT)
        assert supervisor.getsockname() == address and Path(address).is_socket()
    assert address not in Path("/proc/self/mountinfo").read_text()


CLIENT = """
import os, signal, subprocess, sys, time
os.chdir(sys.argv[1])
open("waits", "w").close()
while not os.path.exists("go"):
    time.sleep(0.01)
open(f"said-{subprocess.call(['systemd-notify', '--ready'])}", "w").close()
signal.pause()
"""

ENDS = CLIENT.partition("open(f")[0] + "sys.exit(3)"


@pytest.mark.skipif(not shutil.which("systemd-notify"), reason="systemd-notify is not installed")
def test_the_library_and_systemds_own_client(run: Path, victims: Victims, copies: Copies) -> None:
    """That one waits until its barrier's descriptor is closed (sd_notify_barrier(3))."""
    environment = {"NOTIFY_SOCKET": address_of(run, "path")}
    victim = victims.start([sys.executable, "-c", CLIENT, run], environment=environment)
    victim.until((run / "waits").exists, "a waiting client")
    snapshot = copies.snapshot(victim.pid, "n", kill=True)
    victim.gone()
    with snapshot.listen_for_ready(new_pid=True) as ready:
        process = snapshot.restore(new_pid=True, ready=ready)
        with pytest.raises(TimeoutError):
            ready.wait(process.poll, 0.01)
        (run / "go").touch()
        ready.wait(process.poll, GUARD_SECONDS)

        def went_on() -> bool:
            with pytest.raises(TimeoutError):  # takes the barrier, if it has come
                ready.wait(process.poll, 0.01)
            return (run / "said-0").exists()

        until(went_on, "a client that went on")
    process.kill()
    process.wait(60)


def test_what_cannot_be(run: Path, victims: Victims, copies: Copies) -> None:
    for name, environment, reason in (
        ("none", {}, "without NOTIFY_SOCKET"),
        ("vsock", {"NOTIFY_SOCKET": "vsock:2:1"}, "vsock:2:1 is neither"),
        ("nowhere", {"NOTIFY_SOCKET": f"{run}/no/notify"}, "No such file"),
    ):
        victim = victims.start(["/bin/sleep", "1000"], environment=environment)
        victim.quiet()
        with copies.snapshot(victim.pid, name) as snapshot, pytest.raises(RestoreError, match=reason):
            snapshot.listen_for_ready()
    address = address_of(run, "path")
    victim = victims.start([sys.executable, "-c", ENDS, run], environment={"NOTIFY_SOCKET": address})
    victim.until((run / "waits").exists, "a waiting process")
    copies.snapshot(victim.pid, "ends", kill=True)
    victim.gone()
    (run / "go").touch()
    done = run_cli(run / "store", "record", "ends", "--until-ready")
    assert done.returncode == RestoreError.exit_status
    assert "ended with 3 before" in done.stderr
    assert not Path(address).exists()
    excluded = run_cli(run / "store", "record", "ends", "--until-ready", "--for", 1)
    assert excluded.returncode == 2


def test_an_ended_recording_leaves_no_socket(run: Path, victims: Victims, copies: Copies) -> None:
    address = address_of(run, "path")
    victim = victims.start(["/bin/sleep", "1000"], environment={"NOTIFY_SOCKET": address})
    victim.quiet()
    copies.snapshot(victim.pid, "s", kill=True)
    victim.gone()
    words = ["env", "--default-signal=TERM", *command(run / "store", "record", "s", "--until-ready")]
    recording = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    until(lambda: alive(victim.pid), "the copy")
    recording.send_signal(signal.SIGTERM)
    assert recording.wait(60) == 130
    assert not Path(address).exists()
