"""Snapshots of copies of which little was touched: what was not written is referred to, and every byte is right."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import Builder, Victims
from helpers_facts import read_memory
from helpers_lazy_twin import InArena, Twins
from helpers_twin import ANONYMOUS, ARENA, ARENA_END, PAGE, SHARED, Pair, random_program, run_program

import lazyrestore
from lazyrestore import origin, snapshot
from lazyrestore.resources.memory_plan import Planner
from lazyrestore.store import CHUNK

SEEDS = int(os.environ.get("LAZYRESTORE_TWIN_SEEDS", "20"))
FIRST = int(os.environ.get("LAZYRESTORE_TWIN_FIRST", "1"))
SIZE = 16 << 20
END = ARENA + 2 * SIZE
MAYMOVE_FIXED = 3
DONTNEED = 4
numbers = itertools.count()


@pytest.fixture
def twins(in_arena: InArena) -> Iterator[Twins]:
    with in_arena(END) as twins:
        yield twins


@contextmanager
def reading_everything() -> Iterator[None]:
    """Snapshots that know nothing of a parent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(origin, "find", lambda *_: None)
        yield


def warm(twins: Twins) -> lazyrestore.pager.PagerStats:
    """The copy's pager, when the copy has done all that it does between two requests."""
    twins.both("list")
    twins.both("list")
    assert twins.copy
    return twins.copy.stats()


def arena(taken: lazyrestore.Snapshot) -> list[tuple[int, int, str, bytes]]:
    """What a restored process would find in the arena, by mapping; a mapping without content takes nothing from the
    image."""
    found = []
    for vma in taken.manifest.vmas:
        if ARENA <= vma.start < END:
            content = b""
            if vma.kind == "lazy":
                content = taken._image.read(vma.start, vma.size)
            elif vma.shared_object >= 0:
                at = taken.manifest.shared[vma.shared_object].image + vma.offset
                content = taken._image.read(at, vma.size)
                content += b"".join(taken._image.read(start, end - start) for start, end in vma.written)
            found.append((vma.start, vma.end, vma.kind, content))
    return found


def added(store: lazyrestore.Store, name: str) -> int:
    return next(summary.added_bytes for summary in store.ls() if summary.name == name)


def test_ten_generations(twins: Twins, store: lazyrestore.Store) -> None:
    """A page or two is written in each; all the rest is neither decompressed nor stored again."""
    twins.both("map", ARENA, SIZE, 3, ANONYMOUS, 0, 0)
    twins.both("write", ARENA, SIZE, 77)
    first = twins.restore()
    for generation in range(1, 11):
        at = ARENA + generation * 37 * PAGE
        assert twins.both("write", at, 2 * PAGE, generation).startswith("0 ")
        before = warm(twins)
        assert before.chunks_filled < SIZE / CHUNK / 8
        name = f"{twins.directory.name}-looked-at"
        with store.snapshot(twins.original.pid, name=name, replace=True) as taken:
            assert twins.copy
            after = twins.copy.stats()
            assert (after.chunks_filled, after.bytes_filled) == (before.chunks_filled, before.bytes_filled)
            right = taken._image.read(ARENA, SIZE) == read_memory(twins.never.pid, ARENA, SIZE)
            assert right, generation
            assert added(store, name) < taken.stored_bytes / 20
        store.remove(name)
        twins.restore()
        assert added(store, f"{twins.directory.name}-{generation}") < taken.stored_bytes / 20
    assert first.poll() is not None
    twins.both("digest")
    assert not store.verify().damage


