"""Virtual memory areas: what a process has mapped, and how each piece comes back.

Facts. A restored VMA must have the address, size, protection and sharing it had; a VMA that was one must stay one
(mremap refuses to cross a border). MAP_GROWSDOWN, MADV_WIPEONFORK and MADV_FREE are refused on file mappings, and the
template is a file, so those VMAs come back anonymous and are written before the process runs. The kernel's zero page
and absent pages hold no content. A page of a private file mapping that was written is anonymous memory: the mapping
then no longer equals its file. Its other pages follow the file, and a written one does after MADV_DONTNEED.

Choice. `kind` says how a VMA is restored; see `Kind`. Of a private file mapping with written pages the file is mapped,
and the written pages are put in at once. It goes to the template as a whole, so that it stays one lazy VMA, if the file
is a program or library (something of it is executable, or it is a JVM's archive of classes: 10 MB written, some ms at
once), whose data nobody drops and which nobody writes to, or if too much was written to be brought at once. The cost:
then MADV_DONTNEED shows zeros, and the file's changes are not seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from lazyrestore.errors import FileChanged
from lazyrestore.kernel.procfs import Mapping
from lazyrestore.program import Descriptors, OpList, Program, lib
from lazyrestore.restore_plan import SharedFile, Signature, signature_of

PAGE = 4096
LARGE_FILE_MAPPING = 64 << 20  # bytes; what was written of one is put in at once if it is no more than this, or 1/8
SMALL_SHARED_FILE = 1 << 20  # bytes; the content of no larger one is kept in the manifest
TEMPLATE_NAME = "/memfd:lazyrestore"
HUGE_2MB = 21 << lib.MFD_HUGE_SHIFT  # the same bits in flags of mmap and memfd_create
HUGE_TEMPLATE_NAME = "/memfd:lazyrestore-huge"  # of hugetlb pages
ANONYMOUS_HUGETLB_NAME = "/anon_hugepage"
ANONYMOUS_SHARED_NAME = "/memfd:lazyrestore-shared"  # what a restored anonymous MAP_SHARED mapping is called

Kind = Literal["lazy", "anonymous", "eager", "file", "shared", "hugetlb", "kernel"]
"""lazy: template, MAP_PRIVATE. anonymous: no content, of huge pages if "ht" is in the flags. eager: anonymous, contents
written before the process runs. file: the file itself, contents (if any) written over it. shared: a memory file of the
tree. hugetlb: hugetlb template. kernel: vdso and vvar."""


class FileIdentity(msgspec.Struct, frozen=True):
    """What a mapped file must still be when it is mapped again; mtime in ns; build_id of an ELF file, hexadecimal.

    seen: its signature at the snapshot. As long as it is the same, nothing of the file needs to be read.

    A file that is mapped MAP_SHARED and writable belongs to whoever writes it: `shared`, and only its size must hold.
    If it is small, its `content` is kept, so that it can be made again when it is gone (a JVM removes the perf data of
    dead ones).
    """

    path: str
    size: int
    mtime: int
    build_id: str = ""
    shared: bool = False
    mode: int = 0o600
    content: bytes | None = None
    seen: Signature | None = None


class Vma(msgspec.Struct, frozen=True):
    """One VMA. `file` and `shared_object` index the manifest's lists; `stored` counts the bytes of content; `written`
    are the (start, end) ranges whose content is put in before the process runs (kinds eager, file, and private mappings
    of shared objects)."""

    start: int
    end: int
    protection: int
    kind: Kind
    path: str = ""
    offset: int = 0
    flags: tuple[str, ...] = ()
    file: int = -1
    shared_object: int = -1
    shared: bool = False
    stored: int = 0
    grows_down: bool = False
    written: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def label(self) -> str:
        return f"vma {self.start:x}-{self.end:x}" + (f" ({self.path})" if self.path else "")


class SharedObject(msgspec.Struct, frozen=True):
    """Memory behind a MAP_SHARED mapping that is no named file.

    Image addresses start at `image`. `key` is (device, inode). `anonymous`: lazy, served by the pager; `huge`: of 2 MiB
    pages.
    """

    name: str
    size: int
    image: int
    key: tuple[int, int]
    anonymous: bool
    huge: bool = False


def memory_file(shared: SharedObject) -> SharedFile:
    """What stands for it in a restored process."""
    name = ANONYMOUS_SHARED_NAME if shared.anonymous else shared.name
    return SharedFile(name.removeprefix("/memfd:"), shared.size, shared.image, shared.anonymous, shared.huge)


def protection_of(mapping: Mapping) -> int:
    return (
        (lib.PROT_READ if mapping.read else 0)
        | (lib.PROT_WRITE if mapping.write else 0)
        | (lib.PROT_EXEC if mapping.execute else 0)
    )


def is_template(mapping: Mapping) -> bool:
    """A lazily restored mapping: its content is what it reads as, whatever is present."""
    return mapping.path in (TEMPLATE_NAME, HUGE_TEMPLATE_NAME) and not mapping.shared


def unsupported(mappings: Iterable[Mapping]) -> list[str]:
    """The mappings that cannot be restored, one line each."""
    lines = []
    for mapping in mappings:
        where = f"mapping {mapping.start:x}-{mapping.end:x}"
        path = mapping.path
        if path.startswith("/SYSV"):
            lines.append(f"{where}: System V shared memory {path}")
        elif path == "[aio]" or path.startswith("/[aio]"):
            lines.append(f"{where}: asynchronous I/O ring")
        elif path.startswith("anon_inode:"):
            lines.append(f"{where}: {path} (io_uring, perf or the like)")
        elif path.startswith("/dev/") and not path.startswith(("/dev/shm/", "/dev/zero", "/dev/hugepages/")):
            lines.append(f"{where}: device {path}")
        elif {"io", "pf", "mm"} & set(mapping.flags) and path not in ("[vvar]", "[vvar_vclock]", "[vdso]", "[timens]"):
            lines.append(f"{where}: device memory {path}")
        elif (
            {"um", "ui", "uw"} & set(mapping.flags) and not is_template(mapping) and not path.startswith(TEMPLATE_NAME)
        ):
            lines.append(f"{where}: registered with a userfaultfd of the process")
        elif "ss" in mapping.flags:
            lines.append(f"{where}: a shadow stack")
        elif "dp" in mapping.flags:
            lines.append(f"{where}: droppable memory (MAP_DROPPABLE)")
        elif path.startswith("/secretmem"):
            lines.append(f"{where}: secret memory (memfd_secret)")
        elif "sl" in mapping.flags and not path.startswith("[v"):  # the kernel may seal the vdso
            lines.append(f"{where}: sealed memory (mseal)")
    return lines


def names_its_file(mapping: Mapping) -> bool:
    """Whether the mapping's path still leads to the file that is mapped."""
    if mapping.deleted:
        return False
    try:
        return os.stat(mapping.path).st_ino == mapping.inode
    except OSError:
        return False


