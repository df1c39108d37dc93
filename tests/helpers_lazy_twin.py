"""Two processes of one program that get the same requests: one is snapshotted, killed and restored, its twin never."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from helpers import Victim, Victims, ask

import lazyrestore

PAGE = 4096

Command = Callable[[Path], Sequence[str | Path]]  # the program's command, given the name of its control socket


class Twins:
    """`both` asks both and compares; `restore` replaces one of them."""

    def __init__(
        self,
        victims: Victims,
        store: lazyrestore.Store,
        directory: Path,
        command: Command,
        environment: Mapping[str, str],
    ) -> None:
        self._store, self.directory = store, directory
        self._snapshots: list[lazyrestore.Snapshot] = []
        self.copy: lazyrestore.RestoredProcess | None = None
        self.never, self.original = (self._start(victims, name, command, environment) for name in ("never", "restored"))

    def _start(self, victims: Victims, name: str, command: Command, environment: Mapping[str, str]) -> Victim:
        directory = self.directory / name
        directory.mkdir(parents=True)
        victim = victims.start(command(directory / "control"), cwd=directory, environment=environment)
        victim.listens(directory / "control")
        return victim

    @property
    def pids(self) -> tuple[int, int]:
        """The twin's, and the restored one's, which is the original's."""
        return self.never.pid, self.original.pid

    def ask(self, name: str, *words: object) -> str:
        """The answer of one: "never" or "restored"."""
        try:
            return ask(self.directory / name / "control", " ".join(map(str, words)))
        except OSError as error:
            status = self.copy.poll() if self.copy and name == "restored" else None
            raise AssertionError(f"{name}: {error!r} at {words}, status {status}") from error

    def both(self, *words: object) -> str:
        """The answer, which must be the same of both."""
        expected, answer = self.ask("never", *words), self.ask("restored", *words)
        assert answer == expected, words
        return answer

    def snapshot(self) -> lazyrestore.Snapshot:
        """Snapshot and kill one of the two."""
        name = f"{self.directory.name}-{len(self._snapshots)}"
        snapshot = self._store.snapshot(self.original.pid, name=name, kill=True)
        self._snapshots.append(snapshot)
        if self.copy is None:
            self.original.gone()
        else:
            self.copy.wait()
        return snapshot

    def restore(self) -> lazyrestore.RestoredProcess:
        """Snapshot, kill and restore one of the two."""
        self.copy = self.snapshot().restore()
        assert self.copy.pid == self.original.pid
        return self.copy

    def close(self) -> None:
        for victim in (self.never, self.original):
            victim.kill()
        if self.copy is not None and self.copy.poll() is None:
            self.copy.kill()
            self.copy.wait()
        for snapshot in self._snapshots:
            snapshot.close()
            self._store.remove(snapshot.name)


@contextmanager
def twins_in(
    victims: Victims,
    store: lazyrestore.Store,
    directory: Path,
    command: Command,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Twins]:
    twins = Twins(victims, store, directory, command, environment or {})
    try:
        yield twins
    finally:
        twins.close()


InArena = Callable[..., AbstractContextManager[Twins]]
"""The fixture in_arena: twins of victims/twin.c whose maps begin at ARENA and end at ARENA_END, or where it is told."""


def resident(pid: int) -> int:
    """Bytes of a process's memory that are present: its own pages and those of mapped files."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def lazily_freed(pid: int) -> int:
    """KiB under MADV_FREE."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("LazyFree:"))
