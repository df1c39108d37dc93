"""The library's public classes. Everything here may be called from any thread of a multi-threaded program.

A restored process is a child of the calling process. ptrace is used only inside a call, by the calling thread.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Self

from lazyrestore.errors import LazyrestoreError
from lazyrestore.restored_process import RestoredProcess

if TYPE_CHECKING:
    from lazyrestore.fleet.pool import Pool
    from lazyrestore.manifest import Manifest
    from lazyrestore.pager.client import PagerClient, PagerStats
    from lazyrestore.pager.launch import Connecting
    from lazyrestore.readiness import ReadySocket
    from lazyrestore.restore import Prepared, Started
    from lazyrestore.restore_options import Options
    from lazyrestore.restore_plan import RestorePlan
    from lazyrestore.store import ImageStore, Report, StoredImage, Summary
    from lazyrestore.stored_plan import Settings

Progress = Callable[[int, int], None]
_snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
LINGER_SECONDS = 2.0
LONGEST_LINGER = 86400.0


class Store:
    """A directory of snapshots. Open it with `Store.open`; use it as a context manager or call `close`."""

    def __init__(self, images: ImageStore) -> None:
        self._images = images

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = True) -> Self:
        """The store at `path`, made private (0700) if it does not exist. Raises StoreError's subclasses."""
        from lazyrestore.store import ImageStore

        return cls(ImageStore.open(path, create=create))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> str:
        """Its directory."""
        return self._images.path

    def __repr__(self) -> str:
        return f"<Store {self._images.path!r}>"

    def close(self) -> None:
        """Close the store; snapshots that are still used keep what they need."""
        self._images.close()

    def snapshot(
        self,
        pid: int,
        *,
        name: str,
        kill: bool = False,
        replace: bool = False,
        level: int = 1,
        progress: Progress | None = None,
        committing: Callable[[], None] | None = None,
    ) -> Snapshot:
        """Snapshot a running process.

        The process runs on, unless `kill`: then it is ended once the snapshot is safely stored. `replace` allows a name
        that exists. `level` is zstd's (1 to 19). `progress(done, total)` is called with bytes; `committing()` at the
        last moment before it is stored. Raises lazyrestore.errors; the process then runs on, the store is unchanged.
        """
        from lazyrestore import snapshot

        taken = snapshot.take(
            self._images, pid, name, kill=kill, replace=replace, level=level, progress=progress, committing=committing
        )
        result = self.get(name)
        result.seconds = taken.seconds
        return result

    def get(self, name: str) -> Snapshot:
        """The snapshot of that name. Raises SnapshotNotFound, ChunkInvalid, StoreVersionError."""
        return Snapshot(self._images.open_image(name))

    def names(self) -> list[str]:
        """The names of all snapshots, sorted."""
        return [summary.name for summary in self._images.ls()]

    def ls(self) -> list[Summary]:
        """What there is: one record per snapshot."""
        return self._images.ls()

    def remove(self, name: str) -> None:
        """Remove a snapshot. Its memory is freed once no restored process needs it. Raises SnapshotNotFound."""
        self._images.rm(name)

    def verify(self, name: str | None = None) -> Report:
        """Check every chunk of one snapshot or of all: bounds, checksums, hashes."""
        return self._images.verify(name)


