"""Several processes, one store: readers beside a writer, writers that exclude each other, pins, forks, and kill -9."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import until
from helpers_store import BASE, PAGE, child, get, pages, put

from lazyrestore.errors import SnapshotNotFound, StoreBusy
from lazyrestore.store import ImageStore
from lazyrestore.store.locks import WriterLock

# Packs of 1 MiB, one per transaction: a small image then takes many.
WRITER = """
from lazyrestore.store import format, writer
format.PACK, writer.PACKS_PER_TRANSACTION = (1 << 20) - 16, 1
data = pages(6000, seed=int(hear()))
def step(done, total):
    say("added", done)
    hear()
with store.writer("new", replace=True, progress=step) as writer:
    say("begun")
    hear()
    writer.add(memoryview(data), [(BASE, 0, len(data))])
    say("committing")
    hear()
    writer.commit(b"new")
    say("committed")
    hear()
say("closed")
hear()
"""

HOLDER = """
image = store.open_image(hear())
say("pinned", image.key)
hear()
image.close()
say("closed")
hear()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[ImageStore]:
    with ImageStore.open(path) as opened:
        yield opened


FCNTL = "72 "  # the number of the system call
FREER = """
from lazyrestore.store.locks import WriterLock
with WriterLock(store.path, brief=True):
    say("freeing")
    hear()
"""


@contextmanager
def writer_that_waits(store: ImageStore) -> Iterator[None]:
    """A writer is in the queue for the lock, which must be free at the end; then it writes."""
    done: list[object] = []
    writing = threading.Thread(target=lambda: done.append(put(store, "x", pages(10))))
    writing.start()
    waiting = f"-> FLOCK  ADVISORY  WRITE {os.getpid()} "
    until(lambda: waiting in Path("/proc/locks").read_text(), "the writer in the queue for the lock")
    assert not done
    yield
    writing.join()
    assert done


def test_writer_waits_for_one_who_only_frees(store: ImageStore, path: Path) -> None:
    with child(path, FREER) as freer:
        assert freer.hear() == "freeing"
        with writer_that_waits(store):
            freer.say()


@pytest.mark.parametrize("left", ["", "1\n", "brief\n"])
def test_what_the_lock_file_says_matters_to_nobody(store: ImageStore, path: Path, left: str) -> None:
    """Who only frees something has the lock without a word about it; who was killed left one."""
    lock = WriterLock(os.fspath(path), brief=True)
    (path / "writer.lock").write_text(left)
    with writer_that_waits(store):
        lock.close()


def test_who_frees_does_not_wait_for_who_writes(store: ImageStore, path: Path) -> None:
    with WriterLock(os.fspath(path)):
        (path / "writer.lock").write_text("")
        with pytest.raises(StoreBusy):
            store.gc()
    store.gc()


def test_readers_during_a_writer_and_only_one_writer(store: ImageStore, path: Path) -> None:
    old = pages(500, seed=1)
    put(store, "old", old)
    with child(path, WRITER) as writer:
        writer.say("2")
        assert writer.hear() == "begun"
        with pytest.raises(StoreBusy, match=f"process {writer.process.pid}"):
            store.writer("mine")
        with pytest.raises(StoreBusy):
            store.gc()
        writer.say()
        while (line := writer.hear()) != "committing":
            assert line.startswith("added")
            assert get(store, "old", len(old)) == old
            with pytest.raises(SnapshotNotFound):
                store.show("new")
            writer.say()
        assert not store.verify().damage
        writer.say()
        assert writer.hear() == "committed"
        assert get(store, "new", 6000 * PAGE) == pages(6000, seed=2)
        writer.say()
        assert writer.hear() == "closed"
        put(store, "mine", old)


