"""Which bytes of a frozen process are content, and where they are to be read: VMAs become `Vma`s plus a list of runs.

Facts. PAGEMAP_SCAN (Linux 6.7) tells present, swapped, file and zero pages of a range in one call; before it,
/proc/PID/pagemap has eight bytes a page: bit 63 present, 62 swapped, 61 a page of a file or shared. process_vm_readv
reads what the process may read; /proc/PID/mem reads regardless of protection. A restored process's own lazy mappings
have content that is not present: where it came from is known, what was not written is inherited (inherited.py), else
they are read whole (which faults it in). Reading a memory file by descriptor never
faults, so anonymous shared memory, which may be lazy, is read through its mapping.
"""

from __future__ import annotations

import errno
import os

import msgspec
from msgspec.structs import replace as replace_fields

from lazyrestore._native import _core
from lazyrestore.errors import SnapshotFailed
from lazyrestore.kernel.host import KERNEL_MAPPINGS
from lazyrestore.kernel.procfs import Mapping
from lazyrestore.resources.inherited import OBJECT_SPAN, Origin, Piece, Ranges, settle, union, within, without
from lazyrestore.resources.vma import (
    ANONYMOUS_HUGETLB_NAME,
    ANONYMOUS_SHARED_NAME,
    GUARD,
    LARGE_FILE_MAPPING,
    LOCKED,
    MAY_WRITE,
    PAGE,
    FileIdentity,
    Kind,
    SharedObject,
    Vma,
    identify,
    is_template,
    names_its_file,
    protection_of,
    shared_identity,
)

lib, ffi = _core.lib, _core.ffi

HUGE = 2 << 20


class Run(msgspec.Struct, frozen=True):
    """`length` bytes at image address `image`.

    They are to be read at `address` of the process, or of `descriptor` if that is not -1.
    """

    image: int
    address: int
    length: int
    descriptor: int = -1
    protection: int = lib.PROT_READ
    lazy: bool = False  # of a restored process's template: reading it may have to wait for the pager
    data: bytes | None = None  # already read
    huge: bool = False  # of a hugetlb mapping

    @property
    def forced(self) -> bool:
        """Not readable by the process itself: only through /proc/PID/mem."""
        return not self.protection & lib.PROT_READ


class Plan(msgspec.Struct):
    vmas: list[Vma] = []
    files: list[FileIdentity] = []
    shared: list[SharedObject] = []
    runs: list[Run] = []
    # What the parent snapshot has, of ordinary and of huge pages: (image address, end, image address in the parent).
    references: list[tuple[int, int, int]] = []
    huge_references: list[tuple[int, int, int]] = []

    @property
    def bytes(self) -> int:
        return sum(run.length for run in self.runs)