@pytest.mark.parametrize("before_6_7", [False, True])
def test_moved_dropped_written_and_unmapped(
    twins: Twins, store: lazyrestore.Store, before_6_7: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation upon generation, each changes what the one before had left."""
    if before_6_7:
        monkeypatch.setattr(Planner, "_pages", Planner._pages_before_6_7)
    twins.both("map", ARENA, SIZE, 3, ANONYMOUS, 0, 0)
    twins.both("write", ARENA, SIZE, 78)
    for generation in range(1, 5):
        twins.restore()
        base = ARENA + generation * (1 << 20)
        for request in (
            ("advise", base + PAGE, PAGE, DONTNEED),  # a part of a chunk
            ("advise", base + 2 * CHUNK, 3 * CHUNK, DONTNEED),  # whole ones, of which a page is written again
            ("write", base + 3 * CHUNK + PAGE, PAGE, generation),
            ("remap", base + 8 * CHUNK, 9 * PAGE, 9 * PAGE, ARENA + SIZE + generation * (1 << 20), MAYMOVE_FIXED),
            (
                "remap",
                base + 16 * CHUNK + PAGE,
                65 * PAGE,
                80 * PAGE,
                END - generation * (1 << 20) + PAGE,
                MAYMOVE_FIXED,
            ),
            ("write", END - generation * (1 << 20) + 30 * PAGE, PAGE, generation),
            ("unmap", base + 40 * CHUNK + PAGE, 2 * PAGE),
            ("map", base + 41 * CHUNK + PAGE, 2 * PAGE, 3, ANONYMOUS, 0, 1),  # zeros where the parent had content
            ("protect", base + 48 * CHUNK, 5 * PAGE, 0),
            ("protect", base + 50 * CHUNK + PAGE, 2 * PAGE, 1),
        ):
            assert twins.both(*request).startswith("0 ")
        before = warm(twins)
        pid = twins.original.pid
        with store.snapshot(pid, name="referred") as referred:
            assert twins.copy
            # What is left of a chunk that was dropped, moved or unmapped in part is read.
            assert 0 < twins.copy.stats().chunks_filled - before.chunks_filled < 12
            with reading_everything(), store.snapshot(pid, name="read") as read:
                alike = arena(referred) == arena(read)
                assert alike, generation
        for name in ("referred", "read"):
            store.remove(name)
    twins.restore()
    twins.both("digest")
    assert not store.verify().damage


def test_shared_memory(twins: Twins, store: lazyrestore.Store) -> None:
    """It is written in place, by a forked child too: what was touched is read, the rest referred to."""
    size = 4 << 20
    twins.both("map", ARENA, size, 3, SHARED, 0, 0)
    twins.both("write", ARENA, size, 79)
    for generation in range(1, 4):
        twins.restore()
        assert twins.both("write", ARENA + generation * 5 * CHUNK, PAGE, generation).startswith("0 ")
        before = warm(twins)
        with store.snapshot(twins.original.pid, name="looked-at") as taken:
            assert twins.copy
            assert twins.copy.stats().chunks_filled == before.chunks_filled < size / CHUNK / 2
            (at,) = (shared.image for shared in taken.manifest.shared if shared.anonymous)
            right = taken._image.read(at, size) == read_memory(twins.never.pid, ARENA, size)
            assert right, generation
        store.remove("looked-at")
    twins.both("fork", ARENA + (1 << 20), PAGE, 99)  # the child writes there, and reads everything
    twins.restore()
    twins.both("digest")


def test_the_parent_is_removed(twins: Twins, store: lazyrestore.Store) -> None:
    """What the copy needs stays, and belongs to its snapshot from then on."""
    twins.both("map", ARENA, SIZE, 3, ANONYMOUS, 0, 0)
    twins.both("write", ARENA, SIZE, 80)
    pid = twins.original.pid
    with store.snapshot(pid, name="parent", kill=True) as parent:
        twins.original.gone()
        twins.copy = parent.restore()
    store.remove("parent")
    before = warm(twins).chunks_filled
    with store.snapshot(pid, name="child") as taken:
        assert twins.copy.stats().chunks_filled == before
        assert added(store, "child") < taken.stored_bytes / 20
    with store.snapshot(pid, name="child", replace=True, kill=True) as child:
        twins.copy.wait()
        store._images.gc()
        twins.copy = child.restore()
    with store.snapshot(pid, name="child", replace=True, kill=True) as grandchild:  # its parent's name is its own
        twins.copy.wait()
        twins.copy = grandchild.restore()
    twins.both("digest")
    assert not store.verify().damage
    store.remove("child")


def test_another_store(twins: Twins, store: lazyrestore.Store, run: Path) -> None:
    """Nothing there can be referred to, so everything is read."""
    twins.both("map", ARENA, SIZE, 3, ANONYMOUS, 0, 0)
    twins.both("write", ARENA, SIZE, 81)
    copy = twins.restore()
    with lazyrestore.Store.open(run / "other") as other:
        with other.snapshot(copy.pid, name="abroad", kill=True) as abroad:
            assert added(other, "abroad") == abroad.stored_bytes
            copy.wait()
            twins.copy = abroad.restore()
            assert not other.verify().damage
        twins.both("digest")


def test_a_damaged_chunk_of_the_parent(twins: Twins, store: lazyrestore.Store) -> None:
    """Nobody touched it: the snapshot refers to it, and `verify` finds it in both."""
    twins.both("map", ARENA, SIZE, 3, ANONYMOUS, 0, 0)
    twins.both("write", ARENA, SIZE, 82)
    pid = twins.original.pid
    with store.snapshot(pid, name="parent", kill=True) as parent:
        twins.original.gone()
        twins.copy = parent.restore()
        image = parent._image
        entry = next(entry for entry in image.entries() if entry[0] == ARENA + 7 * CHUNK)
        place = image.packs[entry[2]][0] + entry[3] + entry[4] // 2
    data = Path(store.path) / "data.mdb"
    with data.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    try:
        with store.snapshot(pid, name="child", kill=True):
            twins.copy.wait()
        damage = [(each.snapshot, each.address) for each in store.verify().damage]
        assert damage == [("child", ARENA + 7 * CHUNK), ("parent", ARENA + 7 * CHUNK)]
        assert twins.ask("never", "digest")
    finally:
        for name in ("parent", "child"):
            store.remove(name)


class Compared(Pair):
    """Twins of which each snapshot of a copy is taken twice: by reference, and by reading everything."""

    def restore(self) -> None:
        if self._copy is not None:
            pid = self._copy.pid
            names = [f"{self._directory.name}-{how}" for how in ("referred", "read")]
            referred = self._store.snapshot(pid, name=names[0])
            with reading_everything():
                read = self._store.snapshot(pid, name=names[1])
            with referred, read:
                alike = arena(referred) == arena(read)
            for name in names:
                self._store.remove(name)
            assert alike, "\n".join(self.log)
        super().restore()


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_random_program(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, seed: int) -> None:
    """What is referred to is what reading gives, whatever the process did."""
    program = random_program(seed, 40)
    for at in (len(program), 3 * len(program) // 4, len(program) // 2):
        program.insert(at, ("restore", 0, 0, 0, 0))
    pair = Compared(victims, build, store, run / f"compared{next(numbers)}")
    try:
        run_program(pair, program)
    finally:
        pair.close()


def test_the_origin_is_looked_for() -> None:
    """The function that reading_everything() replaces is the one that snapshots ask."""
    assert snapshot.origin is origin
    assert ARENA_END <= END
