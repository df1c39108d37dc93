"""A CPython worker with numpy and a loaded data set, behind http.server with threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import Victim, Victims, http_get, in_threads
from helpers_copies import Copies


@pytest.fixture
def data(run: Path) -> Path:
    """Eight arrays of 8 MiB."""
    directory = run / "data"
    directory.mkdir()
    generator = np.random.default_rng(1)
    for name in range(8):
        np.save(directory / f"{name}.npy", generator.normal(size=(1024, 1024)))
    return directory


def start(victims: Victims, data: Path, port_file: Path) -> tuple[Victim, int]:
    victim = victims.python("numpy_worker.py", data, port_file)
    port = victim.until(lambda: int(port_file.read_text()), "the port")
    for n in range(4):
        http_get(port, f"/compute?n={n}")
    http_get(port, "/small")
    return victim, port


def test_answers_as_before_and_goes_on(run: Path, victims: Victims, copies: Copies, data: Path) -> None:
    twin, twin_port = start(victims, data, run / "twin")
    victim, port = start(victims, data, run / "port")
    expected = http_get(port, "/digest")
    assert expected == http_get(twin_port, "/digest")
    products = [http_get(twin_port, f"/compute?n={n}") for n in range(64)]
    for each in (port, twin_port):
        http_get(each, "/random?n=5")
    served = int(http_get(port, "/served"))
    victim.quiet()

    copy = copies.replace(victim)
    assert http_get(port, "/small") == http_get(twin_port, "/small")
    stats = copy.process.stats()
    assert 0 < stats.chunks_filled < stats.chunks_total / 2, stats
    assert stats.bytes_filled < copy.snapshot.raw_bytes / 2

    assert int(http_get(port, "/served")) == served + 2
    assert http_get(port, "/random?n=9") == http_get(twin_port, "/random?n=9")

    def load(thread: int) -> None:
        for n in range(thread, 64, 8):
            assert http_get(port, f"/compute?n={n}") == products[n]
            assert int(http_get(port, f"/allocate?n={1 << 20}")) == (1 << 20) * ((1 << 20) - 1) // 2

    in_threads(8, load)
    assert http_get(port, "/digest") == expected
    twin.check()
    copy.process.terminate()
    assert copy.process.wait(60) == -15


def test_snapshot_of_a_copy(run: Path, victims: Victims, copies: Copies, data: Path) -> None:
    """A second generation: what was never touched in the first copy must be in the second snapshot all the same."""
    victim, port = start(victims, data, run / "port")
    expected = http_get(port, "/digest")
    victim.quiet()
    first = copies.replace(victim, "first")
    http_get(port, "/small")
    snapshot = copies.snapshot(first.pid, "second", kill=True)
    first.process.wait(60)
    copies.restore(snapshot)
    assert http_get(port, "/digest") == expected