def test_waiting_for_the_writer(store: ImageStore, path: Path) -> None:
    """`wait` blocks in fcntl() until the other has closed, and no longer."""
    with child(path, "with store.writer('a'):\n say('has it'); hear()\nsay('gave it back'); hear()") as first:
        assert first.hear() == "has it"
        with child(path, "say('waiting')\nwith store.writer('b', wait=True): say('has it'); hear()") as second:
            assert second.hear() == "waiting"
            waiting_in = Path(f"/proc/{second.process.pid}/syscall")
            while not waiting_in.read_text().startswith(FCNTL):
                assert second.process.poll() is None
            first.say()
            assert first.hear() == "gave it back"
            assert second.hear() == "has it"


def test_removing_during_a_writer(store: ImageStore, path: Path) -> None:
    """The name goes at once; the packs stay, since the writer may refer to them, until it is done."""
    data = pages(6000, seed=3)
    put(store, "old", data)
    with child(path, WRITER) as writer:
        writer.say("3")  # the same content: nothing but references
        assert writer.hear() == "begun"
        assert store.rm("old").snapshots == 0
        with pytest.raises(SnapshotNotFound):
            store.open_image("old")
        writer.say()
        while writer.hear() != "closed":
            writer.say()
    assert get(store, "new", len(data)) == data
    assert store.show("new").added_bytes == 0
    assert not store.verify().damage
    assert store.totals().removed == 0


@pytest.mark.parametrize("round_", range(10))
def test_a_writer_killed_anywhere(store: ImageStore, path: Path, round_: int) -> None:
    random_ = random.Random(round_)
    old = pages(300, seed=4)
    put(store, "old", old)
    put(store, "new", old, base=BASE + (1 << 32), replace=True)
    lines = random_.randrange(9)
    answered = random_.random() < 0.5  # killed while it works towards the next line, or while it waits
    with child(path, WRITER) as writer:
        writer.say("5")
        line = writer.hear()
        for _ in range(lines):
            writer.say()
            line = writer.hear()
        if answered:
            writer.say()
        writer.kill()
    report = store.verify()
    assert report.tree_checked and not report.damage and report.snapshots == 2
    assert get(store, "old", len(old)) == old
    if store.manifest("new") == b"new":
        assert get(store, "new", 6000 * PAGE) == pages(6000, seed=5)
    else:
        assert line != "committed"
        assert get(store, "new", len(old), base=BASE + (1 << 32)) == old
    store.gc()
    totals = store.totals()
    assert totals.stored_bytes == 0 or abs(totals.stored_bytes - totals.referenced_bytes) <= PAGE * totals.packs
    put(store, "after", old)
    assert store.show("after").added_bytes == 0


def test_garbage_is_given_back_to_the_file_system(store: ImageStore, path: Path) -> None:
    with child(path, WRITER) as writer:
        writer.say("6")
        while writer.hear() != "committing":
            writer.say()
        while store.totals().packs < 3:  # the packing thread goes on meanwhile
            assert writer.process.poll() is None
        writer.kill()
    full = store.totals()
    assert full.packs >= 3 and full.snapshots == []
    put(store, "small", pages(1))
    empty = store.totals()
    assert empty.packs == 1
    assert empty.disk_bytes < full.disk_bytes / 4  # tmpfs, ext4, xfs and btrfs know how to punch holes


def test_a_pin_of_another_process_keeps_the_packs(store: ImageStore, path: Path) -> None:
    data = pages(2000, seed=7)
    put(store, "pinned", data)
    with child(path, HOLDER) as holder:
        holder.say("pinned")
        assert holder.hear().startswith("pinned ")
        mine = store.open_image("pinned")
        assert store.show("pinned").pinned
        freed = store.rm("pinned")
        assert (freed.snapshots, freed.packs, freed.still_pinned) == (0, 0, 1)
        with pytest.raises(SnapshotNotFound):
            store.open_image("pinned")
        put(store, "pinned", pages(100, seed=8))  # the name again: another snapshot
        assert store.totals().removed == 1
        mine.close()
        assert store.gc().still_pinned == 1
        holder.say()
        assert holder.hear() == "closed"
    assert store.gc().snapshots == 1
    assert store.totals().packs == 1
    assert not store.verify().damage