def out_of_reach(pid: int, mappings: Iterable[Mapping]) -> list[str]:
    """The shared mappings of files that exist, but not under the path that maps tells; one line each. A name with
    " (deleted)" at its end, or a backslash before 012, cannot be told there from a deleted file, or a newline."""
    lines = []
    for m in mappings:
        if m.shared and m.path.startswith("/") and not names_its_file(m):
            try:
                linked = os.stat(f"/proc/{pid}/map_files/{m.start:x}-{m.end:x}").st_nlink
            except FileNotFoundError:  # unmapped meanwhile
                continue
            if linked:
                lines.append(f"mapping {m.start:x}-{m.end:x}: shared, of a file to which {m.path!r} does not lead")
    return lines


def identify(path: str, root: str) -> FileIdentity | None:
    """What the file at `path` is now, None if it cannot be read."""
    try:
        status = os.stat(root + path)
    except OSError:
        return None
    build_id = _build_id(root + path)
    return FileIdentity(path, status.st_size, status.st_mtime_ns, build_id, seen=signature_of(status))


def check_file(identity: FileIdentity) -> None:
    """FileChanged unless the file is still what it was: same size, and same build-id or, without one, same mtime. Makes
    a small shared one again."""
    try:
        status = os.stat(identity.path)
    except OSError as error:
        if identity.content is not None and _make_again(identity):
            return
        raise FileChanged(
            f"file {identity.path}",
            "map",
            "it was mapped at the snapshot and is gone",
            "put it back, or take a new snapshot",
            errno=error.errno,
        ) from error
    if status.st_size != identity.size:
        raise FileChanged(
            f"file {identity.path}",
            "map",
            f"its size was {identity.size} bytes and is {status.st_size}",
            "put the old file back, or take a new snapshot",
        )
    if identity.shared:
        return
    if identity.build_id:  # tells more than a time, which image builders set as they like
        if _build_id(identity.path) == identity.build_id:
            return
        changed = "it was rebuilt since the snapshot (build-id differs)"
    elif status.st_mtime_ns == identity.mtime:
        return
    else:
        changed = "it was modified since the snapshot (mtime differs)"
    raise FileChanged(f"file {identity.path}", "map", changed, "put the old file back, or take a new snapshot")


