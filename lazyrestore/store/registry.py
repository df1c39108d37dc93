"""One Environment per store and process: shared, counted, and never used across a fork."""

from __future__ import annotations

import errno
import os
import stat
import threading

from lazyrestore.errors import NotAStore, StoreError
from lazyrestore.store import locks
from lazyrestore.store.environment import NAME_ANOTHER, Environment

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OWN_FILES = {"data.mdb", "lock.mdb", "writer.lock", "pins"}

_registry: dict[tuple[int, int], Environment] = {}  # by device and inode of the data file
_references: dict[Environment, int] = {}
_registry_lock = threading.RLock()
_inherited: list[Environment] = []  # kept for ever, see _after_fork


def _after_fork() -> None:
    """In a forked child, let go of the parent's environments. POSIX locks are not inherited, and LMDB clears only the
    reader slots of its own PID; but to close an environment ends its transactions, and a transaction that another
    thread of the parent had begun has its slot in shared memory. Such an environment stays open, and the child cannot
    use that store."""
    global _registry_lock
    _registry_lock = threading.RLock()
    for environment in _registry.values():
        if environment.busy:
            _inherited.append(environment)
        else:
            environment.close()
    _registry.clear()
    _references.clear()


os.register_at_fork(after_in_child=_after_fork)


def acquire(directory: str, *, create: bool) -> Environment:
    """The environment in `directory`, opened if this process has not; release() it when done.

    With `create`, a directory that is missing or empty becomes a store. One that is there keeps its mode: the files are
    private anyhow. Raises NotAStore, StoreVersionError, StoreReadOnly, StoreFull, ChunkInvalid (truncated), and
    StoreError if others may write to the directory.
    """
    with _registry_lock:
        fresh = _prepare(directory, create)
        data = os.path.join(directory, "data.mdb")
        if not fresh:
            status = os.stat(data)
            known = _registry.get((status.st_dev, status.st_ino))
            if known is not None:
                _references[known] += 1
                return known
        environment = Environment(directory, create=create)
        _registry[environment.identity] = environment
        _references[environment] = 1
        return environment


def _prepare(directory: str, create: bool) -> bool:
    """Whether there is no data file yet, only a directory to put it in. Raises NotAStore."""
    resource = f"store {directory}"
    try:
        if create and not os.path.lexists(directory):
            os.makedirs(directory, 0o700, exist_ok=True)
        files = set(os.listdir(directory))
    except FileNotFoundError as error:
        if create:
            reason = "a link to nothing" if os.path.islink(directory) else "no directory can be made there"
            raise NotAStore(resource, "open", reason, NAME_ANOTHER, errno=errno.ENOENT) from error
        advice = "no snapshot was taken into it yet (`lazyrestore snapshot` makes it), or another one is meant"
        raise NotAStore(resource, "open", "it does not exist", advice, errno=errno.ENOENT) from error
    except NotADirectoryError as error:
        raise NotAStore(resource, "open", "not a directory", NAME_ANOTHER, errno=errno.ENOTDIR) from error
    except PermissionError as error:
        raise locks.not_allowed(directory, directory, create=create) from error
    except OSError as error:
        raise locks.os_error(resource, "open", error) from error
    fresh = "data.mdb" not in files
    if fresh and (not create or files - OWN_FILES):
        reason = "a directory with other files in it" if files else "an empty directory"
        raise NotAStore(resource, "open", reason, NAME_ANOTHER)
    mode = os.stat(directory).st_mode
    if mode & OTHERS_WRITE:  # they could put another data.mdb there, and what is in it runs
        advice = f"take that right from them (chmod go-w {directory}), or name a directory in it, which is made private"
        raise StoreError(resource, "open", f"others may exchange its files (mode {mode & 0o7777:04o})", advice)
    return fresh


def release(environment: Environment) -> None:
    """Give back what acquire() gave; the last one closes the environment. Harmless in a forked child."""
    with _registry_lock:
        if environment not in _references:
            return
        _references[environment] -= 1
        if not _references[environment]:
            del _references[environment], _registry[environment.identity]
            environment.close()


def is_current(environment: Environment) -> bool:
    """Whether this process acquired it, and not the one that it was forked from."""
    return environment in _references
