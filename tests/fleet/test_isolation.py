"""Clones share a template and a pager, and nothing else: neither bytes nor delays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
from pathlib import Path

import pytest
from helpers import Victims, until
from helpers_fleet import awaited, report, reporter

import lazyrestore
from lazyrestore.kernel import libc

CLONES = 50
MEGABYTES = 2
PTRACE_ATTACH, PTRACE_DETACH = 16, 17


def template_digest(snapshot: lazyrestore.Snapshot) -> str:
    """Of all that the template holds, when every chunk is filled."""
    client = snapshot._connect()
    until(lambda: (stats := client.stats()).chunks_filled == stats.chunks_total, "a filled template")
    digest = hashlib.blake2b()
    for address, length, *_ in snapshot._image.entries():
        data = os.pread(client.template_fd, length, address)
        assert data == b"".join(piece for _, piece in snapshot._image.contents(address, address + length)), hex(address)
        digest.update(data)
    return digest.hexdigest()


def tell(run: Path, pid: int, number: int) -> str:
    """The painter's digest of what it has found."""
    path = run / f"painter-{os.stat(f'/proc/{pid}/ns/pid').st_ino}"
    os.kill(pid, number)
    answer = awaited(path)
    path.unlink()
    return answer


def test_what_a_clone_writes_is_its_own(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = victims.python("painter.py", run, str(MEGABYTES))
    victim.until((run / "ready").exists, "a ready painter")
    original = tell(run, victim.pid, signal.SIGUSR2)
    with store.snapshot(victim.pid, name="x") as snapshot:
        clones = [snapshot.restore(new_pid=True, fill="now"), *snapshot.clones(CLONES - 1)]
        before = template_digest(snapshot)
        for clone in clones:  # each reads what the others must not have painted, then paints
            assert tell(run, clone.pid, signal.SIGUSR1) == original
        painted = set()
        for clone in clones:
            inode = os.stat(f"/proc/{clone.pid}/ns/pid").st_ino
            found = tell(run, clone.pid, signal.SIGUSR2)
            assert found == hashlib.blake2b(inode.to_bytes(8, "little") * (MEGABYTES << 17)).hexdigest()
            painted.add(found)
        assert len(painted) == CLONES
        assert template_digest(snapshot) == before
        last = snapshot.restore(new_pid=True)
        assert tell(run, last.pid, signal.SIGUSR2) == original
        for clone in (*clones, last):
            clone.kill()
            clone.wait(60)
    assert tell(run, victim.pid, signal.SIGUSR2) == original


@pytest.mark.parametrize("at_once", [True, False])
def test_parked_clones_have_their_own_pages(
    run: Path, victims: Victims, store: lazyrestore.Store, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """Of what the recorded one wrote, before they run; with the contents that the snapshot has."""
    if not at_once:  # as on Linux before 6.13
        monkeypatch.setattr(libc, "madvises_itself_at_once", lambda _advice: False)
    victim = victims.python("painter.py", run, str(MEGABYTES))
    victim.until((run / "ready").exists, "a ready painter")
    original = tell(run, victim.pid, signal.SIGUSR2)
    with store.snapshot(victim.pid, name="x") as snapshot:
        first = snapshot.restore(new_pid=True, record=True)
        assert tell(run, first.pid, signal.SIGUSR1) == original
        snapshot.end_recording()
        first.kill()
        first.wait(60)
        with snapshot.pool(2) as pool:
            assert pool.wait_until_full(60)
            for clone in pool._parked:
                rollup = Path(f"/proc/{clone.pid}/smaps_rollup").read_text()
                anonymous = next(line for line in rollup.splitlines() if line.startswith("Anonymous:"))
                assert int(anonymous.split()[1]) >= MEGABYTES << 10
            with pool.take() as one, pool.take() as other:
                assert tell(run, one.pid, signal.SIGUSR1) == original
                assert tell(run, other.pid, signal.SIGUSR2) == original
        last = snapshot.restore(new_pid=True, fill="now")
        template_digest(snapshot)  # compares it with the store
        last.kill()
        last.wait(60)


def file_pages(pid: int) -> int:
    """KiB of mapped libraries that the process has mapped by now."""
    mapped = library = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            library = ".so" in line
        elif first == "Rss:" and library:
            mapped += int(line.split()[1])
    return mapped


@pytest.mark.parametrize("at_once", [True, False])
def test_parked_clones_have_the_pages_of_files_that_one_before_had(
    run: Path, victims: Victims, store: lazyrestore.Store, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr(libc, "madvises_itself_at_once", lambda _advice: False)
    victim = victims.python("painter.py", run, str(MEGABYTES))
    victim.until((run / "ready").exists, "a ready painter")
    original = tell(run, victim.pid, signal.SIGUSR2)
    with store.snapshot(victim.pid, name="x") as snapshot, snapshot.pool(1) as pool:
        assert pool.wait_until_full(60)
        assert file_pages(pool._parked[0].pid) == 0
        with pool.take() as clone:
            assert tell(run, clone.pid, signal.SIGUSR1) == original
            had = file_pages(clone.pid)
        with pool.take(60):  # its place was taken before or after the first one was looked at
            pass
        assert pool.wait_until_full(60)
        assert file_pages(pool._parked[0].pid) >= had > 0
        with pool.take() as clone:
            assert tell(run, clone.pid, signal.SIGUSR1) == original


def test_killed_stopped_and_traced_ones_delay_nobody(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """Each of them has begun to fault over all of its memory; the last one must get all of its own nevertheless."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    victim = reporter(run, victims)
    expected = ["2", *report(run, victim.pid)[1:]]
    with store.snapshot(victim.pid, name="x") as snapshot:
        killed, stopped, traced, other = snapshot.clones(4, record=False)
        for clone in (killed, stopped, traced):
            os.kill(clone.pid, signal.SIGUSR1)
        os.kill(stopped.pid, signal.SIGSTOP)
        assert ptrace(PTRACE_ATTACH, traced.pid, None, None) == 0, os.strerror(ctypes.get_errno())
        killed.kill()
        assert report(run, other.pid) == expected
        os.waitpid(traced.pid, 0)
        assert report(run, snapshot.restore(new_pid=True).pid) == expected
        assert ptrace(PTRACE_DETACH, traced.pid, None, None) == 0, os.strerror(ctypes.get_errno())
        os.kill(stopped.pid, signal.SIGCONT)
        for clone in (stopped, traced):  # they go on where they were held up
            name = run / f"report-{os.stat(f'/proc/{clone.pid}/ns/pid').st_ino}"
            assert awaited(name).split() == expected
