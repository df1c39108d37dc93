"""The manifest: everything a snapshot says of a process but the contents of its memory.

Encoded as MessagePack by msgspec, which checks every type when decoding. `version` counts incompatible changes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from lazyrestore.errors import ChunkInvalid, StoreVersionError
from lazyrestore.resources.attributes import Attributes
from lazyrestore.resources.descriptors import FdTable
from lazyrestore.resources.posix_timers import PosixTimer
from lazyrestore.resources.signals import Signals
from lazyrestore.resources.threads import Thread
from lazyrestore.resources.vma import FileIdentity, SharedObject, Vma
from lazyrestore.restore_plan import Host

VERSION = 2  # it has POSIX timers, which version 1 would lose
WITHOUT_POSIX_TIMERS = 1


class Manifest(msgspec.Struct, frozen=True):
    version: int
    pid: int
    comm: str
    created: float  # seconds since the epoch
    host: Host
    attributes: Attributes
    signals: Signals
    threads: list[Thread]  # the leader first
    vmas: list[Vma]
    files: list[FileIdentity]
    shared: list[SharedObject]
    descriptors: FdTable
    pause_ms: float
    posix_timers: list[PosixTimer] = []


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Manifest)


class _Version(msgspec.Struct):
    version: int


# Names that are not UTF-8 come as strings with surrogates (PEP 383), which MessagePack cannot hold. They are written
# with the last 128 characters of Unicode's private plane instead: byte 0x80 + n is U+10FF00 + 0x80 + n.
_ESCAPE = {0xDC00 + byte: 0x10FF00 + byte for byte in range(0x80, 0x100)}
_UNESCAPE = {escaped: surrogate for surrogate, escaped in _ESCAPE.items()}
_ESCAPED = (b"\xf4\x8f\xbe", b"\xf4\x8f\xbf")  # how these characters begin in UTF-8


def _translated(value: Any, table: dict[int, int]) -> Any:
    """`value`, made of built-in types, with every string in it translated."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {_translated(key, table): _translated(item, table) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_translated(item, table) for item in value]
    return value


def encode(manifest: Manifest) -> bytes:
    try:
        return _encoder.encode(manifest)
    except UnicodeEncodeError:
        plain = msgspec.to_builtins(manifest, builtin_types=(bytes,))
        return _encoder.encode(_translated(plain, _ESCAPE))


def decode(data: bytes | memoryview, name: str) -> Manifest:
    """The manifest; StoreVersionError if a newer lazyrestore wrote it, ChunkInvalid if it is damaged."""
    try:
        version = msgspec.msgpack.decode(data, type=_Version).version
        if version > VERSION:
            raise StoreVersionError(
                f"snapshot {name}",
                "open",
                f"its manifest has version {version}, this lazyrestore knows {VERSION}",
                "use a newer lazyrestore",
            )
        if any(mark in bytes(data) for mark in _ESCAPED):
            return msgspec.convert(_translated(msgspec.msgpack.decode(data), _UNESCAPE), Manifest, strict=False)
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ChunkInvalid(f"snapshot {name}", "read manifest", str(error), "see `lazyrestore verify`") from error
