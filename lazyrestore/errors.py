"""Every exception that lazyrestore raises on purpose, and the exit status each one has on the command line.

The message is one line, `resource: step: reason; advice`, built from the fields, so that a program can use the fields
and a person can use the line. One class per kind of cause; the classes say whose fault it is.
"""

from __future__ import annotations

import os

ESCAPED = {
    code: f"\\x{code:02x}" for code in (*range(32), 127)
}  # a path may have a newline, or a terminal's controls, in it


class LazyrestoreError(Exception):
    """Base of all errors raised on purpose.

    resource: what it happened to ("fd 7 (timerfd)", "store /x", "process 42"); step: what was being done
    ("timerfd_settime", "open"), "" if the resource says it all; reason: why it failed; advice: what the user can do;
    errno: the kernel's error number, None if no system call failed.
    """

    exit_status = 1

    def __init__(
        self, resource: str, step: str = "", reason: str = "", advice: str = "", *, errno: int | None = None
    ) -> None:
        self.resource = resource
        self.step = step
        self.errno = errno
        self.reason = reason or (os.strerror(errno) if errno is not None else "")
        self.advice = advice
        line = ": ".join(part for part in (resource, step, self.reason) if part)
        super().__init__((f"{line}; {advice}" if advice else line).translate(ESCAPED))


# -- the process to be snapshotted -------------------------------------------------------------------------------------


class NoSuchProcess(LazyrestoreError):
    exit_status = 10


class KernelThread(LazyrestoreError):
    exit_status = 11


class ZombieProcess(LazyrestoreError):
    exit_status = 12


class AlreadyTraced(LazyrestoreError):
    exit_status = 13


class WrongArchitecture(LazyrestoreError):
    """A 32-bit process, or one of another architecture."""

    exit_status = 14


class NotPermitted(LazyrestoreError):
    """The process belongs to somebody else, or a privilege is missing."""

    exit_status = 15


class OwnProcess(LazyrestoreError):
    """The caller asked for a snapshot of itself."""

    exit_status = 16


class UnsupportedResources(LazyrestoreError):
    """The process holds things that cannot be restored; `items` lists all of them, one line each."""

    exit_status = 17

    def __init__(self, resource: str, items: list[str]) -> None:
        self.items = items
        super().__init__(
            resource, "snapshot", "holds what cannot be restored: " + "; ".join(items), "end or close these first"
        )


class SnapshotFailed(LazyrestoreError):
    """The capture failed half way; the process runs on and the store is unchanged."""

    exit_status = 18


# -- the store ---------------------------------------------------------------------------------------------------------


class StoreError(LazyrestoreError):
    exit_status = 20


class NotAStore(StoreError):
    exit_status = 21


class StoreVersionError(StoreError):
    """The store was written by a newer lazyrestore."""

    exit_status = 22


class StoreReadOnly(StoreError):
    exit_status = 23


class StoreFull(StoreError):
    exit_status = 24


class StoreBusy(StoreError):
    """Another writer is at work in this store."""

    exit_status = 25


class SnapshotExists(StoreError):
    exit_status = 26


class SnapshotNotFound(StoreError):
    exit_status = 27


class BadSnapshotName(StoreError):
    exit_status = 28


class ChunkInvalid(StoreError):
    """Stored bytes are damaged: a checksum, a bound or a hash does not hold."""

    exit_status = 29


# -- restore -----------------------------------------------------------------------------------------------------------


class RestoreError(LazyrestoreError):
    """An operation of the restore program failed; nothing of the new process is left."""

    exit_status = 30


class FileChanged(RestoreError):
    """A mapped or open file changed or vanished since the snapshot."""

    exit_status = 31


class CpuMismatch(RestoreError):
    """This CPU lacks a feature that the snapshot used."""

    exit_status = 32


class KernelMismatch(RestoreError):
    """This kernel's vdso is not the one the snapshot was taken with."""

    exit_status = 33


class PidTaken(RestoreError):
    exit_status = 34


class PagerError(RestoreError):
    """The pager could not be started or refused the process."""

    exit_status = 35


class MissingFeature(LazyrestoreError):
    """The kernel or the caller's privileges lack something; `lazyrestore doctor` tells all."""

    exit_status = 36


class OutOfMemory(RestoreError):
    """Not enough memory or huge pages for the restore."""

    exit_status = 37


class PoolClosed(LazyrestoreError):
    """A clone was asked of a pool that is closed."""

    exit_status = 38
