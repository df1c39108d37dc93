"""A pool of parked clones: restored ahead of time, stopped before their first instruction, handed out by one signal.

Facts. A clone costs milliseconds to restore and microseconds to continue. A process gets its parent-death signal when
the *thread* that made it ends; an init of a PID namespace gets even that one if it is SIGKILL, and takes everything in
its namespace along (pid_namespaces(7)).

Choice. Background threads that live as long as the pool restore all clones, so all of them are killed by the kernel
when this process ends, in whatever way. Three, since half of a restore is waiting for the new process and the pager.
Another thread, the attendant, waits for the end of all of them (an epoll of their pidfds): it collects them, so that
giving back waits for nothing, and takes the place of one that ended while it was parked away, so that another is
restored. Who takes a clone gets it from a queue, and waits at a place in another one if there is none (place.py).
An interrupt (Ctrl-C) that comes in a call leaves no lock held, and at worst a clone that serves nobody until the pool
is closed: the lock is taken itself, not through its conditions, and all that live are known by their descriptors.

A clone that was just handed out is about to answer. A restore beside it takes the CPU and Python's global lock that it
and its caller need: with two CPUs it doubles the time to the first response. So its place stays empty for HOLD_SECONDS,
unless it is given back earlier, or somebody waits. Taking one wakes no thread of ours, either: a timerfd, which the
attendant waits for, too, tells when the place is due.

Cost. Restoring takes Python's global lock for about half of its time: a busy pool slows down its own process. A pool
that is emptied within HOLD_SECONDS begins to refill by so much later.
"""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lazyrestore.errors import PoolClosed
from lazyrestore.fleet.place import Place
from lazyrestore.kernel import libc

if TYPE_CHECKING:
    import socket

    from lazyrestore.fleet.process import Parked
    from lazyrestore.fleet.sockets import Address

FILLERS = 3  # threads that restore
HOLD_SECONDS = 0.005  # about what one restore takes: nobody comes much later to a clone than without it
RETRY_SECONDS = 1.0  # after a restore that failed, unless somebody asks earlier


@dataclass(frozen=True, slots=True)
class Limits:
    """When a clone is retired: after so many requests (hand-outs), seconds since the first one, bytes it wrote.

    None: no limit. They are looked at when a clone is given back; who uses one is never interrupted.
    """

    requests: int | None = 1
    seconds: float | None = None
    bytes_written: int | None = None

    def __post_init__(self) -> None:
        if self.requests is not None and self.requests < 1:
            raise ValueError("a clone serves at least one request")
        if (self.seconds or 0) < 0 or (self.bytes_written or 0) < 0:
            raise ValueError("a limit on time or memory is not negative")


@dataclass(frozen=True, slots=True)
class PoolStats:
    """parked, idle (given back, to be used again), taken: clones as of now; started, retired: sums.

    died: those that ended while they were parked or idle, which are in no other figure but `started`.
    """

    parked: int
    idle: int
    taken: int
    started: int
    retired: int
    died: int


