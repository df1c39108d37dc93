"""The manifest: everything a snapshot says of a process but the contents of its memory.

Encoded as MessagePack by msgspec, which checks every type when decoding. `version` counts incompatible changes.
"""

from __future__ import annotations

import msgspec

from lazyrestore.errors import ChunkInvalid, StoreVersionError
from lazyrestore.resources.attributes import Attributes
from lazyrestore.resources.descriptors import FdTable
from lazyrestore.resources.signals import Signals
from lazyrestore.resources.threads import Thread
from lazyrestore.resources.vma import FileIdentity, SharedObject, Vma

VERSION = 1


class Host(msgspec.Struct, frozen=True):
    """What the process relied on.

    The kernel's release (for people), the vdso's layout and contents, CPU features and XSAVE components.
    """

    kernel: str
    machine: str
    vdso: list[tuple[str, int, int]]  # name, start, length, in address order
    vdso_hash: str
    cpu_model: str
    cpu_flags: list[str]
    xfeatures: int


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
    pages: int  # with content, of 4096 bytes
    raw_bytes: int
    pause_ms: float


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Manifest)


class _Version(msgspec.Struct):
    version: int


def encode(manifest: Manifest) -> bytes:
    return _encoder.encode(manifest)


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
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ChunkInvalid(f"snapshot {name}", "read manifest", str(error), "run lazyrestore verify") from error
