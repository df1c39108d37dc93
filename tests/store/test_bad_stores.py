"""Damage, strangers, newer versions, read-only and full file systems: a clear error each, and nothing lost."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import msgspec
import pytest
from helpers_store import BASE, PAGE, child, get, pages, put, tmpfs

from lazyrestore.errors import (
    ChunkInvalid,
    NotAStore,
    StoreBusy,
    StoreError,
    StoreFull,
    StoreReadOnly,
    StoreVersionError,
)
from lazyrestore.store import CHUNK, ImageStore, format, locks, reserve

DATA = pages(200, seed=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed store with one snapshot, "good"."""
    path = tmp_path / "store"
    with ImageStore.open(path) as store:
        put(store, "good", DATA)
    return path


def alter(path: Path, key: bytes, change: Callable[[bytes], bytes]) -> None:
    """Change one record behind the store's back."""
    with lmdb.open(str(path), map_size=1 << 30) as environment, environment.begin(write=True) as txn:
        found = txn.get(key)
        assert found is not None
        txn.put(key, change(bytes(found)))


def flip(path: Path, offset: int, mask: int = 0xFF) -> None:
    with open(path / "data.mdb", "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0.0, 0.3, 0.99])
def test_a_flipped_byte_in_a_chunk(path: Path, place: float) -> None:
    with ImageStore.open(path) as store, store.open_image("good") as image:
        victim = list(image.entries())[3]
        address, length, slot, offset, stored = victim
        flip(path, image.packs[slot][0] + offset + int(stored * place))
        with pytest.raises(ChunkInvalid, match=f"{address:#x}"):
            image.read(address, length)
        assert image.read(BASE, 3 * CHUNK) == DATA[: 3 * CHUNK]
        for report in (store.verify(), store.verify("good")):
            assert [(each.snapshot, each.address) for each in report.damage] == [("good", address)]


def test_a_chunk_swapped_for_a_sound_one(path: Path) -> None:
    """zstd's checksum holds, the hash does not."""
    with ImageStore.open(path) as store, store.open_image("good") as image:
        one, two = list(image.entries())[1:3]
    record = format.ENTRY.pack(one[0], one[1], *two[2:])
    alter(path, format.key(format.INDEXES, 1), lambda index: index[:24] + record + index[48:])
    with ImageStore.open(path) as store:
        damage = store.verify().damage
        assert [(each.address, "BLAKE3" in each.reason) for each in damage] == [(None, False), (one[0], True)]
        assert damage[0].reason.startswith("entries 0 to ")


def test_a_plausible_entry_that_is_wrong(path: Path) -> None:
    """Nothing but the index's checksum tells: each bound is kept, and the chunk's bytes are sound."""
    with ImageStore.open(path) as store, store.open_image("good") as image:
        address, *rest = list(image.entries())[-1]
    moved = format.ENTRY.pack(address + CHUNK, *rest)

    def change(index: bytes) -> bytes:
        at = index.index(format.ENTRY.pack(address, *rest))
        return index[:at] + moved + index[at + len(moved) :]

    alter(path, format.key(format.INDEXES, 1), change)
    with ImageStore.open(path) as store:
        assert [each.address for each in store.verify().damage] == [None]
        with store.open_image("good") as image:
            for start in (address, address + CHUNK):
                with pytest.raises(ChunkInvalid, match="checksum"):
                    image.read(start, PAGE)
    record = format.key(format.SNAPSHOTS, 1)
    alter(
        path, record, lambda data: msgspec.msgpack.encode(msgspec.msgpack.decode(data) | {"sums": False, "sum": None})
    )
    with ImageStore.open(path) as store, store.open_image("good") as image:  # as before November 2026
        assert image.read(address, PAGE) == bytes(PAGE)


ENTRIES = {
    "unaligned": (BASE + 1, CHUNK, 0, 0, 10),
    "not in order": (BASE - CHUNK, CHUNK, 0, 0, 10),
    "too long": (BASE + CHUNK, 4 << 20, 0, 0, 10),
    "no length": (BASE + CHUNK, 0, 0, 0, 10),
    "odd length": (BASE + CHUNK, 5, 0, 0, 10),
    "no such pack": (BASE + CHUNK, CHUNK, 1, 0, 10),
    "behind the pack": (BASE + CHUNK, CHUNK, 0, (1 << 32) - 1, 10),
    "beyond the pack": (BASE + CHUNK, CHUNK, 0, 0, (1 << 32) - 1),
    "nothing stored": (BASE + CHUNK, CHUNK, 0, 0, 0),
    "end of addresses": ((1 << 64) - PAGE, CHUNK, 0, 0, 10),
    "not a frame": (BASE + CHUNK, CHUNK, 0, 7, 5000),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_wrong_index_entry(path: Path, entry: tuple[int, int, int, int, int]) -> None:
    alter(path, format.key(format.INDEXES, 1), lambda index: index[:24] + format.ENTRY.pack(*entry) + index[48:])
    with ImageStore.open(path) as store:
        assert store.verify().damage
        with store.open_image("good") as image, pytest.raises(ChunkInvalid):
            for _ in image.contents(BASE, 1 << 64):
                pass


RECORDS: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    "record cut": (format.key(format.SNAPSHOTS, 1), lambda data: data[:5]),
    "record of another type": (format.key(format.SNAPSHOTS, 1), lambda _: b"\x93\x01\x02\x03"),
    "record empty": (format.key(format.SNAPSHOTS, 1), lambda _: b""),
    "too many chunks": (
        format.key(format.SNAPSHOTS, 1),
        lambda data: msgspec.msgpack.encode(msgspec.msgpack.decode(data) | {"chunks": 1000}),
    ),
    "a pack that is not there": (
        format.key(format.SNAPSHOTS, 1),
        lambda data: msgspec.msgpack.encode(msgspec.msgpack.decode(data) | {"packs": [77]}),
    ),
    "index said to have no checksums": (
        format.key(format.SNAPSHOTS, 1),
        lambda data: msgspec.msgpack.encode(msgspec.msgpack.decode(data) | {"sums": False}),
    ),
    "number beyond all": (
        format.key(format.SNAPSHOTS, 1),
        lambda data: msgspec.msgpack.encode(msgspec.msgpack.decode(data) | {"chunks": -1}),
    ),
    "manifest changed": (format.key(format.MANIFESTS, 1), lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "hashes cut": (format.key(format.HASHES, 1), lambda data: data[:-1]),
    "name of nothing": (format.NAMES + b"good", lambda _: format.KEY.pack(9)),
    "name cut": (format.NAMES + b"good", lambda _: b"1"),
    "pack shorter": (format.key(format.PACKS, 1), lambda data: data[:5000]),
    "pack moved into the tree": (format.key(format.PACKS, 1), lambda data: data[:100]),
}


@pytest.mark.parametrize(("key", "change"), RECORDS.values(), ids=RECORDS)
@pytest.mark.filterwarnings("error")
def test_a_damaged_record(path: Path, key: bytes, change: Callable[[bytes], bytes]) -> None:
    alter(path, key, change)
    with ImageStore.open(path) as store:
        assert store.verify().damage
        try:
            with store.open_image("good") as image:
                assert image.read(BASE, len(DATA)) == DATA
        except Exception as error:
            assert type(error).__module__ == "lazyrestore.errors"
        else:
            assert key[:1] == format.HASHES


def test_a_dangling_deduplication_record(path: Path) -> None:
    with ImageStore.open(path) as store:
        digest = next(bytes(key) for key, _ in records(store, format.CHUNKS))
    alter(path, format.CHUNKS + digest, lambda _: format.LOCATION.pack(77, 0, 10, CHUNK))
    with ImageStore.open(path) as store:
        assert [each.reason for each in store.verify().damage] == [
            f"deduplication record {digest.hex()} points nowhere"
        ]


def records(store: ImageStore, table: bytes) -> Iterator[tuple[bytes, bytes]]:
    environment = store._environment
    with environment.read() as txn:
        for key, value in environment.records(txn, table):
            yield bytes(key), bytes(value)


def test_a_damaged_tree_is_found_before_lmdb_uses_it(path: Path) -> None:
    pytest.importorskip("lmdb.verify", reason="py-lmdb 3.0 checks the tree")
    with ImageStore.open(path) as store:
        page = store._environment.page
        content = (path / "data.mdb").read_bytes()
        leaf = next(
            at
            for at in range(2 * page, len(content), page)
            if content[at : at + 8] == (at // page).to_bytes(8, "little")
            and content[at + 10] == 2
            and b"Ngood" in content[at : at + page]
        )
        flip(path, leaf + 16)  # where the first record stands in the page
        damage = store.verify().damage
        assert damage and all(each.snapshot == "" for each in damage)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.0])
def test_a_truncated_file(path: Path, keep: float) -> None:
    with ImageStore.open(path) as store:
        used = (store._environment._env.info()["last_pgno"] + 1) * store._environment.page
    os.truncate(path / "data.mdb", 8192 + int((used - 8192) * keep))
    with pytest.raises(ChunkInvalid, match="truncated"):
        ImageStore.open(path)


def test_a_file_cut_behind_its_last_page_is_whole(path: Path) -> None:
    with ImageStore.open(path) as store:
        used = (store._environment._env.info()["last_pgno"] + 1) * store._environment.page
    os.truncate(path / "data.mdb", used)
    with ImageStore.open(path) as store:
        assert not store.verify().damage
        assert get(store, "good", len(DATA)) == DATA
        put(store, "more", pages(50, seed=2))


# -- not ours ----------------------------------------------------------------------------------------------------------


def test_what_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("else")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_text("text" * 5000)
    with lmdb.open(str(tmp_path / "foreign"), map_size=1 << 20) as environment, environment.begin(write=True) as txn:
        txn.put(b"key", b"value")
    with lmdb.open(str(tmp_path / "odd"), map_size=1 << 20) as environment, environment.begin(write=True) as txn:
        txn.put(format.IDENTITY, b"\x00")
    for name in ("file", "full", "text", "foreign", "odd"):
        before = snapshot_of(tmp_path / name)
        with pytest.raises(NotAStore, match=name):
            ImageStore.open(tmp_path / name)
        assert snapshot_of(tmp_path / name) == before
    with pytest.raises(NotAStore, match="does not exist; no snapshot was taken"):
        ImageStore.open(tmp_path / "missing", create=False)
    (tmp_path / "link").symlink_to("nothing")
    for place, reason in (("/proc/store", "no directory can be made there"), (tmp_path / "link", "link to nothing")):
        with pytest.raises(NotAStore, match=f"{reason}; name a store, or a directory"):
            ImageStore.open(place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAStore, match="empty"):
        ImageStore.open(tmp_path / "empty", create=False)
    ImageStore.open(tmp_path / "empty").close()


def snapshot_of(path: Path) -> dict[str, bytes]:
    return {
        each.name: each.read_bytes() for each in [path, *path.glob("*")] if each.is_file() and each.name != "lock.mdb"
    }


def test_a_new_store_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        ImageStore.open(tmp_path / "new" / "store").close()
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "store").stat().st_mode & 0o777 == 0o700
    for file in (tmp_path / "new" / "store").iterdir():
        assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o755, 0o711, 0o500])