class Clone:
    """A copy that was handed out; as a context manager it goes back to its pool, or is ended after an exception."""

    def __init__(self, process: Parked, addresses: dict[int, Address]) -> None:
        self.process = process
        self.addresses = addresses
        self.requests = 0
        self.first_used = 0.0  # time.monotonic()
        self._pool: Pool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.give_back(reuse=kind is None)

    def __repr__(self) -> str:
        return f"<Clone pid={self.pid} requests={self.requests}>"

    @property
    def pid(self) -> int:
        """As the caller sees it."""
        return self.process.pid

    def connect(self, number: int | None = None, *, timeout: float | None = None) -> socket.socket:
        """A connection to its listening socket with descriptor `number`, by default the lowest. OSError, KeyError."""
        if not self.addresses:
            raise KeyError("it has no listening socket of its own")
        return self.addresses[min(self.addresses) if number is None else number].connect(timeout)

    def give_back(self, *, reuse: bool = True) -> None:
        """Back to the pool, which ends it unless it may serve again. `reuse`: False if it is not fit for that."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._take_back(self, reuse)


class Pool:
    """Keeps `size` clones parked and hands them out. Thread-safe; close() it, or use it as a context manager."""

    def __init__(
        self, start: Callable[[], Clone], size: int, limits: Limits, learn: Callable[[Clone], None] | None = None
    ) -> None:
        """`start` restores a parked clone; it is called by threads that live as long as the pool. `learn` is told of
        the first one that is given back, while it still runs."""
        if size < 1:
            raise ValueError("a pool has at least one clone")
        self._start, self._size, self._limits = start, size, limits
        self._learn = learn
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # for who waits until it is full, or to try again
        self._due = threading.Condition(self._lock)  # for the fillers: there is, or may be, a clone to be restored
        self._parked: deque[Clone] = deque()
        self._idle: list[Clone] = []
        self._taken: set[Clone] = set()
        self._held: deque[float] = deque()  # until when (time.monotonic()) a place stays empty; sorted
        self._waiting: deque[Place[Clone]] = deque()
        self._closing = threading.Event()
        self._started = self._retired = self._died = 0
        self._starting = 0
        self._alive: dict[int, Clone] = {}  # by their descriptors
        self._epoll = select.epoll()
        self._timer = libc.timerfd_create()  # when the first place in _held is due
        self._epoll.register(self._timer, select.EPOLLIN)
        self._threads = [
            threading.Thread(target=self._fill, name="lazyrestore-pool", daemon=True) for _ in range(FILLERS)
        ]
        self._attendant = threading.Thread(target=self._attend, name="lazyrestore-pool-attendant", daemon=True)
        _pools.add(self)
        for thread in (*self._threads, self._attendant):
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Pool of {self._size}: {self.stats()}>"

    def take(self, timeout: float | None = None) -> Clone:
        """A running clone: at once if one is parked, else when the next one is ready.

        Raises TimeoutError after `timeout` seconds, PoolClosed, and what restoring raises.
        """
        place: Place[Clone] = Place()
        try:
            self._request(place)
            if not place.answered:
                place.wait(timeout)
            if not place.answered and self._leave(place):
                raise TimeoutError("no clone became ready")
            return place.answer()
        except BaseException:  # KeyboardInterrupt, or what restoring raised
            self._abandon(place)
            raise

    async def take_async(self) -> Clone:
        """A running clone, as take() gives it; the event loop is not held up. A cancelled wait takes none."""
        place: Place[Clone] = Place()
        arrived = place.in_loop()
        try:
            self._request(place)
            if not place.answered:
                await arrived
            return place.answer()
        except BaseException:
            self._abandon(place)
            raise

    def wait_until_full(self, timeout: float | None = None) -> bool:
        """Wait until all clones are parked; False if they are not within `timeout` seconds."""
        with self._lock:
            return self._changed.wait_for(lambda: self._closing.is_set() or len(self._parked) >= self._size, timeout)

    def stats(self) -> PoolStats:
        with self._lock:
            counts = len(self._parked), len(self._idle), len(self._taken)
            return PoolStats(*counts, self._started, self._retired, self._died)

    def close(self) -> None:
        """End all clones, those that are handed out too, and wait for their end."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            while self._waiting:
                self._waiting.popleft().give(_closed())
            for clone in (*self._parked, *self._idle, *self._taken):
                self._retire(clone)
            self._parked.clear()
            self._idle.clear()
            self._taken.clear()
            for clone in self._alive.values():  # one that an interrupt has dropped, too
                clone.process.kill()
            self._changed.notify_all()
            self._due.notify_all()
        for thread in self._threads:
            thread.join()
        libc.timerfd_set(self._timer, 0.0)
        self._attendant.join()
        for clone in self._alive.values():
            clone.process.wait()
        self._alive.clear()
        self._epoll.close()
        os.close(self._timer)

    def _leave_to_parent(self) -> None:
        """In a forked child, which has neither the threads nor the clones: closed."""
        if not self._closing.is_set():  # else they are closed, or about to be
            self._epoll.close()
            os.close(self._timer)
        self._lock, self._closing = threading.RLock(), threading.Event()
        self._changed = threading.Condition(self._lock)
        self._closing.set()
        self._alive.clear()
        self._parked.clear()
        self._idle.clear()
        self._taken.clear()
        self._waiting.clear()

    # -- handing out and taking back -----------------------------------------------------------------------------------

    def _request(self, place: Place[Clone]) -> None:
        """A clone for it, at once or when one is there."""
        with self._lock:
            if self._closing.is_set():
                raise _closed()
            clone = self._next()
            if clone is not None:
                place.give(clone)
                return
            self._waiting.append(place)
            self._due.notify()
            self._changed.notify_all()

    def _leave(self, place: Place[Clone]) -> bool:
        """Wait no more; False if it has its answer, or never waited."""
        with self._lock, suppress(ValueError):
            self._waiting.remove(place)
            return True
        return False

    def _abandon(self, place: Place[Clone]) -> None:
        """Nobody waits there any more; a clone that came all the same has served nobody, but it runs."""
        if not self._leave(place) and (clone := place.found()) is not None:
            clone.give_back(reuse=False)

    def _next(self) -> Clone | None:
        """A used clone that may serve again, else a parked one; handed out."""
        while self._idle or self._parked:
            was_parked = not self._idle
            clone = self._parked.popleft() if was_parked else self._idle.pop()
            if clone.process.poll() is not None:
                self._died += 1
                self._due.notify()
            elif self._is_too_old(clone):
                self._retire(clone)
            else:
                self._hand_out(clone)
                if was_parked:
                    self._hold()
                return clone
        return None

    def _hold(self) -> None:
        """Keep the place of a parked clone empty for a while."""
        self._held.append(time.monotonic() + HOLD_SECONDS)
        if len(self._held) == 1:
            libc.timerfd_set(self._timer, HOLD_SECONDS)

    def _hand_out(self, clone: Clone) -> None:
        if clone.requests == 0:
            clone.first_used = time.monotonic()
            clone.process.resume()
        clone.requests += 1
        clone._pool = self
        self._taken.add(clone)

    def _offer(self, clone: Clone) -> bool:
        """Hand the clone to who has waited longest; False if nobody waits."""
        if not self._waiting:
            return False
        self._hand_out(clone)
        self._waiting.popleft().give(clone)
        return True

    def _take_back(self, clone: Clone, reuse: bool) -> None:
        if reuse and (learn := self._learn):
            self._learn = None
            learn(clone)
        reuse = reuse and self._may_serve_again(clone)
        with self._lock:
            if clone not in self._taken:  # the pool was closed meanwhile
                return
            self._taken.remove(clone)
            if self._held:  # it has answered: if not the one whose place this is, then one like it
                self._held.popleft()
                self._due.notify()
            if not reuse:
                self._retire(clone)
            elif not self._offer(clone):
                self._idle.append(clone)

    def _may_serve_again(self, clone: Clone) -> bool:
        limits = self._limits
        if limits.requests is not None and clone.requests >= limits.requests:
            return False
        if self._is_too_old(clone) or clone.process.poll() is not None:
            return False
        return limits.bytes_written is None or _bytes_written(clone.pid) <= limits.bytes_written

    def _is_too_old(self, clone: Clone) -> bool:
        seconds = self._limits.seconds
        return seconds is not None and clone.requests > 0 and time.monotonic() - clone.first_used >= seconds

    def _retire(self, clone: Clone) -> None:
        self._retired += 1
        clone._pool = None
        clone.process.kill()

    # -- the threads ---------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        while True:
            with self._lock:
                while not self._closing.is_set() and self._wanted() <= self._starting:
                    self._due.wait()
                if self._closing.is_set():
                    return
                self._starting += 1
                if self._wanted() > self._starting:
                    self._due.notify()
            try:
                clone = self._start()
            except Exception as error:
                self._fail(error)
                continue
            with self._lock:
                self._starting -= 1
                self._started += 1
                self._watch(clone)
                if self._closing.is_set():
                    self._retire(clone)
                elif clone.process.poll() is not None:
                    self._died += 1
                elif not self._offer(clone):
                    self._parked.append(clone)
                    self._changed.notify_all()

    def _wanted(self) -> int:
        """How many clones are to be restored by now."""
        while self._held and self._held[0] <= time.monotonic():
            self._held.popleft()
        return len(self._waiting) + self._size - len(self._parked) - len(self._held)

    def _fail(self, error: Exception) -> None:
        """Tell the error to all who wait; with nobody waiting, the next one causes another try."""
        with self._lock:
            self._starting -= 1
            while self._waiting:
                self._waiting.popleft().give(error)
            self._changed.wait_for(lambda: self._closing.is_set() or self._waiting, RETRY_SECONDS)

    def _watch(self, clone: Clone) -> None:
        """Let the attendant hear of its end. Edge-triggered: one that a debugger holds in its end is told of twice."""
        number = clone.process.fileno()
        self._alive[number] = clone
        self._epoll.register(number, select.EPOLLIN | select.EPOLLET)

    def _attend(self) -> None:
        """Collect clones that have ended, and tell the fillers of places that are due, until the pool is closed."""
        while not self._closing.is_set():
            for number, _ in self._epoll.poll():
                if number == self._timer:
                    self._look_at_held()
                else:
                    self._collect(number)

    def _look_at_held(self) -> None:
        with self._lock:
            with suppress(BlockingIOError):  # it was set anew meanwhile
                os.read(self._timer, 8)
            due = self._wanted() - self._starting
            if due > 0:
                self._due.notify(due)
            if self._held:
                libc.timerfd_set(self._timer, self._held[0] - time.monotonic())

    def _collect(self, number: int) -> None:
        with self._lock:
            clone = self._alive.get(number)
        if clone is None or clone.process.poll() is None:
            return  # somebody else has collected that one; the number may be another's by now
        with self._lock:
            if self._alive.get(number) is clone:
                del self._alive[number]
            for places in (self._parked, self._idle):
                with suppress(ValueError):
                    places.remove(clone)
                    self._died += 1
                    self._due.notify()


def _leave_to_parents() -> None:
    for pool in list(_pools):
        pool._leave_to_parent()


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
os.register_at_fork(after_in_child=_leave_to_parents)


def _closed() -> PoolClosed:
    return PoolClosed("pool", "take", "it was closed, or is that of the process that forked this one")


def _bytes_written(pid: int) -> int:
    """Bytes of memory that are a process's alone because it wrote to them; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) << 10
    return 0
