"""`ImageStore`: one store, as the rest of lazyrestore sees it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from lazyrestore.errors import NotAStore, SnapshotNotFound, StoreBusy
from lazyrestore.store import format, image, locks, registry
from lazyrestore.store.environment import Environment, Transaction

if TYPE_CHECKING:
    from lazyrestore.store.check import Report
    from lazyrestore.store.garbage import Freed
    from lazyrestore.store.image import StoredImage
    from lazyrestore.store.report import Summary, Totals
    from lazyrestore.store.writer import ImageWriter, Progress


class ImageStore:
    """A directory of snapshots. Usable from many threads, and in a child after a fork; close() it, or use it in a
    `with`.

    All methods raise StoreError's subclasses: NotAStore and StoreVersionError on opening, StoreReadOnly, StoreFull and
    StoreBusy on writing, SnapshotNotFound and BadSnapshotName for names, ChunkInvalid for damage.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        try:
            self.path = os.path.abspath(os.fspath(path))
        except FileNotFoundError as error:
            reason, advice = "the working directory was removed", "go to another one, or name the store from / on"
            raise NotAStore(f"store {os.fspath(path)}", "open", reason, advice, errno=error.errno) from error
        self._acquired: Environment | None = registry.acquire(self.path, create=create)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = True) -> ImageStore:
        """The store in directory `path`, which is made (mode 0700) if it is missing and `create` is on."""
        return cls(path, create=create)

    def check_new(self, name: str, *, replace: bool = False) -> None:
        """Raises what writer() would about the name or the store: BadSnapshotName, SnapshotExists, StoreReadOnly."""
        from lazyrestore.store.writer import check_new

        check_new(self._environment, name, replace=replace)

    def writer(
        self,
        name: str,
        *,
        replace: bool = False,
        level: int = 1,
        progress: Progress | None = None,
        wait: bool = False,
    ) -> ImageWriter:
        """A new snapshot in the making, to be called `name`; see ImageWriter.

        replace: take the place of one that has the name; level: zstd's, 1 to 19; progress: called with (raw bytes done,
        raw bytes known of); wait: for another writer, instead of StoreBusy. Raises SnapshotExists at once.
        """
        from lazyrestore.store.writer import ImageWriter

        return ImageWriter(self._environment, name, replace=replace, level=level, progress=progress, wait=wait)

    def open_image(self, name: str) -> StoredImage:
        """The snapshot `name`, pinned: it stays readable, even if it is removed, until closed. Cost: O(packs)."""
        return image.open_image(self._environment, name)

    def keys(self) -> dict[str, int]:
        """What pagers know the snapshots by, and their ids; with those that were removed and are in use."""
        environment = self._environment
        with environment.read() as txn:
            return {image.key_of(environment, number): number for number in environment.keys(txn, format.SNAPSHOTS)}

    def find(self, names: Iterable[str]) -> dict[str, int]:
        """The ids of snapshots. SnapshotNotFound or BadSnapshotName if there is one that is not there."""
        environment = self._environment
        with environment.read() as txn:
            return {name: image.find(environment, txn, name) for name in names}

    def names(self) -> dict[str, int]:
        """The ids of all snapshots, by name."""
        from lazyrestore.store import report

        environment = self._environment
        with environment.read() as txn:
            return report.names(environment, txn)

    def ls(self) -> list[Summary]:
        """All snapshots, by name."""
        from lazyrestore.store import report

        environment = self._environment
        with environment.read() as txn:
            return [report.info(environment, txn, *item) for item in report.names(environment, txn).items()]

    def show(self, name: str) -> Summary:
        """What is known of one snapshot without its manifest."""
        from lazyrestore.store import report

        environment = self._environment
        with environment.read() as txn:
            return report.info(environment, txn, name, image.find(environment, txn, name))

    def manifest(self, name: str) -> bytes:
        """The manifest that was committed with the snapshot."""
        environment = self._environment
        with environment.read() as txn:
            snapshot = image.find(environment, txn, name)
            return image.manifest_of(environment, txn, snapshot, image.record_of(environment, txn, snapshot))[0]

    def keep_working_set(self, name: str, snapshot: int, working_set: bytes) -> bool:
        """Store the working set (format.TOUCHED each) of the snapshot with that name and id, and its chunks in a pack.

        False, and nothing stored, if it has gone or was replaced. Raises ValueError for positions beyond the index,
        ChunkInvalid.
        """
        from lazyrestore.store import working_sets

        environment = self._environment
        try:
            with self.open_image(name) as stored:
                if stored.snapshot != snapshot:
                    return False
                working_sets.check(working_set, stored.n_chunks)
                packed = working_sets.pack(stored, working_set)
        except SnapshotNotFound:
            return False

        def keep(txn: Transaction) -> bool:
            found = txn.get(format.NAMES + format.check_name(name))
            if found is None or format.number_of(found, environment.resource) != snapshot:
                return False
            working_sets.keep(environment, txn, snapshot, working_set, packed)
            return True

        kept = environment.update(keep, room=len(working_set) + len(packed))
        environment.sync()
        return kept

    def rm(self, name: str) -> Freed:
        """Remove the name at once, and free what only this snapshot needed: later, by its pager, if it is in use, or by
        another writer that is at work."""
        from lazyrestore.store import garbage

        environment = self._environment
        environment.check_writable()

        def remove(txn: Transaction) -> None:
            image.find(environment, txn, name)
            txn.delete(format.NAMES + format.check_name(name))

        self.find([name])
        lock = None
        with contextlib.suppress(StoreBusy):  # first: who gives up waiting has removed nothing
            lock = locks.WriterLock(environment.directory, brief=True)
        with lock or contextlib.nullcontext():
            environment.update(remove, removes=True)
            environment.sync()
            if lock:
                return self._collect()
        try:
            return self.gc()
        except StoreBusy:
            return garbage.Freed(still_pinned=1)

    def gc(self, *, wait: bool = False) -> Freed:
        """Free removed snapshots that are no longer in use, and what killed writers left. wait: for a writer."""
        self._environment.check_writable()
        with locks.WriterLock(self._environment.directory, wait=wait, brief=True):
            return self._collect()

    def _collect(self) -> Freed:
        from lazyrestore.store import garbage

        self._environment.forget_dead_readers()
        return garbage.collect(self._environment)

    def verify(self, name: str | None = None) -> Report:
        """Test every chunk of one snapshot, or of all, and the store itself. Damage is in the report, not raised."""
        from lazyrestore.store import check

        environment = self._environment
        with environment.read() as txn:
            if name is not None:
                image.find(environment, txn, name)
        return check.verify(environment, name)

    def totals(self) -> Totals:
        """Sizes of the whole and of each snapshot; O(chunks)."""
        from lazyrestore.store import report

        return report.totals(self._environment)

    def close(self) -> None:
        """Images opened from here stay open. A second close does nothing."""
        acquired, self._acquired = self._acquired, None
        if acquired is not None:
            registry.release(acquired)

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _environment(self) -> Environment:
        if self._acquired is None:
            raise ValueError("the store is closed")
        if not registry.is_current(self._acquired):  # this is a forked child
            self._acquired = registry.acquire(self.path, create=False)
        return self._acquired