def test_a_directory_of_the_users_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    """What is in it is private anyhow."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(mode)
    ImageStore.open(tmp_path / "mine").close()
    assert (tmp_path / "mine").stat().st_mode & 0o7777 == mode
    assert {each.stat().st_mode & 0o7777 for each in (tmp_path / "mine").iterdir()} == {0o600}


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int, fresh: bool) -> None:
    """As ssh refuses its own: who can exchange data.mdb says what is restored."""
    store = tmp_path / "shared"
    store.mkdir()
    if not fresh:
        ImageStore.open(store).close()
    store.chmod(mode)
    before = snapshot_of(store)
    with pytest.raises(StoreError, match=rf"shared: open: others .* \(mode {mode:04o}\).*chmod go-w {store}"):
        ImageStore.open(store, create=fresh)
    assert snapshot_of(store) == before
    ImageStore.open(store / "inside").close()
    store.chmod(mode & ~0o022)
    if not fresh:
        ImageStore.open(store, create=False).close()


def test_a_newer_version(path: Path) -> None:
    newer = msgspec.msgpack.encode({"magic": "lazyrestore", "version": 3, "something": ["new"]})
    alter(path, format.IDENTITY, lambda _: newer)
    with pytest.raises(StoreVersionError, match="format 3"):
        ImageStore.open(path)


def test_an_unfinished_store_is_finished(tmp_path: Path) -> None:
    """Killed between making the files and the first transaction."""
    (tmp_path / "store").mkdir()
    with lmdb.open(str(tmp_path / "store"), map_size=1 << 20) as environment:
        environment.sync(True)
    with ImageStore.open(tmp_path / "store") as store:
        put(store, "x", pages(1))


# -- read-only ---------------------------------------------------------------------------------------------------------


def check_read_only(path: Path) -> None:
    with ImageStore.open(path) as store:
        assert [each.name for each in store.ls()] == ["good"]
        assert get(store, "good", len(DATA)) == DATA
        assert not store.verify().damage
        with store.open_image("good"):
            assert store.show("good").pinned
        for call in (lambda: store.writer("new"), lambda: store.rm("good"), store.gc):
            with pytest.raises(StoreReadOnly, match="store"):
                call()
        assert store.totals().raw_bytes


@pytest.mark.requires("root")
@pytest.mark.parametrize("locks_exist", [True, False])
def test_a_read_only_file_system(path: Path, tmp_path: Path, locks_exist: bool) -> None:
    with tmpfs(tmp_path / "mount", "16m") as mount:
        shutil.copytree(path, mount / "store")
        if not locks_exist:
            (mount / "store" / "lock.mdb").unlink()
            (mount / "store" / "writer.lock").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        check_read_only(mount / "store")
        with pytest.raises(StoreReadOnly):
            ImageStore.open(mount / "new")


def as_nobody(action: Callable[[], None]) -> None:
    """Run `action` in a child that is nobody; its failure is ours."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            action()
            status = 0
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.requires("root")
def test_somebody_elses_store(path: Path) -> None:
    for folder in (path, *path.parents):
        if folder.stat().st_mode & 0o005 != 0o005 and folder.is_relative_to("/tmp"):
            folder.chmod(0o755)
    for file in path.iterdir():
        file.chmod(0o644)
    (path / "lock.mdb").chmod(0o600)
    as_nobody(lambda: check_read_only(path))
    lock = locks.WriterLock(str(path))

    def busy() -> None:  # without LMDB's lock file it cannot be read beside a writer
        with pytest.raises(StoreBusy):
            ImageStore.open(path)

    as_nobody(busy)
    lock.close()
    path.chmod(0o700)

    def forbidden() -> None:
        whose = rf"{path} belongs to root \(user 0\), mode 0700, and you are user 65534"
        with pytest.raises(StoreError, match="it may not be read: " + whose.replace(str(path), "it")) as caught:
            ImageStore.open(path)
        assert type(caught.value) is StoreError and caught.value.errno == errno.EACCES
        with pytest.raises(StoreError, match="it cannot be reached: " + whose):
            ImageStore.open(path / "below", create=False)
        with pytest.raises(StoreReadOnly, match=f"it cannot be made: {path.parent} belongs to root"):
            ImageStore.open(path.parent / "new")

    as_nobody(forbidden)
    path.chmod(0o755)
    (path / "data.mdb").chmod(0o600)

    def unreadable() -> None:
        with pytest.raises(StoreError, match=f"it may not be read: {path}/data.mdb belongs to root"):
            ImageStore.open(path)

    as_nobody(unreadable)