class Planner:
    """Builds a Plan for one frozen process; owns descriptors until close()."""

    def __init__(self, pid: int, identities: dict[str, FileIdentity], origin: Origin | None = None) -> None:
        self.pid = pid
        self.plan = Plan()
        self._identities = identities  # found before the freeze
        self._origin = origin
        self._inherited: list[Piece] = []
        self._guards: Ranges = []  # guard pages of the mapping that is being planned
        self._files: dict[str, int] = {}
        self._programs: set[str] = set()  # paths of the program, its libraries, and archives of a JVM's classes
        self._objects: dict[tuple[int, int], int] = {}
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors: list[int] = []

    def close(self) -> None:
        for descriptor in [self._pagemap, *self._descriptors]:
            os.close(descriptor)
        self._descriptors.clear()

    def build(self, mappings: list[Mapping]) -> Plan:
        self._programs = {m.path for m in mappings if m.execute or m.path.endswith(".jsa")}
        for mapping in mappings:
            self._guards.clear()
            first_run = len(self.plan.runs)
            vma = self._vma(mapping)
            runs = None if is_template(mapping) else self.plan.runs[first_run:]
            self.plan.vmas += _apart(vma, self._guards, runs) if self._guards else [vma]
        if self._origin is not None:
            self._settle(self._origin)
        return self.plan

    def _settle(self, origin: Origin) -> None:
        taken = union([(run.image, run.image + run.length) for run in self.plan.runs])
        used = [(vma.start, vma.end) for vma in self.plan.vmas if vma.kind in ("lazy", "hugetlb")]
        used += [(shared.image, shared.image + OBJECT_SPAN) for shared in self.plan.shared]
        settled = settle(self._inherited, taken, used, origin.chunks)
        for piece in settled.pieces:
            self._add(piece.mapping, [(piece.address, piece.address + piece.length)], piece.image - piece.address)
        self.plan.references, self.plan.huge_references = settled.references, settled.huge

    def _vma(self, m: Mapping) -> Vma:
        if m.path in KERNEL_MAPPINGS:
            return self._make(m, "kernel")
        if "ht" in m.flags:
            return self._hugetlb(m)
        if m.anonymous:
            ranges = self._pages(m.start, m.end, lib.LR_PAGES_WITH_CONTENT)
            eager = bool({"gd", "wf", "lo"} & set(m.flags))
            if not ranges and not eager:
                return self._make(m, "anonymous")
            return self._make(m, "eager" if eager else "lazy", self._add(m, ranges), written=ranges if eager else None)
        if is_template(m):
            return self._make(m, "lazy", self._add_lazy(m, m.start, m.end))
        memory_file = m.path.startswith("/memfd:") or (m.path == "/dev/zero" and m.shared)
        if memory_file or (m.shared and not names_its_file(m)):
            return self._shared(m)
        if not names_its_file(m):
            return self._make(m, "lazy", self._add(m, [(m.start, self._end_of_file(m))]))
        return self._file(m)

    def _make(
        self,
        m: Mapping,
        kind: Kind,
        stored: int = 0,
        *,
        file: int = -1,
        shared_object: int = -1,
        written: Ranges | None = None,
    ) -> Vma:
        return Vma(
            m.start,
            m.end,
            protection_of(m),
            kind,
            m.path,
            m.offset,
            m.flags,
            file,
            shared_object,
            m.shared,
            stored,
            "gd" in m.flags,
            written or [],
        )

    def _add(self, m: Mapping, ranges: Ranges, shift: int = 0) -> int:
        """Store these address ranges of the process, at image addresses higher by `shift`; returns the bytes."""
        for start, end in ranges:
            self.plan.runs.append(
                Run(
                    start + shift,
                    start,
                    end - start,
                    protection=protection_of(m),
                    lazy=is_template(m) or m.path == ANONYMOUS_SHARED_NAME,
                    huge="ht" in m.flags,
                )
            )
        return sum(end - start for start, end in ranges)

    def _add_lazy(self, m: Mapping, start: int, end: int, shift: int = 0) -> int:
        """Store addresses [start, end) of a restored mapping, whether its content has arrived or not; returns the
        bytes."""
        guards = self._pages(start, end, lib.LR_PAGES_GUARD)
        if guards and m.shared:
            cause = "guard pages (MADV_GUARD_INSTALL) of shared memory cannot be stored yet"
            raise SnapshotFailed(f"mapping {m.start:x}-{m.end:x}", "plan", cause)
        self._guards += guards
        parts = without([(start, end)], guards)
        if self._origin is None or not self._origin.serves(m):
            return self._add(m, parts, shift)
        for low, high in parts:
            read, inherited = self._origin.divide(m, low, high, shift, self._pages)
            self._add(m, read, shift)
            self._inherited += inherited
        return sum(high - low for low, high in parts)

    def _hugetlb(self, m: Mapping) -> Vma:
        where, anonymous = f"mapping {m.start:x}-{m.end:x}", m.path == ANONYMOUS_HUGETLB_NAME
        size = os.statvfs(f"/proc/{self.pid}/map_files/{m.start:x}-{m.end:x}").f_bsize
        if size != HUGE:
            raise SnapshotFailed(where, "plan", f"huge pages of {size >> 20} MiB cannot be stored yet")
        if m.shared and (anonymous or m.path.startswith("/memfd:")):
            return self._shared(m)
        if is_template(m):
            return self._make(m, "hugetlb", self._add_lazy(m, m.start, m.end))
        if not anonymous:
            raise SnapshotFailed(where, "plan", f"huge pages of a file cannot be stored yet: {m.path}")
        ranges = self._pages(m.start, m.end, lib.LR_PAGES_WITH_CONTENT)
        if not ranges:
            return self._make(m, "anonymous")
        return self._make(m, "hugetlb", self._add(m, ranges))

    def _file(self, m: Mapping) -> Vma:
        index = self._file_index(m.path)
        if m.shared:
            if MAY_WRITE in m.flags and not self.plan.files[index].shared:
                self.plan.files[index] = shared_identity(self.plan.files[index])
            return self._make(m, "file", file=index)
        written = self._pages(m.start, m.end, lib.LR_PAGES_OWN)
        if not written:
            return self._make(m, "file", file=index)
        size = sum(end - start for start, end in written)
        end = self._end_of_file(m)
        small = size <= LARGE_FILE_MAPPING and m.path not in self._programs
        if small or end < m.end or (m.size > LARGE_FILE_MAPPING and size * 8 < m.size):
            return self._make(m, "file", self._add(m, written), file=index, written=written)
        return self._make(m, "lazy", self._add(m, [(m.start, end)]))

    def _shared(self, m: Mapping) -> Vma:
        key = m.file
        lazy = m.path == ANONYMOUS_SHARED_NAME  # a restored one: part of it may not have arrived
        anonymous = lazy or m.path == "/dev/zero"
        if key not in self._objects:
            self._objects[key] = len(self.plan.shared)
            descriptor = os.open(f"/proc/{self.pid}/map_files/{m.start:x}-{m.end:x}", os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors.append(descriptor)
            size = os.fstat(descriptor).st_size
            image = (len(self.plan.shared) + 1) * OBJECT_SPAN
            self.plan.shared.append(SharedObject(m.path, size, image, key, anonymous, "ht" in m.flags))
            if not lazy:
                for start, end in _data_ranges(descriptor, size):
                    self.plan.runs.append(Run(image + start, start, end - start, descriptor))
        number = self._objects[key]
        shared = self.plan.shared[number]
        stored, written = 0, []
        if lazy:
            end = min(m.end, m.start + max(0, _round_up(shared.size) - m.offset))
            if end > m.start:
                stored = self._add_lazy(m, m.start, end, shared.image + m.offset - m.start)
        elif not m.shared:
            written = self._pages(m.start, m.end, lib.LR_PAGES_OWN)
            stored = self._add(m, written)
        return self._make(m, "shared", stored, shared_object=number, written=written)

    # -- looking -------------------------------------------------------------------------------------------------------

    def _file_index(self, path: str) -> int:
        if path not in self._files:
            identity = self._identities.get(path) or identify(path, "")
            if identity is None:
                raise SnapshotFailed(
                    f"file {path}", "identify", "it is mapped and cannot be read", "let root, or the caller, read it"
                )
            self._files[path] = len(self.plan.files)
            self.plan.files.append(identity)
        return self._files[path]

    def _end_of_file(self, m: Mapping) -> int:
        """Where reading the mapping ends: its end, or the page after the file's last byte."""
        try:
            size = os.stat(f"/proc/{self.pid}/map_files/{m.start:x}-{m.end:x}").st_size
        except OSError:
            return m.end
        return max(m.start, min(m.end, m.start + _round_up(size) - m.offset))

    def _pages(self, start: int, end: int, kind: int) -> Ranges:
        """The address ranges of [start, end) whose pages are of a kind: lib.LR_PAGES_…"""
        room = 4096
        ranges, following = ffi.new(f"uint64_t[{2 * room}]"), ffi.new("uint64_t *", start)
        found: list[tuple[int, int]] = []
        while following[0] < end:
            count = lib.lr_scan_pages(self._pagemap, following[0], end, kind, ranges, room, following)
            if count == -errno.ENOTTY:
                return self._pages_before_6_7(start, end, kind)
            if count < 0:
                raise SnapshotFailed(f"mapping {start:x}-{end:x}", "PAGEMAP_SCAN", errno=-count)
            found += [(ranges[2 * index], ranges[2 * index + 1]) for index in range(count)]
        if kind == lib.LR_PAGES_WITH_CONTENT and any(end & 1 for _, end in found):
            self._guards += [(start, end - 1) for start, end in found if end & 1]
            found = [each for each in found if not each[1] & 1]
        return found

    def _pages_before_6_7(self, start: int, end: int, kind: int) -> Ranges:
        """The same without PAGEMAP_SCAN: zero pages cannot be told from the process's own, and are taken for these."""
        found: list[tuple[int, int]] = []
        if kind in (lib.LR_PAGES_ZERO, lib.LR_PAGES_GUARD):
            return found
        for base in range(start, end, PAGE << 16):
            entries = memoryview(
                os.pread(self._pagemap, min(end - base, PAGE << 16) // PAGE * 8, base // PAGE * 8)
            ).cast("Q")
            for index, entry in enumerate(entries):
                of_file = bool(entry >> 61 & 1)
                if not entry >> 62 or (kind != lib.LR_PAGES_WITH_CONTENT and of_file != (kind == lib.LR_PAGES_OF_FILE)):
                    continue
                page = base + index * PAGE
                if found and found[-1][1] == page:
                    found[-1] = (found[-1][0], page + PAGE)
                else:
                    found.append((page, page + PAGE))
        return found


def _apart(vma: Vma, guards: Ranges, runs: list[Run] | None) -> list[Vma]:
    """A VMA as several: its guard pages are mappings of their own when it is restored. Nothing that the pager installs
    then lies over one: UFFDIO_CONTINUE takes a guard for a page that is missing (6.18; tried). runs: its content;
    None: all of it was lazily restored."""
    parts = []
    at = vma.start
    for start, end in [*guards, (vma.end, vma.end)]:
        stored = start - at if runs is None else sum(run.length for run in runs if at <= run.address < start)
        kind: Kind = "anonymous" if vma.kind == "lazy" and not stored else vma.kind
        if at < start:
            lowest = vma.grows_down and at == vma.start
            written = within(vma.written, at, start)
            part = replace_fields(
                vma, start=at, end=start, kind=kind, stored=stored, grows_down=lowest, written=written
            )
            parts.append(part)
        if start < end:
            flags = (*(flag for flag in vma.flags if flag != LOCKED), GUARD)
            guard = replace_fields(vma, start=start, end=end, kind="anonymous", flags=flags, stored=0, written=[])
            parts.append(replace_fields(guard, grows_down=False))
        at = end
    return parts


def _data_ranges(descriptor: int, size: int) -> Ranges:
    """The parts of a memory file that are no holes, in whole pages."""
    ranges, at = [], 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        at = os.lseek(descriptor, start, os.SEEK_HOLE)
        ranges.append((start & -PAGE, _round_up(at)))
    return ranges


def _round_up(value: int) -> int:
    return -(-value // PAGE) * PAGE