def test_pinned_offsets_stay_true_while_others_write(store: ImageStore) -> None:
    data = pages(1500, seed=9)
    put(store, "kept", data)
    with store.open_image("kept") as image:
        store.rm("kept")
        for seed in range(6):
            put(store, "other", pages(1500, seed=20 + seed), replace=True)
        assert image.read(BASE, len(data)) == data


def test_a_kill_releases_the_pin(store: ImageStore, path: Path) -> None:
    put(store, "pinned", pages(100))
    with child(path, HOLDER) as holder:
        holder.say("pinned")
        assert holder.hear().startswith("pinned ")
        assert store.rm("pinned").still_pinned == 1
        holder.kill()
    assert store.gc().snapshots == 1
    assert store.totals().packs == 0


def test_a_copy_of_the_pin_keeps_it(store: ImageStore) -> None:
    """As in the pager, which is handed the descriptor and outlives the restorer."""
    put(store, "pinned", pages(100))
    image = store.open_image("pinned")
    copy = os.dup(image.pin_fd)
    image.close()
    assert store.rm("pinned").still_pinned == 1
    os.close(copy)
    assert store.gc().snapshots == 1


def test_partly_shared_packs_stay(store: ImageStore) -> None:
    both, first = pages(32, seed=1), pages(64, seed=2)
    put(store, "first", both + first)
    put(store, "second", both)
    assert store.rm("first").packs == 0
    assert get(store, "second", len(both)) == both
    put(store, "third", first)  # still there to be referred to
    assert store.show("third").added_bytes == 0
    assert store.rm("second").packs == 0
    freed = store.rm("third")
    assert freed.packs == 1
    put(store, "fourth", first)  # and now it is not
    assert get(store, "fourth", len(first)) == first
    assert not store.verify().damage


def test_one_environment_per_process(path: Path) -> None:
    data = pages(20)
    with ImageStore.open(path) as one, ImageStore.open(str(path)) as two:
        put(one, "x", data)
        one.close()
        assert get(two, "x", len(data)) == data
        with pytest.raises(ValueError, match="closed"):
            one.ls()
    with ImageStore.open(path, create=False) as again:
        assert get(again, "x", len(data)) == data


def test_a_forked_child_has_its_own(store: ImageStore) -> None:
    data = pages(20)
    put(store, "before", data)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert get(store, "before", len(data)) == data
            put(store, "child", pages(20, seed=1))
            store.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert get(store, "child", len(data)) == pages(20, seed=1)
    put(store, "parent", pages(20, seed=2))
    assert [each.name for each in store.ls()] == ["before", "child", "parent"]


FORKER = """
import os
writer = store.writer("x")
if os.fork() == 0:
    say("forked")
    hear()
    os._exit(0)
hear()
"""


def test_a_forked_child_does_not_hold_the_writer_lock(store: ImageStore, path: Path) -> None:
    with child(path, FORKER) as parent:
        assert parent.hear() == "forked"
        with pytest.raises(StoreBusy):
            store.writer("y")
        parent.kill()
        put(store, "y", pages(1))  # its child still lives, until the pipe is closed


def test_a_closed_writer_is_closed_for_forked_children_too(store: ImageStore) -> None:
    ours, theirs = os.pipe()
    writer = store.writer("x")
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
    writer.close()
    put(store, "y", pages(1))
    os.close(theirs)
    os.close(ours)
    os.waitpid(pid, 0)


def test_threads_read_while_another_writes(store: ImageStore) -> None:
    data = pages(800)
    put(store, "steady", data)
    done = threading.Event()
    wrong: list[object] = []

    def reader() -> None:
        while not done.is_set():
            try:
                if get(store, "steady", len(data)) != data or "steady" not in [each.name for each in store.ls()]:
                    wrong.append("content")
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(4):
            put(store, "moving", pages(800, seed=seed + 1), replace=True)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
