"""A snapshot that refers to another one's chunks is as good as one that was given the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from helpers_store import BASE, PAGE, get, pages, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyrestore.errors import ChunkInvalid
from lazyrestore.store import CHUNK, ImageStore, Parent, Reference, format
from lazyrestore.store.environment import Transaction

MOVED = 1 << 30


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    with ImageStore.open(tmp_path / "store") as opened:
        yield opened


def bytes_of(image: list[int]) -> bytes:
    return b"".join(bytes([content]) * PAGE for content in image)


PAGES = st.lists(st.one_of(st.just(0), st.integers(1, 250)), min_size=1, max_size=60)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(image=PAGES, written=st.sets(st.integers(0, 59)), dropped=st.sets(st.integers(0, 59)), shift=st.integers(0, 9))
def test_any_mixture_comes_back(
    store: ImageStore, image: list[int], written: set[int], dropped: set[int], shift: int
) -> None:
    """Some pages are written, some become zero, the rest is what it was; and all of it may have moved."""
    parent_id = put(store, "parent", bytes_of(image), replace=True)
    base = BASE + shift * PAGE + (MOVED if shift else 0)
    expected = [251 if n in written else 0 if n in dropped else content for n, content in enumerate(image)]
    with store.writer("child", replace=True) as writer:
        parent = writer.parent(parent_id)
        references, to_add = [], {n for n in written if n < len(image)}
        for start, end in zones(len(image), written | dropped):
            low, high = (BASE + n * PAGE for n in (start, end))
            first, last = whole(parent, low, high)
            if first < last:
                references.append(Reference(first - BASE + base, last - BASE + base, first))
            for part in ((low, first), (last, high)) if first < last else ((low, high),):
                for a, b in parent.stored(*part):
                    to_add |= set(range((a - BASE) // PAGE, (b - BASE) // PAGE))
        writer.refer(parent, references)
        buffer = bytes_of(expected)
        writer.add(memoryview(buffer), [(base + n * PAGE, n * PAGE, PAGE) for n in sorted(to_add)])
        writer.commit(b"m")
    assert get(store, "child", len(image) * PAGE, base=base) == bytes_of(expected)
    assert get(store, "parent", len(image) * PAGE) == bytes_of(image)
    assert not store.verify().damage
    store.rm("parent")
    assert get(store, "child", len(image) * PAGE, base=base) == bytes_of(expected)
    assert not store.verify().damage


def whole(parent: Parent, start: int, end: int) -> tuple[int, int]:
    """The part of [start, end) that no chunk crosses the borders of."""
    low, high = parent.at(start), parent.at(end)
    if low and low[0] < start:
        start = low[1]
    if high and high[0] < end:
        end = high[0]
    return start, end


def zones(count: int, without: set[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for n in [*sorted(n for n in without if n < count), count]:
        if start < n:
            yield start, n
        start = n + 1


def test_nothing_is_stored_twice(store: ImageStore) -> None:
    data = pages(64)
    parent_id = put(store, "parent", data)
    with store.writer("child") as writer:
        writer.refer(writer.parent(parent_id), [Reference(BASE, BASE + len(data), BASE)])
        writer.commit(b"m")
    parent, child = store.show("parent"), store.show("child")
    assert child.added_bytes == 0
    assert (child.chunks, child.raw_bytes, child.stored_bytes) == (parent.chunks, parent.raw_bytes, parent.stored_bytes)


def test_a_chunk_is_taken_whole_or_not_at_all(store: ImageStore) -> None:
    parent_id = put(store, "parent", pages(8))
    with store.writer("child") as writer:
        parent = writer.parent(parent_id)
        assert parent.at(BASE - 1) is None
        assert parent.at(BASE) == parent.at(BASE + CHUNK - 1) == (BASE, BASE + CHUNK)
        assert parent.at(BASE + 2 * CHUNK) is None
        writer.refer(parent, [Reference(BASE, BASE + PAGE, BASE)])
        with pytest.raises(ValueError, match="crosses"):
            writer.commit(b"m")


def test_what_is_referred_to_and_added_does_not_mix(store: ImageStore) -> None:
    data = pages(8)
    parent_id = put(store, "parent", data)
    with store.writer("child") as writer:
        writer.refer(writer.parent(parent_id), [Reference(BASE, BASE + CHUNK, BASE)])
        writer.add(memoryview(data), [(BASE + PAGE, 0, PAGE)])
        with pytest.raises(ValueError, match="added twice"):
            writer.commit(b"m")


def test_a_parent_removed_meanwhile(store: ImageStore) -> None:
    """Its packs belong to the child too, so they stay; and what no snapshot lists any more goes."""
    data = pages(64)
    parent_id = put(store, "parent", data)
    with store.open_image("parent"):
        store.rm("parent")
        assert parent_id in store.keys().values()
        with store.writer("child") as writer:
            writer.refer(writer.parent(parent_id), [Reference(BASE, BASE + len(data), BASE)])
            writer.commit(b"m")
    store.gc()
    assert parent_id not in store.keys().values()
    assert get(store, "child", len(data)) == data
    store.rm("child")
    assert store.totals().stored_bytes == 0


def test_a_parent_that_is_gone(store: ImageStore) -> None:
    parent_id = put(store, "parent", pages(8))
    store.rm("parent")
    with store.writer("child") as writer, pytest.raises(ChunkInvalid):
        writer.parent(parent_id)


@pytest.mark.parametrize("by", [CHUNK, 1])
def test_a_damaged_index_is_not_taken_over(store: ImageStore, by: int) -> None:
    """An entry may be merely not what was written; or impossible, in a record of the time before checksums."""
    parent_id = put(store, "parent", pages(8))
    environment = store._environment
    with environment.read() as txn:
        index = bytearray(environment.need(txn, format.key(format.INDEXES, parent_id)))
        record = format.decode(environment.need(txn, format.key(format.SNAPSHOTS, parent_id)), format.Record, "")
    address, *rest = format.ENTRY.unpack_from(index)
    format.ENTRY.pack_into(index, 0, address - by, *rest)
    record = msgspec.structs.replace(record, sums=by == CHUNK, sum=None)

    def damage(txn: Transaction) -> None:
        txn.put(format.key(format.INDEXES, parent_id), bytes(index))
        txn.put(format.key(format.SNAPSHOTS, parent_id), format.encode(record))

    environment.update(damage)
    with store.writer("child") as writer, pytest.raises(ChunkInvalid):
        writer.parent(parent_id)
