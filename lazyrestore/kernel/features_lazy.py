"""Probes of userfaultfd: everything that lets memory arrive on touch.

Facts. Features are asked for in one handshake (UFFDIO_API), which answers EINVAL to a bit the kernel does not know and
EPERM to EVENT_FORK without CAP_SYS_PTRACE. A bit is a promise; whether a fault
of this process arrives is seen by taking one.
Consequence. Each feature is asked for alone, then used in a whole round trip (features_memory.c).
Cost. About a millisecond each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lazyrestore._native import _core
from lazyrestore.kernel.features_record import Probe, Untried, native

PAGE_SIZE = 4096
HUGE_PAGES = Path("/sys/kernel/mm/hugepages")
PRIVILEGE = "run as root, or with CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1"


def handshake(feature: str) -> None:
    """Open a userfaultfd and ask for one feature, named as in the kernel without UFFD_FEATURE_. Raises OSError."""
    bit = _core.lib.lr_uffd_feature(feature.encode())
    if not bit:
        raise OSError(0, f"this build does not know {feature}")
    native("userfaultfd", _core.lib.LR_UFFD_CALL, bit)


def free_huge_pages() -> dict[int, int]:
    """Free huge pages (as the kernel counts them, reservations deducted), by page size in bytes."""
    found: dict[int, int] = {}
    for folder in HUGE_PAGES.glob("hugepages-*kB"):
        free = int((folder / "free_hugepages").read_text()) - int((folder / "resv_hugepages").read_text())
        found[int(folder.name[len("hugepages-") : -len("kB")]) * 1024] = max(free, 0)
    return dict(sorted(found.items()))


def _open_call() -> str:
    native("userfaultfd", _core.lib.LR_UFFD_CALL, 0)
    return ""


def _open_device() -> str:
    native("userfaultfd", _core.lib.LR_UFFD_DEVICE, 0)
    return ""


def _round_trip(feature: str, action: str) -> Callable[[], str]:
    def run() -> str:
        handshake(feature)
        native("lazy", getattr(_core.lib, f"LR_LAZY_{action}"), PAGE_SIZE)
        return ""

    return run


def _fork() -> str:
    handshake("EVENT_FORK")
    native("uffd_fork")
    return ""


def _hugetlb(feature: str) -> Callable[[], str]:
    def run() -> str:
        handshake(feature)
        usable = [size for size, free in free_huge_pages().items() if free >= 2]
        if not usable:
            return "handshake only: fewer than two free huge pages"
        native("lazy", _core.lib.LR_LAZY_READ, usable[0])
        return f"with pages of {usable[0] >> 20} MiB"

    return run


def _huge_pages() -> str:
    free = {size: count for size, count in free_huge_pages().items() if count}
    if not free:
        raise Untried("none free")
    return ", ".join(f"{count} × {size >> 20} MiB" for size, count in free.items())


FIRST = "first what userfaultfd asks for; then "
OLD_KERNEL = f"{FIRST}Linux 5.14 or newer with CONFIG_USERFAULTFD"
NO_LAZY = "restore"

PROBES = (
    Probe(
        "userfaultfd",
        "faults of the restored process, also those inside system calls, reach the pager",
        True,
        "userfaultfd() without UFFD_USER_MODE_ONLY, UFFDIO_API",
        NO_LAZY,
        PRIVILEGE,
        _open_call,
    ),
    Probe(
        "userfaultfd-device",
        "a userfaultfd without CAP_SYS_PTRACE",
        False,
        "open /dev/userfaultfd, USERFAULTFD_IOC_NEW",
        "nothing, as long as the system call works",
        "Linux 6.1 or newer; give the user access to /dev/userfaultfd",
        _open_device,
    ),
    Probe(
        "uffd-missing-shmem",
        "a hole in the image asks the pager instead of reading zero by itself",
        True,
        "read a hole of a private memfd mapping, answer ZEROPAGE",
        NO_LAZY,
        OLD_KERNEL,
        _round_trip("MISSING_SHMEM", "ZERO"),
    ),
    Probe(
        "uffd-minor-shmem",
        "a decompressed page is shown to the process without a copy",
        True,
        "read a filled page of a private memfd mapping, answer CONTINUE",
        NO_LAZY,
        OLD_KERNEL,
        _round_trip("MINOR_SHMEM", "READ"),
    ),
    Probe(
        "uffd-kernel-faults",
        "a system call on memory that has not arrived waits for it",
        True,
        "write(2) from a filled page that is not mapped yet",
        NO_LAZY,
        PRIVILEGE,
        _round_trip("MINOR_SHMEM", "SYSTEM"),
    ),
    Probe(
        "uffd-copy-on-write",
        "clones of one snapshot never see each other's writes",
        True,
        "write to a filled page, compare the memfd",
        NO_LAZY,
        OLD_KERNEL,
        _round_trip("MINOR_SHMEM", "WRITE"),
    ),
    Probe(
        "uffd-event-remove",
        "memory given back with MADV_DONTNEED reads zero, not the snapshot",
        True,
        "madvise a filled page, read the event, then zero",
        NO_LAZY,
        OLD_KERNEL,
        _round_trip("EVENT_REMOVE", "REMOVE"),
    ),
    Probe(
        "uffd-event-remap",
        "memory moved by mremap arrives at its new address",
        True,
        "mremap a filled page, read the event, then the page",
        NO_LAZY,
        OLD_KERNEL,
        _round_trip("EVENT_REMAP", "REMAP"),
    ),
    Probe(
        "uffd-event-unmap",
        "the pager forgets what was unmapped",
        True,
        "munmap a page, read the event",
        NO_LAZY,
        OLD_KERNEL,
        _round_trip("EVENT_UNMAP", "UNMAP"),
    ),
    Probe(
        "uffd-event-fork",
        "a child forked by a restored process is served too",
        True,
        "fork of a child with a registered mapping: an event with the grandchild's userfaultfd",
        NO_LAZY,
        "run as root, or with CAP_SYS_PTRACE",
        _fork,
    ),
    Probe(
        "uffd-poison",
        "a chunk that is damaged gives SIGBUS to whoever touches it",
        False,
        "POISON a page, then a system call on it: EFAULT",
        "a process that touches a damaged chunk is killed instead",
        f"{FIRST}Linux 6.6 or newer",
        _round_trip("POISON", "POISON"),
    ),
    Probe(
        "uffd-missing-hugetlb",
        "holes in huge-page memory ask the pager",
        False,
        "UFFDIO_API, and a read of a huge page if two are free",
        "restore of processes that use huge pages",
        f"{FIRST}Linux 4.11 or newer with CONFIG_HUGETLBFS",
        _hugetlb("MISSING_HUGETLBFS"),
    ),
    Probe(
        "uffd-minor-hugetlb",
        "huge pages arrive lazily",
        False,
        "UFFDIO_API, and CONTINUE of a huge page if two are free",
        "restore of processes that use huge pages",
        f"{FIRST}Linux 5.13 or newer with CONFIG_HUGETLBFS",
        _hugetlb("MINOR_HUGETLBFS"),
    ),
    Probe(
        "huge-pages",
        "memory for processes that use huge pages",
        False,
        "/sys/kernel/mm/hugepages",
        "restore of processes that use huge pages",
        "reserve some: vm.nr_hugepages",
        _huge_pages,
    ),
)