def shared_identity(identity: FileIdentity) -> FileIdentity:
    """The same file, mapped MAP_SHARED and writable: with its content if it is small."""
    content = None
    if identity.size <= SMALL_SHARED_FILE:
        with open(identity.path, "rb") as file:
            content = file.read()
    mode = os.stat(identity.path).st_mode & 0o7777
    return FileIdentity(identity.path, identity.size, identity.mtime, identity.build_id, True, mode, content)


def _make_again(identity: FileIdentity) -> bool:
    try:
        descriptor = os.open(
            identity.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, identity.mode
        )
    except OSError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(identity.content or b"")
    return True


def _build_id(path: str) -> str:
    """The GNU build-id in the notes near the start of an ELF file, "" if there is none."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(4096)
    except OSError:
        return ""
    if not head.startswith(b"\x7fELF"):
        return ""
    note = head.find(b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0")
    return head[note + 16 : note + 36].hex() if note >= 0 else ""


# -- restore -----------------------------------------------------------------------------------------------------------

ADVICE = {  # VmFlags of smaps (Documentation/filesystems/proc.rst) → madvise
    "dc": lib.MADV_DONTFORK,
    "dd": lib.MADV_DONTDUMP,
    "hg": lib.MADV_HUGEPAGE,
    "nh": lib.MADV_NOHUGEPAGE,
    "wf": lib.MADV_WIPEONFORK,
    "mg": lib.MADV_MERGEABLE,
    "sr": lib.MADV_SEQUENTIAL,
    "rr": lib.MADV_RANDOM,
}
LOCKED = "lo"
MAY_WRITE = "mw"  # of a shared mapping: its file was opened for writing
GUARD = "guard"  # ours, not smaps': all of it is guard pages (MADV_GUARD_INSTALL)
_ADVISED = frozenset((*ADVICE, LOCKED, GUARD))

# Looked up once: an attribute of a cffi library costs much in a loop over VMAs.
_MMAP, _OPENAT, _AT_FDCWD = lib.SYS_mmap, lib.SYS_openat, lib.AT_FDCWD
_PRIVATE = lib.MAP_FIXED_NOREPLACE | lib.MAP_PRIVATE
_SHARED = lib.MAP_FIXED_NOREPLACE | lib.MAP_SHARED
_LAZY = _PRIVATE | lib.MAP_NORESERVE


class Handed(msgspec.Struct, frozen=True):
    """Descriptor numbers in the new process: of the templates, the tree's memory files, and files that are open."""

    template: int
    hugetlb: int
    shared: dict[int, int]
    files: dict[int, int]


def read_only_files(vmas: Iterable[Vma], files: list[FileIdentity]) -> list[int]:
    """The numbers of the files that any process may have open, whoever wants to write or run them."""
    writable = _writable(vmas)
    return [number for number in range(len(files)) if number not in writable]


def _writable(vmas: Iterable[Vma]) -> set[int]:
    """The files that can be written through a mapping, be it only after an mprotect."""
    return {v.file for v in vmas if v.kind == "file" and v.shared and MAY_WRITE in v.flags}


