"""A working set beside a snapshot: kept, found again by whoever opens the image, gone with it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from lazyrestore.store import CHUNK, ImageStore, format

BASE = 0x10_0000_0000


def filled(path: Path) -> ImageStore:
    store = ImageStore.open(path)
    content = b"".join(bytes([number + 1]) * CHUNK for number in range(4))
    with store.writer("one") as writer:
        writer.add(memoryview(content), [(BASE, 0, len(content))])
        writer.commit(b"")
    return store


def test_kept_and_found(tmp_path: Path) -> None:
    working_set = struct.pack("<6I", 3, 0, 0, 15, 2, 1)
    with filled(tmp_path / "s") as store:
        with store.open_image("one") as image:
            assert image.working_set == b""
            assert store.keep_working_set("one", image.snapshot, working_set)
        with store.open_image("one") as image:
            assert image.working_set == working_set
        assert not store.verify().damage


def test_kept_in_a_pack(tmp_path: Path) -> None:
    """Its frames hold the chunks' raw bytes in the order of the list, and `verify` compares them."""
    with filled(tmp_path / "s") as store:
        with store.open_image("one") as image:
            assert image.frames == b""
            store.keep_working_set("one", image.snapshot, struct.pack("<6I", 3, 0, 0, 15, 2, 1))
        with store.open_image("one") as image:
            ((stored, chunks, _),) = format.FRAME.iter_unpack(image.frames)
            raw = format.decompress(image.read_data(image.frames_offset, stored), 3 * CHUNK)
            assert chunks == 3
            assert raw == b"".join(bytes([number + 1]) * CHUNK for number in (3, 0, 2))
            with (tmp_path / "s/data.mdb").open("r+b") as file:
                file.seek(image.frames_offset + stored // 2)
                file.write(bytes([image.read_data(file.tell(), 1)[0] ^ 1]))
        (damage,) = store.verify("one").damage
        assert "working set's pack" in damage.reason


def test_pack_of_other_chunks(tmp_path: Path) -> None:
    """A pack that does not fit its list is found by `verify`, whole as it may be in itself."""
    with filled(tmp_path / "s") as store:
        with store.open_image("one") as image:
            store.keep_working_set("one", image.snapshot, struct.pack("<4I", 3, 0, 0, 0))
            key = format.key(format.WORKING_SETS, image.snapshot)
        store._environment.update(lambda txn: txn.put(key, struct.pack("<4I", 2, 0, 0, 0)))
        (damage,) = store.verify().damage
        assert "another one" in damage.reason


@pytest.mark.parametrize(
    "damaged",
    [
        b"x",
        bytes(4),
        b"\xff" * 8,
        struct.pack("<IIII", 1, 9999, 1, 0).ljust(8000, b"\0"),
        struct.pack("<IIII", 1, 9, 0, 0).ljust(8000, b"\0"),
    ],
)
def test_a_damaged_pack_is_none(tmp_path: Path, damaged: bytes) -> None:
    with filled(tmp_path / "s") as store:
        with store.open_image("one") as image:
            store.keep_working_set("one", image.snapshot, bytes(8))
            key = format.key(format.WORKING_SET_PACKS, image.snapshot)
        store._environment.update(lambda txn: txn.put(key, damaged))
        with store.open_image("one") as image:
            assert image.frames == b""
            assert image.working_set == bytes(8)


def test_positions_beyond_the_index(tmp_path: Path) -> None:
    with filled(tmp_path / "s") as store, store.open_image("one") as image:
        for wrong in (struct.pack("<II", 4, 0), b"abcd"):
            with pytest.raises(ValueError, match=r"beyond the index|half an entry"):
                store.keep_working_set("one", image.snapshot, wrong)
        assert store.open_image("one").working_set == b""


@pytest.mark.parametrize("damaged", [b"x", bytes(9), bytes(8 * 5)])
def test_a_damaged_one_is_none(tmp_path: Path, damaged: bytes) -> None:
    """Half an entry, or more entries than there are chunks."""
    with filled(tmp_path / "s") as store:
        with store.open_image("one") as image:
            key = format.key(format.WORKING_SETS, image.snapshot)
        store._environment.update(lambda txn: txn.put(key, damaged))
        with store.open_image("one") as image:
            assert image.working_set == b""


def test_gone_or_replaced_meanwhile(tmp_path: Path) -> None:
    with filled(tmp_path / "s") as store:
        with store.open_image("one") as image:
            old = image.snapshot
        with store.writer("one", replace=True) as writer:
            writer.commit(b"")
        assert not store.keep_working_set("one", old, bytes(8))
        assert not store.keep_working_set("none", old, bytes(8))


def test_freed_with_its_snapshot(tmp_path: Path) -> None:
    with filled(tmp_path / "s") as store:
        with store.open_image("one") as image:
            assert store.keep_working_set("one", image.snapshot, bytes(8))
        store.rm("one")
        environment = store._environment
        with environment.read() as txn:
            assert not list(environment.keys(txn, format.WORKING_SETS))
            assert not list(environment.keys(txn, format.WORKING_SET_PACKS))
