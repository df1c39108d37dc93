"""A snapshot that is removed, or replaced, while a copy runs: its space is given back when the copy has ended."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers import Victims, until
from helpers_cli import run_cli
from helpers_copies import Copies

from lazyrestore.store import ImageStore


@pytest.mark.parametrize("how", ["rm", "replace"])
def test_freed_with_its_pager(run: Path, victims: Victims, copies: Copies, how: str) -> None:
    victim = victims.start(["/bin/sleep", "1000"])
    copies.snapshot(victim.pid, "s", kill=True).close()
    victim.gone()
    done = run_cli(run / "store", "restore", "s", "--detach", "--json")
    pid = json.loads(done.stdout)["pid"]
    with ImageStore.open(run / "store") as store:
        (before,) = store.keys().values()
        if how == "rm":
            removed = run_cli(run / "store", "rm", "s")
            assert "the rest once its processes have ended" in removed.stdout
        else:
            other = victims.start(["/bin/sleep", "1001"])
            run_cli(run / "store", "snapshot", other.pid, "--name", "s", "--replace")
        assert before in store.keys().values()
        os.kill(pid, signal.SIGKILL)
        until(lambda: before not in store.keys().values(), "the space of the removed snapshot")
        assert len(store.keys()) == (how == "replace")
        assert not store.gc().packs
        assert not store.verify().damage
