"""`verify`: everything that a restore would trust, tested against what was recorded when it was written."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from lazyrestore.errors import ChunkInvalid, StoreBusy, StoreReadOnly
from lazyrestore.store import format, locks, working_sets
from lazyrestore.store.environment import Environment
from lazyrestore.store.image import Entry, StoredImage, open_image
from lazyrestore.store.report import names as names_of

BATCH = 4 << 20  # raw bytes per task
TREE_ATTEMPTS = 3  # readings of the tree during which somebody committed, before the check of the tree is given up


class Damage(msgspec.Struct, frozen=True):
    """snapshot: its name, "" if the store as a whole is meant; address: the chunk's image address, None if no chunk is
    meant."""

    snapshot: str
    address: int | None
    reason: str


class Report(msgspec.Struct):
    """What was tested: snapshots, chunks and their raw bytes (one that two snapshots share counts twice); and what is
    wrong. tree_checked: whether LMDB's pages were tested too; not while somebody else keeps writing, nor for a single
    snapshot."""

    snapshots: int = 0
    chunks: int = 0
    raw_bytes: int = 0
    tree_checked: bool = False
    damage: list[Damage] = msgspec.field(default_factory=list)


def verify(environment: Environment, name: str | None) -> Report:
    """Test one snapshot, or, without a name, all of them and the store's own structure; damage is reported, not raised.

    The index's checksums, and of each chunk: its place in the index and in its pack, zstd's checksum, its raw length
    and its BLAKE3. Raises SnapshotNotFound, StoreError.
    """
    report = Report()
    if name is None and not _check_tree(environment, report):
        return report  # LMDB itself would trip over it
    try:
        names = [name] if name is not None else _names(environment)
    except ChunkInvalid as error:
        report.damage.append(Damage("", None, str(error)))
        return report
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "lazyrestore-verify") as pool:
        for each in names:
            report.snapshots += 1
            try:
                with open_image(environment, each) as image:
                    _check_image(environment, image, pool, report)
            except ChunkInvalid as error:
                report.damage.append(Damage(each, None, str(error)))
    if name is None:
        _check_locations(environment, report)
    return report


def _names(environment: Environment) -> list[str]:
    with environment.read() as txn:
        return list(names_of(environment, txn))


def _check_tree(environment: Environment, report: Report) -> bool:
    """Whether LMDB may go on: its file is walked by a reader that trusts no page."""
    try:
        from lmdb.verify import VerifyError
        from lmdb.verify import verify as untyped
    except ImportError:  # py-lmdb before 3.0
        return True
    walk: Callable[[str], list[str]] = untyped
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(StoreBusy, StoreReadOnly):
            stack.enter_context(locks.WriterLock(environment.directory))
        for _ in range(TREE_ATTEMPTS):
            before = environment.last_transaction()
            try:
                problems = walk(environment.directory)
            except VerifyError as error:
                problems = [str(error)]
            if not problems or before == environment.last_transaction():
                report.tree_checked = True
                report.damage += [Damage("", None, problem) for problem in problems]
                return not problems
    return True


def _check_image(environment: Environment, image: StoredImage, pool: ThreadPoolExecutor, report: Report) -> None:
    with environment.read() as txn:
        hashes = bytes(environment.need(txn, format.key(format.HASHES, image.snapshot)))
    count = image.n_chunks
    if len(hashes) != count * format.HASH:
        raise ChunkInvalid(f"snapshot {image.name}", "read the hashes", f"{len(hashes)} bytes for {count} chunks")
    for block in range(0, count, format.INDEX_BLOCK):
        if not image.is_sound(block // format.INDEX_BLOCK):
            last = min(block + format.INDEX_BLOCK, count) - 1
            reason = f"entries {block} to {last} of the index: the checksum is wrong"
            report.damage.append(Damage(image.name, None, reason))
    pending: deque[Future[list[Damage]]] = deque()
    for batch in _batches(image, hashes, report):
        pending.append(pool.submit(_check_chunks, image, batch))
        if len(pending) > 8:
            report.damage += pending.popleft().result()
    while pending:
        report.damage += pending.popleft().result()
    if reason := working_sets.damage(image, hashes):
        with open_image(environment, image.name) as again:
            if (again.snapshot, again.frames_offset, again.frames) == (
                image.snapshot,
                image.frames_offset,
                image.frames,
            ):
                report.damage.append(
                    Damage(image.name, None, f"the working set's pack, which restores will pass over: {reason}")
                )


def _batches(image: StoredImage, hashes: bytes, report: Report) -> Iterator[list[tuple[Entry, bytes]]]:
    """Chunks with their hashes; entries that are wrong in themselves are reported and left out."""
    batch: list[tuple[Entry, bytes]] = []
    size = previous = 0
    for number in range(image.n_chunks):
        report.chunks += 1
        try:
            entry = image.entry_within_bounds(number, previous)
        except ChunkInvalid as error:
            report.damage.append(Damage(image.name, None, f"entry {number} of the index: {error.reason}"))
            continue
        previous = entry[0] + entry[1]
        report.raw_bytes += entry[1]
        batch.append((entry, hashes[number * format.HASH : (number + 1) * format.HASH]))
        size += entry[1]
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_chunks(image: StoredImage, batch: list[tuple[Entry, bytes]]) -> list[Damage]:
    from blake3 import blake3

    damage = []
    for entry, digest in batch:
        try:
            if blake3(image.decompress(entry)).digest() != digest:
                damage.append(Damage(image.name, entry[0], "its BLAKE3 hash is not the recorded one"))
        except ChunkInvalid as error:
            damage.append(Damage(image.name, entry[0], error.reason))
    return damage


def _check_locations(environment: Environment, report: Report) -> None:
    """What deduplication would refer to must lie in a pack that exists."""
    with environment.read() as txn:
        packs = {
            number: len(environment.need(txn, format.key(format.PACKS, number)))
            for number in environment.keys(txn, format.PACKS)
        }
        for digest, value in environment.records(txn, format.CHUNKS):
            good = len(digest) == format.HASH and len(value) == format.LOCATION.size
            if good:
                pack, offset, stored, length = format.LOCATION.unpack(value)
                good = 0 < length <= format.HUGE_CHUNK and stored > 0 and offset + stored <= packs.get(pack, 0)
            if not good:
                report.damage.append(Damage("", None, f"deduplication record {bytes(digest).hex()} points nowhere"))
