"""What is stored is what was added, whatever the runs look like; stored once, however often it occurs."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import open_descriptors
from helpers_store import BASE, PAGE, get, pages, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyrestore.errors import BadSnapshotName, SnapshotExists, SnapshotNotFound
from lazyrestore.store import CHUNK, HUGE_CHUNK, ImageStore, StoredImage


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    with ImageStore.open(tmp_path / "store") as opened:
        yield opened


# Each page of the image: absent, zero, or one of a few contents, so that chunks repeat.
PAGES = st.lists(st.one_of(st.none(), st.just(0), st.integers(1, 3), st.integers(4, 250)), max_size=120)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(image=PAGES, offset=st.integers(0, 40), chunk=st.sampled_from([PAGE, CHUNK, HUGE_CHUNK]), shuffled=st.randoms())
def test_any_runs_come_back(
    store: ImageStore, image: list[int | None], offset: int, chunk: int, shuffled: object
) -> None:
    base = BASE + offset * PAGE
    present = [number for number, content in enumerate(image) if content is not None]
    expected = bytearray(len(image) * PAGE)
    for number in present:
        expected[number * PAGE : (number + 1) * PAGE] = bytes([image[number] or 0]) * PAGE
    order = list(range(len(present)))
    shuffled.shuffle(order)  # type: ignore[attr-defined]
    buffer = bytearray(len(present) * PAGE)
    runs = []
    for place, number in zip(order, present, strict=True):
        buffer[place * PAGE : (place + 1) * PAGE] = expected[number * PAGE : (number + 1) * PAGE]
        runs.append((base + number * PAGE, place * PAGE, PAGE))
    with store.writer("image", replace=True) as writer:
        writer.add(memoryview(buffer), runs, chunk_size=chunk)
        writer.commit(b"m")
    with store.open_image("image") as opened:
        assert opened.read(base, len(expected)) == expected
        assert opened.read(base - PAGE, PAGE) == bytes(PAGE)
        check_by_hand(opened, base, bytes(expected), chunk)
    assert not store.verify().damage


def check_by_hand(image: StoredImage, base: int, expected: bytes, chunk: int) -> None:
    """Read the index and the packs as the pager does: by file offset, with nothing of the store's own code."""
    import zstandard

    seen = bytearray(len(expected))
    end = 0
    for number in range(image.n_chunks):
        raw = os.pread(image.data_fd, 24, image.index_offset + 24 * number)
        address, length, pack, offset, stored = struct.unpack("<QIIII", raw)
        assert address >= end and address // chunk == (address + length - 1) // chunk
        start, size = image.packs[pack]
        assert offset + stored <= size
        frame = os.pread(image.data_fd, stored, start + offset)
        planes = frame.startswith(bytes.fromhex("582a4d1800000000"))
        content = zstandard.ZstdDecompressor().decompress(frame[8:] if planes else frame)
        if planes:
            content = bytes(content[word + plane * length // 8] for word in range(length // 8) for plane in range(8))
        assert len(content) == length and content[:PAGE].strip(b"\0") and content[-PAGE:].strip(b"\0")
        seen[address - base : address - base + length] = content
        end = address + length
    assert seen == expected


@pytest.mark.parametrize("count", [1, 15, 16, 17, 1500])
def test_a_run_of_any_size(store: ImageStore, count: int) -> None:
    data = pages(count)
    put(store, "one", data)
    assert get(store, "one", len(data)) == data
    with store.open_image("one") as image:
        assert image.read(BASE + 100, 5000) == (data + bytes(PAGE * 2))[100:5100]
        check_by_hand(image, BASE, bytes(data), CHUNK)


def test_an_image_without_content(store: ImageStore) -> None:
    with store.writer("empty") as writer:
        writer.add(memoryview(bytearray(PAGE)), [(BASE, 0, PAGE)])
        writer.commit(b"manifest")
    with store.open_image("empty") as image:
        assert (image.n_chunks, image.packs, image.manifest) == (0, (), b"manifest")
        assert image.read(BASE, 10) == bytes(10)
    assert store.show("empty").raw_bytes == 0


def test_added_in_pieces_and_out_of_order(store: ImageStore) -> None:
    low, high = pages(40, 1), pages(40, 2)
    buffer = bytearray(high)
    with store.writer("pieces") as writer:
        writer.add(memoryview(buffer), [(BASE + (1 << 30), 0, len(high))])
        buffer[:] = low  # the same buffer again, as a snapshot by pieces does
        writer.add(memoryview(buffer), [(BASE, 0, len(low))])
        writer.commit(b"")
    assert get(store, "pieces", len(low)) == low
    assert get(store, "pieces", len(high), base=BASE + (1 << 30)) == high


def test_the_same_address_twice_is_refused(store: ImageStore) -> None:
    data = memoryview(pages(4))
    with store.writer("twice") as writer, pytest.raises(ValueError, match="twice"):
        writer.add(data, [(BASE, 0, len(data))])
        writer.add(data, [(BASE, 0, len(data))])
        writer.commit(b"")
    assert store.ls() == []


@pytest.mark.parametrize(
    "runs",
    [
        [(BASE + 1, 0, PAGE)],
        [(BASE, 0, 100)],
        [(BASE, 0, 5 * PAGE)],
        [(BASE, -PAGE, PAGE)],
        [(BASE + PAGE, 0, PAGE), (BASE, PAGE, PAGE)],
        [(BASE, 0, 2 * PAGE), (BASE + PAGE, 0, PAGE)],
        [((1 << 64) - PAGE, 0, 2 * PAGE)],
    ],
)
def test_impossible_runs_are_refused(store: ImageStore, runs: list[tuple[int, int, int]]) -> None:
    with store.writer("bad") as writer, pytest.raises(ValueError, match="run at"):
        writer.add(memoryview(pages(4)), runs)


def test_repeated_content_is_stored_once(store: ImageStore) -> None:
    chunk = pages(CHUNK // PAGE)
    put(store, "repeated", chunk * 200)
    shown = store.show("repeated")
    assert shown.chunks == 200
    assert shown.stored_bytes < len(chunk)
    assert get(store, "repeated", 200 * len(chunk)) == chunk * 200


def test_a_second_snapshot_stores_what_changed(store: ImageStore) -> None:
    chunks = 400
    data = pages(CHUNK // PAGE * chunks)
    put(store, "first", data)
    for number in range(0, chunks, 20):  # one page in each twentieth chunk: 5 %
        data[number * CHUNK : number * CHUNK + 8] = b"changed!"
    put(store, "second", data)
    first, second = store.show("first"), store.show("second")
    assert first.added_bytes == first.stored_bytes
    assert 0.045 < second.added_bytes / second.stored_bytes < 0.055
    totals = store.totals()
    assert 0.47 < totals.deduplicated < 0.48  # 95 % of two equal halves
    by_name = {each.name: each for each in totals.snapshots}
    assert by_name["second"].unique_bytes == second.added_bytes
    assert by_name["second"].shared_bytes == by_name["first"].shared_bytes
    assert get(store, "second", len(data)) == data


def test_progress_reaches_the_total(store: ImageStore) -> None:
    seen: list[tuple[int, int]] = []
    data = pages(3000)
    with store.writer("progress", progress=lambda done, total: seen.append((done, total))) as writer:
        writer.add(memoryview(data), [(BASE, 0, len(data))])
        writer.commit(b"")
    assert seen[-1] == (len(data), len(data))
    assert len(seen) > 1 and seen == sorted(seen)


def test_names_and_replacing(store: ImageStore) -> None:
    old, new = pages(20, 1), pages(20, 2)
    put(store, "name", old)
    with pytest.raises(SnapshotExists, match="name"):
        store.writer("name")
    assert get(store, "name", len(old)) == old
    put(store, "name", new, replace=True)
    assert get(store, "name", len(new)) == new
    assert [each.name for each in store.ls()] == ["name"]
    assert store.totals().stored_bytes < 40 * PAGE  # the old one's packs are gone
    for call in (store.open_image, store.show, store.rm, store.manifest, store.verify):
        with pytest.raises(SnapshotNotFound, match="missing"):
            call("missing")


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-flag", "a/b", "a b", "ä", "x" * 129, "new\nline", "nul\0", "*"]
)
def test_odd_names_are_refused(store: ImageStore, name: str) -> None:
    for call in (store.open_image, store.show, store.rm, store.writer):
        with pytest.raises(BadSnapshotName, match="use 1 to 128 characters"):
            call(name)


@pytest.mark.parametrize("name", ["a", "x" * 128, "web-1.2:latest", "A_b+c@d", "0", "@"])
def test_good_names(store: ImageStore, name: str) -> None:
    put(store, name, pages(1))
    assert store.manifest(name) == b"manifest of " + name.encode()


def test_levels(store: ImageStore) -> None:
    data = pages(200, noise=0)
    for level in (1, 19):
        with store.writer(f"level{level}", level=level) as writer:
            writer.add(memoryview(data), [(BASE, 0, len(data))])
            writer.commit(b"")
        store.rm(f"level{level}")
    with pytest.raises(ValueError, match="level"):
        store.writer("x", level=20)


def test_an_open_image_survives_the_store_object(tmp_path: Path) -> None:
    data = pages(50)
    with ImageStore.open(tmp_path / "store") as store:
        put(store, "kept", data)
        image = store.open_image("kept")
    with image:
        assert image.read(BASE, len(data)) == data


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = open_descriptors()
    with ImageStore.open(tmp_path / "store") as store:
        put(store, "one", pages(50))
        with store.open_image("one"):
            store.verify()
        store.totals()
        store.rm("one")
    assert open_descriptors() == before


def test_two_buffers_in_turn(store: ImageStore) -> None:
    """A buffer is the caller's again once settle() has returned for it."""
    data = [pages(1500, seed=number) for number in range(5)]
    buffers = [bytearray(len(data[0])), bytearray(len(data[0]))]
    numbers = [0, 0]
    with store.writer("turns") as writer:
        for turn, content in enumerate(data):
            writer.settle(numbers[turn % 2])
            buffer = buffers[turn % 2]
            buffer.extend(b"more than it could be")  # nobody holds it
            buffer[:] = content
            base = BASE + turn * len(content)
            numbers[turn % 2] = writer.add_soon(memoryview(buffer), [(base, 0, len(content))])
        writer.commit(b"")
    same = get(store, "turns", sum(map(len, data))) == b"".join(data)
    assert same
    for buffer in buffers:
        buffer.clear()
