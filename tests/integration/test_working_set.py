"""A first restore records what it touches; later ones, of this pager and of the next, get it before they ask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers import Victims, http_get, until
from helpers_copies import Copies, Copy

import lazyrestore
from lazyrestore.pager.launch import connect_existing
from lazyrestore.store import ImageStore


def stored_set(run: Path, name: str) -> bytes:
    with ImageStore.open(run / "store") as store, store.open_image(name) as image:
        return image.working_set


def faults_of(copy: Copy) -> tuple[int, int]:
    """(faults, pages brought) of the copy alone."""
    space = next(space for space in copy.process.stats().spaces if space.pid == copy.pid)
    return space.counters.missing + space.counters.minor, space.counters.replayed


def test_recorded_kept_and_brought(run: Path, victims: Victims, copies: Copies) -> None:
    data = run / "data"
    data.mkdir()
    for name in range(8):
        np.save(data / f"{name}.npy", np.random.default_rng(name).normal(size=(256, 1024)))
    victim = victims.python("numpy_worker.py", data, run / "port")
    port = victim.until(lambda: int((run / "port").read_text()), "the port")
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
