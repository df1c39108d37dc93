"""The plan of the usual restore, stored beside the manifest that it was made of: derived data, used if it is what would
be made of it here and now, else passed over without a word.

Facts. A plan depends on the manifest; on the code that makes it; on what a new process inherits from the restorer
(scheduling, credentials), since a program sets only what differs; and on the restorer's limit of descriptors, if
that is low. Making it takes 2 to 3 ms of Python, and the import of some thirty modules. What may change from one moment
to the next (files, addresses, the host) is not part of it: that is checked at every restore.

Choice. It carries a checksum of itself, one of the manifest, those settings, and which code made it: a digest of the
package's files. To compute that takes 1 ms, so their sizes and times of change are kept too: where these are the same,
so are the files. Both are taken when this module is imported, together with the code that uses plans, so a process that
outlives an upgrade of the package does not take the new code's plans for its own.

Cost. 50 to 100 KB per snapshot. A package without its sources stores nothing and uses nothing.
"""

# Without `from __future__ import annotations`: msgspec would compile each annotation again to read it.

import os
import struct
import zlib
from functools import cache
from typing import TYPE_CHECKING

import msgspec

from lazyrestore.errors import RestoreError
from lazyrestore.restore_plan import RestorePlan

if TYPE_CHECKING:
    from lazyrestore.manifest import Manifest

_HEAD = struct.Struct("<4sI")  # magic, CRC-32 of what follows: a Stored
_MAGIC = b"LRP1"
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_FOLDERS = ("", "kernel", "pager", "resources", "_native")  # whose code makes plans, or carries them out
_LOW = 4096  # descriptors: with a hard limit from here on, the layout does not depend on it
_CREDENTIALS = ((b"\nUid:", b"\nGid:"), (b"\nGroups:",) * 2, (b"\nCapInh:", b"\nNoNewPrivs:"))  # first, last lines


class Settings(msgspec.Struct, frozen=True, array_like=True):
    """What a new process gets from the calling thread, as far as a plan depends on it."""

    scheduler: int
    nice: int
    descriptor_limit: int  # the hard one; -1: high enough
    credentials: bytes  # lines of /proc/thread-self/status


class _Stored(msgspec.Struct, frozen=True, array_like=True):
    files: bytes  # _files_digest()
    code: bytes  # _code_digest()
    manifest: int  # its CRC-32
    settings: Settings
    plan: RestorePlan


_encoder = msgspec.msgpack.Encoder()


@cache
def _decoder() -> msgspec.msgpack.Decoder[_Stored]:
    return msgspec.msgpack.Decoder(_Stored)


def _credentials() -> bytes:
    """The calling thread's, as a key: a thread may have others than its process (credentials(7))."""
    with open("/proc/thread-self/status", "rb", buffering=0) as file:
        status = file.readall() or b""
    return b"".join(
        status[status.find(first) : status.find(b"\n", status.find(last) + 1)] for first, last in _CREDENTIALS
    )


def settings() -> Settings:
    """Those of the calling thread now. They are looked at for each restore, which takes 20 us: whoever changes its user
    or gives up a capability between two of them would hand that on."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Settings(
        os.sched_getscheduler(0),
        os.getpriority(os.PRIO_PROCESS, 0),
        hard if 0 <= hard < _LOW else -1,
        _credentials(),
    )


def made_of(manifest: "Manifest", encoded: bytes) -> bytes:
    """What is to be stored beside a manifest, which is `encoded` there: the plan of a restore as it was by the calling
    process. Nothing if there is none, or it could not be told later which code made it."""
    from lazyrestore.restore_program import make_plan

    if _files is None:
        return b""
    try:
        plan = make_plan(manifest)
    except RestoreError:  # the restore will say so
        return b""
    if not plan.reusable:
        return b""
    now = settings()
    packed = _encoder.encode(_Stored(_digest(_files), _code_digest(), zlib.crc32(encoded), now, plan))
    return _HEAD.pack(_MAGIC, zlib.crc32(packed)) + packed


def usable(data: bytes, manifest_sum: int) -> tuple[Settings, RestorePlan] | None:
    """The stored plan, if it is what the calling process would make now of the (encoded) manifest with that CRC-32,
    with its settings as they are now."""
    if len(data) < _HEAD.size or _files is None:
        return None
    magic, crc = _HEAD.unpack_from(data)
    packed = memoryview(data)[_HEAD.size :]
    if magic != _MAGIC or zlib.crc32(packed) != crc:
        return None
    try:
        stored = _decoder().decode(packed)
    except msgspec.MsgspecError:  # another version's
        return None
    now = settings()
    if stored.manifest != manifest_sum or stored.settings != now:
        return None
    if stored.files != _digest(_files) and stored.code != _code_digest():
        return None
    return now, stored.plan


def _code_files() -> tuple[tuple[str, int, int], ...] | None:
    """(path below the package, bytes, mtime in ns) of the files of code, sorted; None if there are no sources."""
    found = []
    for folder in _FOLDERS:
        try:
            entries = os.scandir(os.path.join(_PACKAGE, folder))
        except OSError:
            return None
        with entries:
            for entry in entries:
                if entry.name.endswith((".py", ".so")):
                    status = entry.stat()
                    found.append((os.path.join(folder, entry.name), status.st_size, status.st_mtime_ns))
    sources = {path for path, _, _ in found}
    return tuple(sorted(found)) if {"restore_program.py", "resources/vma.py"} <= sources else None


def _digest(files: tuple[tuple[str, int, int], ...]) -> bytes:
    from _blake2 import blake2b  # hashlib's own, without OpenSSL, which takes 3 ms to load

    return blake2b(repr((_PACKAGE, files)).encode(), digest_size=16).digest()


@cache
def _code_digest() -> bytes:
    """Of the contents of the files of code; random if they are not those that this module was imported with."""
    from _blake2 import blake2b

    digest = blake2b(digest_size=16)
    for path, size, _ in _files or ():
        with open(os.path.join(_PACKAGE, path), "rb", buffering=0) as file:
            content = file.readall() or b""
        digest.update(b"%s %d\0" % (os.fsencode(path), size))
        digest.update(content)
    return digest.digest() if _code_files() == _files else os.urandom(16)


_files = _code_files()
