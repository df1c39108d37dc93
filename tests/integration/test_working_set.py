"""A first restore records what it touches; later ones, of this pager and of the next, get it before they ask."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import Victim, Victims, alive, connections_of, http_get, until
from helpers_cli import command, run_cli
from helpers_copies import Copies, Copy

import lazyrestore
from lazyrestore.pager.launch import connect_existing
from lazyrestore.store import ImageStore


def stored_set(run: Path, name: str) -> bytes:
    with ImageStore.open(run / "store") as store, store.open_image(name) as image:
        return image.working_set


def start_worker(run: Path, victims: Victims, rows: int) -> tuple[Victim, int]:
    """numpy_worker.py with eight data sets of `rows` x 1024 numbers, and its port."""
    data = run / "data"
    data.mkdir()
    for name in range(8):
        np.save(data / f"{name}.npy", np.random.default_rng(name).normal(size=(rows, 1024)))
    victim = victims.python("numpy_worker.py", data, run / "port")
    return victim, victim.until(lambda: int((run / "port").read_text()), "the port")


def faults_of(copy: Copy) -> tuple[int, int]:
    """(faults, pages brought) of the copy alone."""
    space = next(space for space in copy.process.stats().spaces if space.pid == copy.pid)
    return space.counters.missing + space.counters.minor, space.counters.replayed


def test_recorded_kept_and_brought(run: Path, victims: Victims, copies: Copies) -> None:
    victim, port = start_worker(run, victims, 256)
    answers = {http_get(port, "/small") for _ in range(4)}
    digest = http_get(port, "/digest")
    victim.quiet()

    first = copies.replace(victim)
    answers.add(http_get(port, "/small"))
    faults, brought = faults_of(first)
    assert faults > 64 and not brought
    first.kill()
    until(lambda: stored_set(run, "x"), "the working set in the store")

    second = copies.restore(first.snapshot)
    answers.add(http_get(port, "/small"))
    again, brought = faults_of(second)
    assert again < faults / 2 and brought
    second.kill()

    client = connect_existing(first.snapshot._image.key, "x")
    assert client
    with client:
        client.stop()
        pager = client.pids()[0]
    first.snapshot.close()
    until(lambda: not Path(f"/proc/{pager}").exists(), "the end of the pager")
    with copies.store.get("x") as snapshot:
        third = Copy(snapshot.restore(), snapshot, run)
        answers.add(http_get(port, "/small"))
        again, brought = faults_of(third)
        assert again < faults / 2 and brought
        assert http_get(port, "/digest") == digest
        third.kill()
    assert len(answers) == 1


def test_show_says_that_there_is_one(run: Path, copies: Copies, victims: Victims) -> None:
    victim = victims.start(["/bin/sleep", "1000"])
    victim.quiet()
    snapshot = copies.snapshot(victim.pid, "s")
    assert snapshot.working_set_bytes == 0
    with ImageStore.open(run / "store") as store, store.open_image("s") as image:
        assert store.keep_working_set("s", image.snapshot, bytes(8))
    with lazyrestore.Store.open(run / "store") as again, again.get("s") as shown:
        assert 0 < shown.working_set_bytes < shown.raw_bytes


def test_record_until_it_answers(run: Path, victims: Victims, copies: Copies) -> None:
    victim, port = start_worker(run, victims, 64)
    answer = http_get(port, "/small")
    victim.quiet()
    copies.snapshot(victim.pid, "r", kill=True)
    victim.gone()
    refused = run_cli(run / "store", "record", "r", "--until-port", port, "--for", 1)
    assert refused.returncode == 2
    done = run_cli(
        run / "store", "record", "r", "--until-port", port, "--request", "GET /small HTTP/1.0\\r\\n\\r\\n", "--json"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kept"] and told["chunks"] > 64
    assert stored_set(run, "r")
    shown = run_cli(run / "store", "show", "r")
    assert f"{told['chunks']} chunks" in shown.stdout
    again = run_cli(run / "store", "record", "r", "--for", 0.1, "--json")
    assert json.loads(again.stdout)["chunks"] >= told["chunks"]
    with copies.store.get("r") as snapshot:
        copy = Copy(snapshot.restore(), snapshot, run)
        assert http_get(port, "/small") == answer
        faults, brought = faults_of(copy)
        assert brought > faults
        copy.kill()


def test_no_record(run: Path, victims: Victims, copies: Copies) -> None:
    victim = victims.start(["/bin/sleep", "1000"])
    victim.quiet()
    copies.snapshot(victim.pid, "s", kill=True)
    victim.gone()
    done = run_cli(run / "store", "restore", "s", "--detach", "--no-record", "--json")
    with copies.store.get("s") as snapshot:
        assert snapshot.end_recording() == 0
    os.kill(json.loads(done.stdout)["pid"], signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_ended_record_leaves_no_copy(run: Path, victims: Victims, copies: Copies, number: int) -> None:
    victim = victims.start(["/bin/sleep", "1000"])
    victim.quiet()
    copies.snapshot(victim.pid, "s", kill=True)
    victim.gone()
    defaults = ["env", "--default-signal=INT,HUP,TERM"]  # whoever runs the tests may ignore them
    recording = subprocess.Popen(
        [*defaults, *command(run / "store", "record", "s", "--for", 600)], stderr=subprocess.DEVNULL
    )
    until(lambda: alive(victim.pid), "the copy")
    recording.send_signal(number)
    assert recording.wait(60) == 130
    assert not alive(victim.pid)


@pytest.mark.parametrize("where", ["same", "other"])
def test_snapshot_of_a_copy_is_not_recorded(run: Path, victims: Victims, copies: Copies, where: str) -> None:
    """What is read for it is no touch of the process; into whichever store."""
    victim, port = start_worker(run, victims, 256)
    answer = http_get(port, "/small")
    victim.quiet()
    first = copies.replace(victim)
    for _ in range(3):  # after each answer it touches some more; after the last one what it has touched before
        assert http_get(port, "/small") == answer
    first.until(lambda: not connections_of(first.pid), "the end of the connections")
    client = connect_existing(first.snapshot._image.key, "x")
    assert client
    with client:
        touched = len(client.working_set())
        assert touched
        with lazyrestore.Store.open(run / ("store" if where == "same" else "other")) as store:
            store.snapshot(first.pid, name="y", kill=True).close()
        first.process.wait(60)
        until(lambda: not client.stats().spaces, "the end of the copy")
        assert len(client.working_set()) < touched * 1.1