def restore(
    vmas: list[Vma],
    files: list[FileIdentity],
    program: Program,
    ops: OpList,
    fds: Descriptors,
    handed: Handed,
) -> None:
    """Append the mapping of all VMAs but the kernel's."""
    writable = _writable(vmas)
    opened = dict(handed.files)
    last_use = {vma.file: vma for vma in vmas}
    with ops.serving(""):
        for run in _runs(vmas):
            vma, last = run[0], run[-1]
            kind, start, size = vma.kind, vma.start, last.end - vma.start
            ops.resource = vma
            if kind == "lazy":
                fd, offset, flags = handed.template, start, _LAZY
            elif kind == "file":
                if vma.file not in opened:
                    mode = os.O_RDWR if vma.file in writable else os.O_RDONLY
                    path = program.string(files[vma.file].path)
                    opened[vma.file] = fds.create(_OPENAT, _AT_FDCWD, path, mode | os.O_CLOEXEC)
                fd, offset, flags = opened[vma.file], vma.offset, _SHARED if vma.shared else _PRIVATE
            elif kind == "kernel":
                continue
            elif kind == "hugetlb":
                fd, offset, flags = handed.hugetlb, start, _LAZY
            elif kind == "shared":
                fd, offset, flags = handed.shared[vma.shared_object], vma.offset, _SHARED if vma.shared else _PRIVATE
            else:
                fd, offset, flags = -1, 0, _PRIVATE | lib.MAP_ANONYMOUS
                if vma.grows_down:
                    flags |= lib.MAP_GROWSDOWN
                if "ht" in vma.flags:
                    flags |= lib.MAP_HUGETLB | HUGE_2MB
                if "nr" in vma.flags or not vma.protection:
                    flags |= lib.MAP_NORESERVE
            ops.call_expecting(start, _MMAP, start, size, vma.protection, flags, fd, offset, note=kind)
            if vma is not last:
                _protect(run, ops)
            if not _ADVISED.isdisjoint(vma.flags):
                _advise(vma, ops)
            if kind == "file" and last_use[vma.file] is last and vma.file not in handed.files:
                fds.close(opened.pop(vma.file))


def _runs(vmas: Iterable[Vma]) -> Iterator[list[Vma]]:
    """All of them, in order; those together that one mmap can make.

    Two calls make the three mappings that a library usually has of its file (headers, code, constants), and what the
    loader mapped apart (a library's data, and what follows it) is one piece of the template. Never what can be written
    together with what cannot: mprotect does not take back that memory was accounted for.
    """
    run: list[Vma] = []
    for vma in vmas:
        if run and not _goes_on(run[-1], vma):
            yield run
            run = []
        run.append(vma)
    if run:
        yield run


def _goes_on(vma: Vma, following: Vma) -> bool:
    if vma.end != following.start or vma.kind != following.kind or vma.kind not in ("lazy", "file"):
        return False
    if vma.kind == "file" and (
        vma.file != following.file
        or vma.shared
        or following.shared
        or vma.offset + vma.end - vma.start != following.offset
    ):
        return False
    return (
        not (vma.protection ^ following.protection) & lib.PROT_WRITE
        and _ADVISED.isdisjoint(vma.flags)
        and _ADVISED.isdisjoint(following.flags)
    )


def _protect(run: list[Vma], ops: OpList) -> None:
    """Give each its protection, where that is not the first one's."""
    for vma in run:
        if vma.protection != run[0].protection:
            ops.resource = vma
            ops.call(lib.SYS_mprotect, vma.start, vma.end - vma.start, vma.protection)


def _advise(vma: Vma, ops: OpList) -> None:
    for name, advice in ADVICE.items():  # in an order of ours: two compilations give the same
        if name in vma.flags and (name != "wf" or vma.kind in ("eager", "anonymous")):
            ops.try_call(lib.SYS_madvise, vma.start, vma.size, advice, note=f"VmFlags {name}")
    if GUARD in vma.flags:
        ops.call(lib.SYS_madvise, vma.start, vma.size, lib.MADV_GUARD_INSTALL, note="guard pages")
    if LOCKED in vma.flags:
        ops.call(lib.SYS_mlock2, vma.start, vma.size, lib.MLOCK_ONFAULT)
