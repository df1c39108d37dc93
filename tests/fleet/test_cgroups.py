"""Clones whose pager and its keeper are killed at once, with the cgroup of whoever restored the first one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Victims, alive, until
from helpers_cgroup import Groups, groups, kill, members
from helpers_cli import command
from helpers_fleet import report, reporter

import lazyrestore

POOL = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
import lazyrestore
from helpers_fleet import report
with lazyrestore.Store.open(sys.argv[1]) as store, store.get("x") as snapshot, snapshot.pool(3) as pool:
    pool.wait_until_full()
    print(*(clone.pid for clone in pool._parked), flush=True)
    sys.stdin.readline()
    print(*report(Path(sys.argv[2]), pool.take().pid), flush=True)
"""


@pytest.fixture(autouse=True)
def own_runtime(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pagers that others start and end at the same time connect to these as they leave, and these linger on."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run))


@pytest.fixture
def trees() -> Iterator[Groups]:
    with groups() as made:
        yield made


def within(group: Path, words: list[str]) -> list[str]:
    """The words, run from within that cgroup."""
    return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *words]


def restored(store: lazyrestore.Store, group: Path, count: int) -> list[int]:
    """So many clones, started from that cgroup by a command that has ended."""
    words = command(store.path, "restore", "x", "-n", count, "--no-record")
    started = subprocess.run(within(group, words), stdout=subprocess.PIPE, text=True, check=True)
    return [int(line) for line in started.stdout.splitlines()]


@pytest.fixture
def expected(run: Path, victims: Victims, store: lazyrestore.Store, trees: Groups) -> list[str]:
    """What a clone reports. The first one, and so the pager, is from the cgroup "first"."""
    victim = reporter(run, victims)
    reported = report(run, victim.pid)
    store.snapshot(victim.pid, name="x").close()
    restored(store, trees.make("first"), 1)
    return ["2", *reported[1:]]


def test_clones_of_another_cgroup_are_ended(
    run: Path, store: lazyrestore.Store, trees: Groups, expected: list[str]
) -> None:
    """They sleep, and most of their memory has never been touched: they would wake up without it."""
    second = trees.make("second")
    clones = restored(store, second, 5)
    assert report(run, clones[0]) == expected
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in members(second)]
    assert names.count("lr-keeper") == 1
    kill(trees.top / "first")
    until(lambda: not any(alive(pid) for pid in clones), "the end of the clones")
    until(lambda: not members(second), "an empty cgroup")
    (again,) = restored(store, second, 1)
    assert report(run, again) == expected


def test_a_pool_goes_on_with_a_pager_of_its_own(
    run: Path, store: lazyrestore.Store, trees: Groups, expected: list[str]
) -> None:
    second = trees.make("second")
    words = [sys.executable, "-c", POOL, store.path, str(run), *sys.path]
    with subprocess.Popen(within(second, words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as pool:
        assert pool.stdout
        assert pool.stdin
        parked = [int(word) for word in pool.stdout.readline().split()]
        assert len(parked) == 3
        kill(trees.top / "first")
        until(lambda: not any(alive(pid) for pid in parked), "the end of the parked clones")
        pool.stdin.write("\n")
        pool.stdin.flush()
        assert pool.stdout.readline().split() == expected
    assert pool.returncode == 0
    until(lambda: not members(second), "an empty cgroup")