# -- full --------------------------------------------------------------------------------------------------------------


@pytest.mark.requires("root")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyrestore.store.writer.PACKS_PER_TRANSACTION", 1)
    with tmpfs(tmp_path / "mount", "24m") as mount, ImageStore.open(mount / "store") as store:
        put(store, "good", DATA)
        before = store.totals()
        huge = pages(10000, seed=5, noise=4000)  # 40 MB that do not compress
        for _ in range(2):
            with pytest.raises(StoreFull, match="No space left"):
                put(store, "huge", huge)
            after = store.totals()
            assert (after.packs, after.stored_bytes) == (before.packs, before.stored_bytes)
            assert get(store, "good", len(DATA)) == DATA
            assert not store.verify().damage
        put(store, "fits", pages(3000, seed=6))
        with open(mount / "ballast", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(1 << 16))
        with pytest.raises(StoreFull):
            put(store, "huge", huge)
        assert get(store, "fits", 3000 * PAGE) == pages(3000, seed=6)
        # To the last block, and what the failed snapshot left.
        with open(mount / "ballast", "ab", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(1 << 12))
        assert os.statvfs(mount).f_bavail == 0
        used = store.totals().disk_bytes
        store.rm("fits")
        assert [each.name for each in store.ls()] == ["good"]
        assert store.totals().disk_bytes < used
        assert os.stat(mount / "store/reserve").st_blocks * 512 == reserve.SIZE  # for the next time
        assert get(store, "good", len(DATA)) == DATA
        assert not store.verify().damage


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    with ImageStore.open(tmp_path / "store") as store:
        put(store, "good", DATA)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, before[1]))
        try:
            with pytest.raises(StoreFull, match=r"File too large; .*ulimit -f"):
                put(store, "huge", pages(5000, seed=5, noise=4000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert get(store, "good", len(DATA)) == DATA


def test_a_map_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyrestore.store.environment.MAP_BYTES", 1 << 20)
    data = pages(3000, seed=1)
    with ImageStore.open(tmp_path / "store") as store:
        put(store, "one", pages(10))
        with store.open_image("one") as image:
            put(store, "large", data)
            assert image.read(BASE, 10 * PAGE) == pages(10)
        assert get(store, "large", len(data)) == data


def test_an_address_space_limit(tmp_path: Path) -> None:
    code = """
store.close()
import resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
store = ImageStore.open(sys.argv[1])
put(store, "x", pages(100))
say(get(store, "x", 100 * PAGE) == pages(100))
"""
    with child(tmp_path / "store", code) as limited:
        assert limited.hear() == "True"


def test_a_map_grown_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pages(3000, seed=1)
    monkeypatch.setattr("lazyrestore.store.environment.MAP_BYTES", 1 << 20)
    with ImageStore.open(tmp_path / "store") as store:
        put(store, "one", pages(10))
        with child(tmp_path / "store", 'put(store, "large", pages(3000, seed=1)); say("done")') as other:
            assert other.hear() == "done"
        assert get(store, "large", len(data)) == data
        put(store, "two", pages(10, seed=2))
        assert not store.verify().damage
