"""A process with more memory than there is for it: restored, and touched in part.

The memory that there is is that of a cgroup in which the restoring command, the pager and the process run: what the
pager decompresses is charged to it, and what the process writes to the process.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import Builder, Victims, alive, ask, until
from helpers_cli import command

import lazyrestore

SIZE, LIMIT = 768 << 20, 256 << 20  # bytes
PAGES = SIZE // 4096
TOUCHED = 2000  # pages
TREES = ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max"))


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup of at most LIMIT bytes; ends what is in it."""
    for tree, limit in TREES:
        made = tree / f"lazyrestore-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        if (made / limit).exists():
            break
        made.rmdir()
    else:
        pytest.skip("no cgroup whose memory can be limited")
    (made / limit).write_text(str(LIMIT))
    yield made

    def empty() -> bool:
        for pid in (made / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        return not (made / "cgroup.procs").read_text()

    until(empty, "the end of everything in the cgroup")
    until(lambda: made.rmdir() or True, "the end of the cgroup")


def test_touched_in_part(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, group: Path) -> None:
    control = run / "large"
    victim = victims.start([build.c("large"), control, str(SIZE >> 20)])
    victim.listens(control)
    with store.snapshot(victim.pid, name="large", kill=True) as snapshot:
        assert snapshot.raw_bytes >= SIZE > LIMIT
    victim.gone()
    enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', group / "cgroup.procs"]
    subprocess.run(
        [*enter, *command(store.path, "restore", "large", "--detach")], check=True, stdout=subprocess.DEVNULL
    )
    assert str(victim.pid) in (group / "cgroup.procs").read_text().split()
    for first in (0, 100, PAGES - 16):
        assert ask(control, f"{first} 1 16") == "0 wrong"
    assert ask(control, f"1 {PAGES // TOUCHED} {TOUCHED - 1}") == "0 wrong"  # all over it, a chunk for each
    usage = next(group / name for name in ("memory.usage_in_bytes", "memory.current") if (group / name).exists())
    assert TOUCHED * 4096 < int(usage.read_text()) <= LIMIT  # it is here that the memory is counted
    assert alive(victim.pid)
