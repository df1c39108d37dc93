"""Adding a snapshot: chunks are hashed and compressed on all CPUs while packs go to disk, and a last transaction shows
it.

Facts. Hashing 16 KiB takes 5 us, compressing them 20 to 90; whatever Python does for a chunk costs microseconds in
which no other thread runs Python. Until the last transaction nothing refers to the packs, so a killed writer leaves
only garbage, and the writer lock makes sure that no other frees or adds packs meanwhile.
Choice. Worker threads take batches of 2 MiB, look each hash up, and compress what is new in one call of the C core.
Their results are taken in order by the calling thread, which fills packs; one more thread writes the packs, a few per
transaction. Both queues are bounded. A store already holding a chunk is asked by the workers, a chunk seen twice at
once by two workers is dropped by the calling thread.
Cost. For each chunk about 250 bytes of memory until the end, 0.4 % of the image; intermediate transactions are synced
(without their meta page), because unsynced ones could, at a power cut, take older snapshots with them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from lazyrestore.errors import SnapshotExists, StoreError
from lazyrestore.store import format, garbage
from lazyrestore.store.chunking import Run, Source, Span, check_runs, cut
from lazyrestore.store.compressor import Compressor
from lazyrestore.store.environment import Environment, Transaction
from lazyrestore.store.locks import WriterLock
from lazyrestore.store.parent import Parent, Reference

Progress = Callable[[int, int], None]
# A chunk from a worker: image address, raw length, hash, LOCATION if it is stored already, else the frame.
Result = tuple[int, int, bytes, bytes | None, memoryview | None]

BATCH = 2 << 20  # raw bytes that a worker takes at once: some milliseconds
WAITING = 3  # batches in the queue per worker: they have work while the calling thread fills packs
PACKS_PER_TRANSACTION = 4  # at most, while the one before is being written


class ImageWriter:
    """One snapshot in the making. Use as a context manager: left without commit(), nothing remains. One thread at a
    time."""

    def __init__(
        self,
        environment: Environment,
        name: str,
        *,
        replace: bool = False,
        level: int = 1,
        progress: Progress | None = None,
        wait: bool = False,
    ) -> None:
        self._key = format.NAMES + format.check_name(name)
        if level not in format.LEVELS:
            raise ValueError(f"compression level {level}: must be 1 to {format.LEVELS[-1]}")
        self._environment = environment
        self._name = name
        self._replace = replace
        self._level = level
        self._progress = progress
        check_new(environment, name, replace=replace)
        self._lock = WriterLock(environment.directory, wait=wait)
        self._open = True
        try:
            check_new(environment, name, replace=replace)
            environment.forget_dead_readers()
            garbage.collect(environment)
            with environment.read() as txn:
                counters = format.decode(environment.need(txn, format.COUNTERS), format.Counters, environment.resource)
        except BaseException:
            self._lock.close()
            raise
        self._snapshot = counters.snapshot
        self._pack = counters.pack  # id of the pack being filled
        threads = len(os.sched_getaffinity(0))
        self._workers = ThreadPoolExecutor(threads, "lazyrestore-compress")
        self._waiting = WAITING * threads
        self._packer = ThreadPoolExecutor(1, "lazyrestore-pack")
        self._writing: deque[Future[None]] = deque()
        self._local = threading.local()
        self._pending: deque[tuple[int, Future[list[Result]]]] = deque()  # raw bytes, results
        self._sources: deque[tuple[int, Source]] = deque()  # with what add_soon() returned
        self._submitted = 0  # batches
        self._done = self._total = 0

        self._frames: list[memoryview] = []  # of the pack being filled
        self._fill = 0
        self._contents = bytearray()
        self._full: list[tuple[int, list[memoryview], bytes]] = []  # packs to be written in one transaction

        self._index = bytearray()  # ENTRYs in order of arrival
        self._hashes = bytearray()
        self._new: dict[bytes, bytes] = {}  # hash: LOCATION, of chunks that this snapshot adds
        self._old: set[bytes] = set()  # hashes of chunks that the store had
        self._slots: dict[int, int] = {}  # pack id: slot
        self._raw = self._stored = self._added = 0
        self._hugetlb = False
        self._references: list[tuple[Parent, Reference]] = []
        self._apart = array("Q")  # where these begin, sorted

    def parent(self, snapshot: int) -> Parent:
        """Another snapshot of this store, by its id, to refer() to until this one is closed. Raises ChunkInvalid."""
        return Parent(self._environment, snapshot)

    def refer(self, parent: Parent, references: Sequence[Reference], *, hugetlb: bool = False) -> None:
        """Store what `parent` has, by reference, without reading it; before anything near it is added.

        No chunk may cross a reference's border: commit() raises ValueError then. hugetlb: it is memory in huge pages.
        """
        self._references += [(parent, reference) for reference in references]
        self._apart = array("Q", sorted(reference.start for _, reference in self._references))
        self._hugetlb |= hugetlb and bool(references)

    def add(self, buffer: memoryview, runs: Sequence[Run], *, chunk_size: int = format.CHUNK) -> None:
        """Store runs of memory; the buffer may be changed or freed as soon as this returns.

        buffer: contiguous bytes; runs: (image address, offset in the buffer, length), sorted, of whole 4 KiB pages;
        chunk_size: a power of two, 2 MiB for memory in huge pages. No byte may be added twice. Raises StoreFull,
        StoreError, ValueError.
        """
        self.settle(self.add_soon(buffer, runs, chunk_size=chunk_size))

    def add_soon(self, buffer: memoryview, runs: Sequence[Run], *, chunk_size: int = format.CHUNK) -> int:
        """As add(), but the buffer must stay as it is until settle() has returned for the number that this returns."""
        if chunk_size % format.PAGE or not 0 < chunk_size <= format.HUGE_CHUNK:
            raise ValueError(f"chunk size {chunk_size}")
        self._total += check_runs(runs, memoryview(buffer).nbytes)
        self._hugetlb |= bool(runs) and chunk_size == format.HUGE_CHUNK
        source = Source(memoryview(buffer))
        for batch in _batches(runs, chunk_size, self._apart):
            self.settle(self._submitted - self._waiting + 1)
            size = sum(length for span in batch for _, _, length in span.runs)
            self._pending.append((size, self._workers.submit(self._compress, source, batch)))
            self._submitted += 1
        self._sources.append((self._submitted, source))
        return self._submitted

    def settle(self, number: int) -> None:
        """Wait for what add_soon() has begun: buffers up to that `number` are the caller's again, all if this raises
        what add() raises."""
        try:
            while self._pending and self._submitted - len(self._pending) < number:
                self._take(*self._pending.popleft())
        except BaseException:
            self._abandon()
            raise
        while self._sources and self._sources[0][0] <= self._submitted - len(self._pending):
            self._sources.popleft()[1].close()

    def _abandon(self) -> None:
        """No buffer is used any more."""
        for _, future in self._pending:
            future.cancel()
        for _, future in self._pending:
            if not future.cancelled():
                future.exception()  # wait
        self._pending.clear()

    def commit(
        self,
        manifest: bytes,
        plan: bytes = b"",
        created: float | None = None,
        committing: Callable[[], None] | None = None,
    ) -> int:
        """Make the snapshot visible, on disk, with `manifest` and the plan derived from it, if any; returns its id.
        created: seconds since 1970; None: now. `committing` is called at the last moment at which nothing is visible.

        Raises SnapshotExists (another came first, and `replace` is off), StoreFull, StoreError; nothing is visible
        then.
        """
        environment = self._environment
        self.settle(self._submitted)
        self._end_pack()
        self._write_full()
        self._take_references()
        while self._writing:
            self._writing.popleft().result()
        index, hashes = self._sorted()
        sums = format.sums_of(index)
        record = format.Record(
            created=time.time() if created is None else created,
            chunks=len(index) // format.ENTRY.size,
            raw_bytes=self._raw,
            stored_bytes=self._stored,
            added_bytes=self._added,
            packs=list(self._slots),
            hugetlb=self._hugetlb,
            sums=True,
        )
        counters = format.encode(format.Counters(self._snapshot + 1, self._pack))
        chunks = sorted((format.CHUNKS + digest, location) for digest, location in self._new.items())

        def show(txn: Transaction) -> None:
            if txn.get(self._key) is not None and not self._replace:
                raise _exists(environment, self._name)
            environment.upgrade(txn)
            with txn.cursor() as cursor:
                cursor.putmulti(chunks)
            txn.put(format.key(format.INDEXES, self._snapshot), environment.lengthen(index + sums))
            txn.put(format.key(format.HASHES, self._snapshot), hashes)
            txn.put(format.key(format.MANIFESTS, self._snapshot), manifest)
            if plan:
                txn.put(format.key(format.PLANS, self._snapshot), plan)
            txn.put(format.key(format.SNAPSHOTS, self._snapshot), format.encode(format.with_sum(record, manifest)))
            txn.put(self._key, format.KEY.pack(self._snapshot))
            txn.put(format.COUNTERS, counters)

        # 128 bytes per new chunk: a node of 61, doubled by half-full pages.
        room = len(index) + len(sums) + len(hashes) + len(manifest) + len(plan) + 128 * len(chunks) + (1 << 20)
        if committing:
            committing()
        environment.update(show, room=room)
        environment.sync()
        self._finish()
        return self._snapshot

    def close(self) -> None:
        """Without commit() before: free what was written. Raises nothing that the store can cause."""
        self._finish()

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- workers -------------------------------------------------------------------------------------------------------

    def _compress(self, source: Source, batch: list[Span]) -> list[Result]:
        from blake3 import blake3

        new = self._new
        contents = source.contents(batch)
        results: list[Result] = []
        unknown: dict[bytes, tuple[int, memoryview]] = {}  # hash: position in results, content
        with self._environment.read() as txn:
            for address, content in contents:
                length = len(content)
                digest = blake3(content).digest()
                location = new.get(digest)
                if location is None:
                    found = txn.get(format.CHUNKS + digest)
                    if found is not None and format.LOCATION.unpack(found)[3] == length:
                        location = bytes(found)
                    elif digest not in unknown:
                        unknown[digest] = len(results), content
                results.append((address, length, digest, location, None))
        frames = self._compressor().compress([content for _, content in unknown.values()])
        for (position, _), frame in zip(unknown.values(), frames, strict=True):
            results[position] = (*results[position][:4], frame)
        return results

    def _compressor(self) -> Compressor:
        """This thread's own."""
        compressor: Compressor | None = getattr(self._local, "compressor", None)
        if compressor is None:
            self._local.compressor = compressor = Compressor(self._level)
        return compressor

    # -- the calling thread --------------------------------------------------------------------------------------------

    def _take(self, size: int, future: Future[list[Result]]) -> None:
        for address, length, digest, location, frame in future.result():
            location = self._new.get(digest, location)
            if location is None:
                assert frame is not None
                location = self._append(digest, length, frame)
            self._list(address, length, digest, location)
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _take_references(self) -> None:
        for parent, (start, end, source) in self._references:
            for chunk in parent.chunks(source, source + end - start):
                self._list(chunk.address - source + start, chunk.length, chunk.digest, chunk.location)

    def _list(self, address: int, length: int, digest: bytes, location: bytes) -> None:
        """A chunk of the index, which is in the store or in a pack that is being filled."""
        pack, offset, stored, _ = format.LOCATION.unpack(location)
        if digest not in self._new and digest not in self._old:
            self._old.add(digest)
            self._stored += stored
        slot = self._slots.setdefault(pack, len(self._slots))
        self._index += format.ENTRY.pack(address, length, slot, offset, stored)
        self._hashes += digest
        self._raw += length

    def _append(self, digest: bytes, length: int, frame: memoryview) -> bytes:
        """Put a chunk into the pack being filled; returns its LOCATION."""
        stored = len(frame)
        if self._frames and self._fill + stored > format.PACK:
            self._end_pack()
        location = format.LOCATION.pack(self._pack, self._fill, stored, length)
        self._frames.append(frame)
        self._fill += stored
        self._contents += digest
        self._new[digest] = location
        self._stored += stored
        self._added += stored
        return location

    def _end_pack(self) -> None:
        if self._frames:
            self._full.append((self._pack, self._frames, bytes(self._contents)))
            self._pack += 1
            self._frames, self._fill, self._contents = [], 0, bytearray()
        if len(self._full) >= PACKS_PER_TRANSACTION or all(each.done() for each in self._writing):
            self._write_full()

    def _write_full(self) -> None:
        """Hand the full packs to the packing thread, which may be one transaction behind."""
        while len(self._writing) > 1:
            self._writing.popleft().result()
        if self._full:
            self._writing.append(self._packer.submit(self._write, self._full, self._pack))
            self._full = []

    def _write(self, packs: list[tuple[int, list[memoryview], bytes]], next_pack: int) -> None:
        environment = self._environment
        joined = [(pack, environment.lengthen(b"".join(frames)), contents) for pack, frames, contents in packs]

        def put(txn: Transaction) -> None:
            for pack, value, contents in joined:
                txn.put(format.key(format.PACKS, pack), value)
                txn.put(format.key(format.CONTENTS, pack), contents)
            txn.put(format.COUNTERS, format.encode(format.Counters(self._snapshot, next_pack)))

        environment.update(put, room=sum(len(value) + len(contents) + 8192 for _, value, contents in joined))

    def _sorted(self) -> tuple[bytes, bytes]:
        """Index and hashes by image address. Raises ValueError if chunks overlap."""
        entries = list(format.entries(self._index))
        in_order = range(len(entries))
        order = sorted(in_order, key=entries.__getitem__)
        end = 0
        for number in order:
            address, length = entries[number][:2]
            if address < end:
                raise ValueError(f"image address {address:#x} was added twice")
            end = address + length
        if order == list(in_order):  # the usual case
            return bytes(self._index), bytes(self._hashes)
        hashes = bytes(self._hashes)
        return (
            b"".join(format.ENTRY.pack(*entries[number]) for number in order),
            b"".join(hashes[number * format.HASH : (number + 1) * format.HASH] for number in order),
        )

    # -- the end -------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Stop the threads, free what nothing refers to (packs not committed, a snapshot replaced), and unlock."""
        if not self._open:
            return
        self._open = False
        self._abandon()
        try:
            self._workers.shutdown(cancel_futures=True)
            self._packer.shutdown(cancel_futures=True)
            with contextlib.suppress(StoreError):  # on a full disk, say: the next writer tries again
                garbage.collect(self._environment)
        finally:
            self._lock.close()


def check_new(environment: Environment, name: str, *, replace: bool) -> None:
    """Raises BadSnapshotName, StoreReadOnly, SnapshotExists."""
    key = format.NAMES + format.check_name(name)
    environment.check_writable()
    if not replace:
        with environment.read() as txn:
            if txn.get(key) is not None:
                raise _exists(environment, name)


def _exists(environment: Environment, name: str) -> SnapshotExists:
    advice = "choose another name, or replace it (--replace, replace=True)"
    return SnapshotExists(f"snapshot {name}", "create", f"exists in {environment.directory}", advice)


def _batches(runs: Sequence[Run], chunk_size: int, apart: Sequence[int]) -> Iterator[list[Span]]:
    """Chunks to be, in groups of up to BATCH bytes of image."""
    batch: list[Span] = []
    for span in cut(runs, chunk_size, apart):
        batch.append(span)
        if len(batch) * chunk_size >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