class Snapshot:
    """A stored process.

    Restoring it the first time compiles its program and starts or finds its pager; both are kept. linger: seconds, at
    most a day, for which a pager that is started from here stays, with what it has decompressed, when its last process
    and connection are gone.
    """

    def __init__(self, image: StoredImage) -> None:
        self._image = image
        self.name: str = image.name
        self.seconds: float = 0.0
        self.linger: float = LINGER_SECONDS
        self._manifest: Manifest | None = None
        self._stored: tuple[Settings, RestorePlan] | None = None
        if image.plan:
            from lazyrestore import stored_plan

            self._stored = stored_plan.usable(image.plan, image.manifest_sum)
        if self._stored is None:  # else it was made of this manifest, which is what it was then
            self._manifest = self.manifest
        self._prepared: dict[object, Prepared] = {}  # by how it shall listen
        self._pager: PagerClient | None = None
        self._lock = threading.Lock()
        _snapshots.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Snapshot {self.name!r} of process {self.pid} ({self.manifest.comm})>"

    @property
    def manifest(self) -> Manifest:
        """What it says of the process; decoded when it is first wanted."""
        if self._manifest is None:
            from lazyrestore import manifest

            self._manifest = manifest.decode(self._image.manifest, self.name)
        return self._manifest

    @manifest.setter
    def manifest(self, manifest: Manifest) -> None:
        self._manifest, self._stored = manifest, None

    @property
    def pause_ms(self) -> float:
        """How long the process was frozen, in ms."""
        return self.manifest.pause_ms

    @property
    def pid(self) -> int:
        """The process id that it had, and will have."""
        return self._stored[1].pid if self._stored else self.manifest.pid

    @property
    def pages(self) -> int:
        """Pages of 4096 bytes in the stored chunks."""
        return self.raw_bytes // 4096

    @property
    def id(self) -> int:
        """Its number in the store, never used twice."""
        return self._image.snapshot

    @property
    def raw_bytes(self) -> int:
        """Bytes of the stored chunks before compression: the memory with content, without what is zero."""
        return self._image.raw_bytes

    @property
    def stored_bytes(self) -> int:
        """Compressed bytes that this snapshot refers to, shared ones included."""
        return self._image.stored_bytes

    @property
    def chunks(self) -> int:
        return self._image.n_chunks

    @property
    def working_set(self) -> list[int]:
        """The chunks that the first restore touched first, in order: positions in the chunk index; empty if it is not
        recorded (yet)."""
        from lazyrestore.store import format

        return [chunk for chunk, _, _ in format.TOUCHED.iter_unpack(self._image.working_set)]

    @property
    def working_set_bytes(self) -> int:
        """Raw bytes of the pages that were touched."""
        from lazyrestore.store import working_sets

        return working_sets.raw_bytes(self._image)

    def _forget_pager(self) -> None:
        """In a forked child: the connection is its parent's too, and one would get the other's replies."""
        self._lock = threading.Lock()
        if self._pager is not None:
            self._pager.close()
            self._pager = None

    def close(self) -> None:
        """Let go of the image and of the connection to the pager; restored processes are not affected."""
        with self._lock:
            if self._pager is not None:
                self._pager.close()
                self._pager = None
            self._prepared.clear()
            self._image.close()

    def explain(
        self,
        *,
        new_pid: bool = False,
        new_net: bool = False,
        listen: Mapping[int, int] | None = None,
        reuseport: bool = False,
        inherit_fd: Mapping[int, int] | None = None,
    ) -> list[str]:
        """The restore program, one line per system call; nothing is run. Parameters as with restore()."""
        from lazyrestore import restore
        from lazyrestore.restore_options import Options

        options = Options(new_pid, new_net, tuple(sorted((inherit_fd or {}).items())))
        return restore.explain(self._prepare(listen or {}, reuseport), options)

    def end_recording(self) -> int:
        """End the recording of the working set now; returns its number of chunks, 0 if nothing was recorded.

        A recording ends by itself when its process has touched 1 MiB and nothing new for a second, is snapshotted, or
        ends. Raises PagerError.
        """
        from lazyrestore.store import format

        return len(self._connect().working_set(end=True)) // format.TOUCHED.size

    def listen_for_ready(self, *, new_pid: bool = False) -> ReadySocket:
        """Listen at the NOTIFY_SOCKET that the process was started with, for a restore() with the same `new_pid`.

        With `new_pid` also where somebody else listens, say systemd. Raises RestoreError.
        """
        from lazyrestore.readiness import ReadySocket

        return ReadySocket(self.name, self.manifest, self._image, own_mounts=new_pid)

    def restore(
        self,
        *,
        new_pid: bool = False,
        new_net: bool = False,
        listen: Mapping[int, int] | None = None,
        reuseport: bool = False,
        inherit_fd: Mapping[int, int] | None = None,
        streams: Sequence[int] = (0, 1, 2),
        record: bool | None = None,
        fill: str = "none",
        ready: ReadySocket | None = None,
        ends_with_caller: bool = False,
        held: bool = False,
    ) -> RestoredProcess:
        """Start a copy of the process under its old process id, as a child of this process.

        `new_pid`: in a fresh PID namespace, where the old id is free; the `pid` of the result is then the one that the
        caller sees. `new_net`: in a network namespace of its own, with nothing but a loopback interface. `listen`: TCP
        ports on which it listened → those on which the copy shall. `reuseport`: it shares its TCP ports with all that
        do the same (SO_REUSEPORT). `inherit_fd`: descriptors of its listening sockets → descriptors of ours that take
        their place; ours stay open, and get the flags (O_NONBLOCK) that the old ones had. `streams` are descriptors for
        its standard streams, used where these were terminals or pipes to other processes; -1 stands for /dev/null.
        `record`: the working set, True: even if one is known, which is extended; None: if none is known. `fill`: bring
        all of its private memory and not just what it touches, "now", or when the CPUs are "idle". `ready`: where it
        will say READY=1. `ends_with_caller`: with `new_pid`, it is killed when the calling thread ends, as by SIGKILL.
        `held`: so it is, but only until that thread calls its let_go(). Raises ValueError, and RestoreError's
        subclasses; nothing is left of the new process then.
        """
        from lazyrestore.restore_options import Options

        if inherit_fd:
            self._check_given(inherit_fd)
        inherited = tuple(sorted((inherit_fd or {}).items()))
        mounts = ready.mounts if ready else ()
        options = Options(
            new_pid,
            new_net,
            inherited,
            ends_with_caller=ends_with_caller,
            held=held,
            record=record,
            fill=fill,
            mounts=mounts,
        )
        return self._restore(options, streams, listen or {}, reuseport)

    def _restore(
        self, options: Options, streams: Sequence[int], listen: Mapping[int, int], reuseport: bool
    ) -> RestoredProcess:
        began = time.perf_counter()
        from lazyrestore.kernel.cpu_latency import awake
        from lazyrestore.pager.client import PagerGone

        started = None
        try:
            with awake():
                try:
                    started = self._start(options, streams, listen, reuseport)
                except PagerGone:
                    # It exited for want of work, or was killed, just as we came; a connected one stays. Its
                    # descriptors are closed when the last restore that still uses them lets go of it.
                    with self._lock:
                        self._pager = None
                    started = self._start(options, streams, listen, reuseport)
            restore_ms = (time.perf_counter() - began) * 1e3
            started.phases = {"prepare": restore_ms - started.restore_ms, **started.phases}
            started.restore_ms = restore_ms
            return RestoredProcess(self.name, self._image.key, started)
        except BaseException:
            if started is not None:  # an interrupt, at the last moment
                started.child.end()
            raise

    def clones(
        self,
        count: int,
        *,
        new_net: bool = False,
        listen: Mapping[int, int] | None = None,
        reuseport: bool = False,
        inherit_fd: Mapping[int, int] | None = None,
        streams: Sequence[int] = (0, 1, 2),
        record: bool | None = None,
        fill: str = "none",
        held: bool = False,
    ) -> list[RestoredProcess]:
        """Start `count` copies, each in a PID namespace of its own: all of them, or none, even if the caller is killed.

        What listens needs `new_net`, `reuseport` or `inherit_fd`, since only one can have an address for itself.
        Parameters and errors as with restore().
        """
        from lazyrestore.fleet import clones

        return clones.start(
            lambda: self.restore(
                new_pid=True,
                new_net=new_net,
                listen=listen,
                reuseport=reuseport,
                inherit_fd=inherit_fd,
                streams=streams,
                record=record,
                fill=fill,
                held=True,
            ),
            count,
            held=held,
        )

    def pool(
        self,
        size: int,
        *,
        max_requests: int | None = 1,
        max_seconds: float | None = None,
        max_bytes: int | None = None,
        new_net: bool = False,
        reuseport: bool = False,
        inherit_fd: Mapping[int, int] | None = None,
        streams: Sequence[int] = (0, 1, 2),
    ) -> Pool:
        """A pool that keeps `size` clones parked: restored, but stopped before their first instruction.

        Each of its clones gets listening sockets of its own in place of the process's (`clone.connect()`), but for
        those in `inherit_fd`, and for all with `new_net` or `reuseport`. A clone that is given back is ended after
        `max_requests` hand-outs, `max_seconds` since the first one, or when it wrote to more than `max_bytes` of
        memory; None: no limit. All clones end with the pool. The snapshot must stay open as long. Raises
        ValueError, and RestoreError if a clone would notice that it was parked.
        """
        from lazyrestore import restore
        from lazyrestore.fleet import parking, sockets
        from lazyrestore.fleet.pool import Clone, Limits, Pool
        from lazyrestore.restore_options import Options

        parking.check(self.name, self.manifest)
        given = dict(inherit_fd or {})
        if given:
            self._check_given(given)

        def start() -> Clone:
            with ExitStack() as owned:
                made = {}
                if not new_net and not reuseport:
                    made = sockets.make(self.manifest.descriptors, given, owned)
                inherited = {**given, **{number: listening.fileno() for number, listening in made.items()}}
                options = Options(True, new_net, tuple(sorted(inherited.items())), parked=True, ends_with_caller=True)
                process = self._restore(options, streams, {}, reuseport)
                return Clone(process, {number: sockets.address_of(listening) for number, listening in made.items()})

        def learn(clone: Clone) -> None:
            restore.learn(self._prepare({}, reuseport), clone.pid)

        return Pool(start, size, Limits(max_requests, max_seconds, max_bytes), learn)

    def pager_stats(self) -> PagerStats | None:
        """What the pager of this snapshot counted, None if there is none."""
        from lazyrestore.pager.launch import stats_of

        return stats_of(self._image.key, self.name)

    def _check_given(self, inherit_fd: Mapping[int, int]) -> None:
        from lazyrestore import restore

        restore.check_given(self.manifest, inherit_fd)

    def _prepare(self, listen: Mapping[int, int], reuseport: bool) -> Prepared:
        from lazyrestore import restore

        key = (tuple(sorted(listen.items())), reuseport)
        with self._lock:
            if key not in self._prepared:
                if listen or reuseport:
                    manifest = restore.listening_elsewhere(self.manifest, listen, reuseport)
                    self._prepared[key] = restore.prepare(self.name, self._image, lambda: manifest)
                else:
                    own = lambda: self.manifest  # noqa: E731
                    self._prepared[key] = restore.prepare(self.name, self._image, own, stored=self._stored)
            return self._prepared[key]

    def _start(self, options: Options, streams: Sequence[int], listen: Mapping[int, int], reuseport: bool) -> Started:
        """One attempt. A pager that has to be started starts while the rest is done."""
        from lazyrestore import restore

        pager = self._connect() if options.parked else None  # the restore must be this one's: what it has filled counts
        filled = pager.filled_working_set() if pager else b""
        with self._begin() if self._pager is None else nullcontext() as connecting:
            checked = restore.check(self._prepare(listen, reuseport), options, filled)

            def answered() -> PagerClient:
                if pager is None and connecting is not None:
                    return self._share(connecting.answered())
                return pager or self._connect()

            return restore.run(checked, answered, connecting.template if connecting else -1, streams)

    def _begin(self) -> Connecting:
        """Finds or starts the pager, without waiting for its answer. Raises PagerError."""
        from lazyrestore.pager import launch

        return launch.begin(self._image, linger_ms=int(min(max(0.0, self.linger), LONGEST_LINGER) * 1000))

    def _connect(self) -> PagerClient:
        if (pager := self._pager) is not None:
            return pager
        with self._begin() as connecting:
            return self._share(connecting.answered())

    def _share(self, pager: PagerClient) -> PagerClient:
        """The connection that all threads use: this one, or the one that another thread made meanwhile.

        Nobody waits for a pager with the lock held: one of those who wait for the lock may be the tracer of a new
        process that a killed pager's keeper ends, which the next pager waits for.
        """
        with self._lock:
            if self._pager is None:
                self._pager = pager
            else:
                pager.close()
            return self._pager


def _forget_pagers() -> None:
    for snapshot in list(_snapshots):
        snapshot._forget_pager()


os.register_at_fork(after_in_child=_forget_pagers)

__all__ = ["LazyrestoreError", "RestoredProcess", "Snapshot", "Store"]
