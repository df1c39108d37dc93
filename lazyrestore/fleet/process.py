"""What a fleet asks of a restored process."""

from __future__ import annotations

from typing import Protocol


class Process(Protocol):
    """A restored process that is a child of ours; `RestoredProcess` is one."""

    pid: int
    """As the caller sees it."""

    def poll(self) -> int | None:
        """The exit status, None while it runs."""

    def kill(self) -> None:
        """End it, now; it is still to be waited for."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and collect it."""

    def fileno(self) -> int:
        """A descriptor that is readable once it has ended; -1 when it was collected."""


class Held(Process, Protocol):
    """One that may end with the thread that restored it."""

    def let_go(self) -> None:
        """Called by that thread: it lives on."""


class Parked(Process, Protocol):
    """One that is stopped before its first instruction."""

    def resume(self) -> None:
        """Let it run."""
