"""Where one who waits for a clone gets it.

Facts. Ctrl-C raises KeyboardInterrupt in the main thread between any two steps of Python code, also within the methods
of threading.Condition, and so of concurrent.futures.Future, where they have taken a lock and not returned yet: then it
is never released. A lock's own `with`, acquire() and release() are steps that cannot be divided.

Choice. A lock that is released when the answer has been written down. What was written stays, wherever the interrupt
came, and can be given back.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Place(Generic[T]):
    """Of one who waits in a thread, or in an event loop. The caller sees to it that only one answer is given."""

    def __init__(self) -> None:
        self._answer: T | BaseException | None = None
        self._arrived = threading.Lock()
        self._arrived.acquire()
        self._notify: Callable[[], object] = self._arrived.release

    @property
    def answered(self) -> bool:
        return self._answer is not None

    def give(self, answer: T | BaseException) -> None:
        """An error is raised where the answer is taken."""
        self._answer = answer
        self._notify()

    def wait(self, timeout: float | None) -> None:
        """Until there is an answer, or `timeout` seconds have passed."""
        self._arrived.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX))

    def in_loop(self) -> asyncio.Future[None]:
        """What to await instead, in the loop that runs here; asked for before the place is known to others."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not arrived.done():
                arrived.set_result(None)

        def notify() -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(wake)

        self._notify = notify
        return arrived

    def answer(self) -> T:
        """Raises it if it is an error."""
        assert self._answer is not None
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer

    def found(self) -> T | None:
        """It, unless there is none, or it is an error."""
        return None if isinstance(self._answer, BaseException) else self._answer
