"""Cgroups of a test's own, in the hierarchy of version 2, wherever it is mounted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import until


class Groups:
    """Cgroups below one that is the test's own."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount
        self.top = mount / f"lazyrestore-test-{os.getpid()}"
        self.top.mkdir()

    def make(self, name: str) -> Path:
        """The cgroup of that name (it may be "a/b"), made with those above it."""
        path = self.top / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def inside(self, group: Path) -> Iterator[None]:
        """This process is in that cgroup, and what it starts there stays."""
        before = self.mount / cgroup_of(os.getpid()).lstrip("/")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (before / "cgroup.procs").write_text(str(os.getpid()))

    def end(self) -> None:
        """Kill what is left, and remove them all."""
        kill(self.top)
        for path, _, _ in os.walk(self.top, topdown=False):
            until(lambda path=path: os.rmdir(path) or True, f"the end of {path}")  # type: ignore[misc]


def cgroup_of(pid: int) -> str:
    """Its path in the hierarchy of version 2."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))


def members(group: Path) -> list[int]:
    return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]


def kill(group: Path) -> None:
    """All that is in it or below, in one instant."""
    (group / "cgroup.kill").write_text("1")


@contextmanager
def groups() -> Iterator[Groups]:
    """Skips where there can be none."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    mount = next((Path(words[1]) for words in mounts if words[2] == "cgroup2"), None)
    if mount is None:
        pytest.skip("no cgroups of version 2 are mounted")
    try:
        made = Groups(mount)
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        yield made
    finally:
        made.end()
