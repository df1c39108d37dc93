"""A restored process in the hands of a caller."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from lazyrestore.errors import PagerError

if TYPE_CHECKING:
    from lazyrestore.pager.client import PagerStats
    from lazyrestore.restore import Started


class RestoredProcess:
    """A restored process, with the interface of subprocess.Popen.

    restore_ms is the time from the call to the running process; phases tells where it went, in ms.
    """

    def __init__(self, name: str, key: str, started: Started) -> None:
        self.name = name
        self._key = key
        self.pid = started.child.pid
        self.restore_ms = started.restore_ms
        self.phases = started.phases
        self.returncode: int | None = None
        self._pidfd = -1
        self._namespace = started.init
        self._lock = threading.Lock()
        self._pidfd, started.child.pidfd = started.child.pidfd, -1  # last: until here, whoever drops `started` ends it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the process to end, as Popen does."""
        self.wait()

    def __del__(self) -> None:
        self._close_pidfd()

    def __repr__(self) -> str:
        return f"<RestoredProcess {self.name!r} pid={self.pid} returncode={self.returncode}>"

    def poll(self) -> int | None:
        """The exit status, None while it runs; -N if signal N ended it."""
        with self._lock:
            if self.returncode is None:
                self._collect(os.WNOHANG)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; returns the exit status. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self.poll() is None:
            import select

            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if not poller.poll(None if timeout is None else max(0, int(timeout * 1000))):
                import subprocess

                raise subprocess.TimeoutExpired(["lazyrestore", self.name], timeout or 0.0)
            with self._lock:
                if self.returncode is None:
                    self._collect(0)  # only this or another wait() ends it
        assert self.returncode is not None
        return self.returncode

    def fileno(self) -> int:
        """A descriptor (a pidfd) that is readable once it has ended, for poll() and event loops; -1 when its end was
        collected by poll() or wait(), which close it."""
        return self._pidfd

    def send_signal(self, number: int) -> None:
        """Send a signal; does nothing if the process has ended."""
        if self.poll() is None:
            with self._lock:
                if self._pidfd >= 0:
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(self._pidfd, number)

    def resume(self) -> None:
        """Let a parked process run; one that was not parked does not notice, unless it is stopped."""
        with self._lock:
            if self._pidfd >= 0:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    def let_go(self) -> None:
        """Let one that was restored `held` live on when the thread ends that restored it, which is to call this."""
        if self._namespace is not None and self.poll() is None:
            self._namespace.watch()

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def stats(self) -> PagerStats:
        """The counts of this snapshot's pager: chunks filled, faults by kind, service times, per address space.

        Raises PagerError if the pager is gone, as it is some time after the last process has ended.
        """
        from lazyrestore.pager.launch import stats_of

        stats = stats_of(self._key, self.name)
        if stats is None:
            raise PagerError(f"pager of {self.name}", "stats", "there is none: no process of this snapshot runs")
        return stats

    def _collect(self, flags: int) -> None:
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | flags)
        except ChildProcessError:
            self.returncode = 0  # somebody else collected it, as with Popen
        else:
            if result is None:
                return
            self.returncode = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        self._close_pidfd()
        if self._namespace is not None:
            self._namespace.collect()

    def _close_pidfd(self) -> None:
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)
