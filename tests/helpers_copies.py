"""Snapshot a victim, let it die, restore it, and compare what the kernel says of both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
from helpers import Victim, Victims, until
from helpers_facts import differences, process_facts

if TYPE_CHECKING:
    import lazyrestore

T = TypeVar("T")


class Copy:
    """A restored process under test."""

    def __init__(self, process: lazyrestore.RestoredProcess, snapshot: lazyrestore.Snapshot, log: Path) -> None:
        self.process = process
        self.snapshot = snapshot
        self.pid = process.pid
        self.log = log

    def check(self) -> None:
        """Raise if the copy has ended."""
        if (status := self.process.poll()) is not None:
            raise AssertionError(f"the copy ended with {status}; {self.log.read_text()[-2000:]}")

    def until(self, condition: Callable[[], T | None], what: str) -> T:
        return until(condition, what, self.check)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)


def has_the_plan_of_its_manifest(snapshot: lazyrestore.Snapshot) -> None:
    """What is stored with it is, byte for byte, what this process makes of its manifest. Raise if not."""
    from lazyrestore import stored_plan
    from lazyrestore.errors import RestoreError
    from lazyrestore.restore_program import make_plan

    image = snapshot._image
    stored = stored_plan.usable(image.plan, image.manifest_sum)
    try:
        made = make_plan(snapshot.manifest)
    except RestoreError:
        made = None
    if made is None or not made.reusable:
        assert not image.plan
        return
    encode = msgspec.msgpack.encode
    assert (stored is not None and encode(stored[1]) == encode(made)) is True


class Copies:
    """Makes copies and ends them."""

    def __init__(self, store: lazyrestore.Store, victims: Victims) -> None:
        self.store = store
        self._victims = victims
        self._made: list[Copy] = []
        self._snapshots: list[lazyrestore.Snapshot] = []

    def restore(self, snapshot: lazyrestore.Snapshot) -> Copy:
        """Restore one more time; the PID must be free."""
        copy = Copy(snapshot.restore(), snapshot, self._victims.log_of(snapshot.pid))
        self._made.append(copy)
        return copy

    def snapshot(self, pid: int, name: str, *, kill: bool = False) -> lazyrestore.Snapshot:
        """A snapshot that is closed at the end of the test."""
        snapshot = self.store.snapshot(pid, name=name, kill=kill)
        self._snapshots.append(snapshot)
        has_the_plan_of_its_manifest(snapshot)
        return snapshot

    def replace(self, victim: Victim, name: str = "x", *, ignore: tuple[str, ...] = ()) -> Copy:
        """Snapshot with kill=True, reap the original, restore, and compare all facts but those in `ignore`."""
        before = process_facts(victim.pid)
        snapshot = self.snapshot(victim.pid, name, kill=True)
        victim.gone()
        copy = self.restore(snapshot)
        try:
            after = process_facts(copy.pid)
        except OSError:
            copy.process.wait(60)
            copy.check()
            raise
        changed = {what: how for what, how in differences(before, after).items() if what not in ignore}
        assert not changed, changed
        assert copy.pid == victim.pid
        return copy

    def end(self) -> None:
        for copy in self._made:
            with suppress(ProcessLookupError):
                copy.kill()
        for snapshot in self._snapshots:
            snapshot.close()
