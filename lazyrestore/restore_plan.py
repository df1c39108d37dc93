"""A plan: all that one kind of restore of a snapshot needs, ready to be used: its linked program, and what is checked,
handed over and written around it.

`restore_program` makes it of a manifest, with everything that knows resources; `restore` carries it out and knows only
this file. So with a plan that was stored beside its snapshot (`stored_plan`) a restore needs neither.
"""

# Without `from __future__ import annotations`: msgspec would compile each annotation again to read it.

import os
import struct

import msgspec

Signature = tuple[int, int, int, int, int]
"""What stat() says of a file: device, inode, size, mtime and ctime in ns. Who changes the file changes that."""


def signature_of(status: os.stat_result) -> Signature:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


SIGNATURE = struct.Struct("<QQqqq")  # struct lr_signature (_native/files.h)
UNKNOWN = bytes(SIGNATURE.size)  # no file's: there is no inode 0
OPEN_SHARE = 8  # of the limit of descriptors, one part of so many may be mapped files, open for a snapshot


class MappedFiles(msgspec.Struct, frozen=True):
    """The files that are mapped: their paths, each ended by NUL, and of each its Signature at the snapshot, packed.
    with_content: of some, the snapshot has the contents: should they be gone, they are made again."""

    count: int
    paths: bytes
    signatures: bytes
    with_content: bool


class Ahead(msgspec.Struct, frozen=True):
    """Pages, by (start, end), that a process gets before it is parked: its own copies of what it is about to write, and
    pages of mapped files (own_pages.py)."""

    own: tuple[tuple[int, int], ...] = ()
    of_files: tuple[tuple[int, int], ...] = ()


NOTHING = Ahead()


class Linked(msgspec.Struct, frozen=True):
    """A program laid out for one address: `image` is to be mapped at `base`."""

    base: int
    image: bytearray
    entry: int
    lists: list[int]
    stacks: list[int]  # the top of each list's stack
    op_addresses: list[int]
    data: int


class Layout(msgspec.Struct, frozen=True):
    """Numbers of the handed-over descriptors in the new process."""

    program: int
    template: int
    hugetlb: int
    shared: dict[int, int]
    streams: dict[int, int]
    inherited: dict[int, int]  # number of a listening socket → that of the caller's socket
    files: dict[int, int]  # number of a mapped file that is handed over open → its descriptor

    @property
    def end(self) -> int:
        others = (*self.shared.values(), *self.streams.values(), *self.inherited.values(), *self.files.values())
        return max(self.program, self.hugetlb, *others) + 1


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


class OpenedPath(msgspec.Struct, frozen=True):
    """What a path must lead to: a file of this type (S_IFMT), `least` bytes long. `link`: the path itself."""

    path: bytes
    type: int
    least: int = 0
    link: bool = False


class Address(msgspec.Struct, frozen=True):
    """An address that a socket will be bound to. host: an Internet socket's; options: (level, name, value) to be set
    before. file: a Unix socket's path; neither: its abstract name. title: of the socket, for messages."""

    title: str
    family: int
    kind: int
    protocol: int = 0
    host: tuple[str | int, ...] = ()
    options: tuple[tuple[int, int, bytes], ...] = ()
    file: bytes | None = None
    name: bytes = b""


class SharedFile(msgspec.Struct, frozen=True):
    """A memory file of the tree. anonymous: the pager fills it, from image address `image` on; huge: of 2 MiB pages."""

    name: str
    size: int
    image: int
    anonymous: bool
    huge: bool


class ThreadState(msgspec.Struct, frozen=True):
    """What a thread gets by ptrace, last; futex_words: addresses that must be present by then."""

    tid: int
    registers: bytes
    xstate: bytes
    signal_mask: int
    futex_words: list[int]


class Written(msgspec.Struct, frozen=True):
    """Addresses [start, end) whose content is put in before the process runs; zeros: also where it is zero."""

    label: str
    start: int
    end: int
    zeros: bool


class Compiled(msgspec.Struct, frozen=True):
    """A restore program, and what the restorer must know of it.

    userfaultfd: its number at the stop. end: of the address range that is ours in the new process, from linked.base.
    trap_action: address of SIGTRAP's struct sigaction in the linked program, 0: the default.
    """

    linked: Linked
    layout: Layout
    userfaultfd: int
    end: int
    trap_action: int


class RestorePlan(msgspec.Struct, frozen=True):
    """One kind of restore.

    session: 1 for setsid(), 2 for setpgid(0, 0). ranges: what the pager serves, as it travels. reusable: whether it may
    be carried out more than once, and at another time.
    """

    pid: int
    session: int
    stopped: bool
    oom_score_adjust: int
    core_dump_filter: int
    host: Host
    compiled: Compiled
    threads: list[ThreadState]  # the leader first
    shared: list[SharedFile]
    ranges: bytes
    contents: list[Written]
    folders: list[str]  # that must be there
    files: MappedFiles
    opened: list[OpenedPath]
    addresses: list[Address]
    reusable: bool
