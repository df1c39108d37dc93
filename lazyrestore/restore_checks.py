"""What must hold before a process of a snapshot can run here: the kernel, the CPU, a free process id."""

from __future__ import annotations

import errno
import mmap
import os
import time
from contextlib import ExitStack

from lazyrestore._native import _core
from lazyrestore.errors import CpuMismatch, KernelMismatch, NoSuchProcess, OutOfMemory, PidTaken
from lazyrestore.kernel import host as this_host
from lazyrestore.restore_plan import Host

ffi = _core.ffi

HUGE_PAGE = 2 << 20  # bytes
POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
COLLECT_SECONDS = 3.0  # how long a parent may take to collect the ended original

_own_host: tuple[str, list[tuple[str, int]], frozenset[str]] | None = None


def _this_host() -> tuple[str, list[tuple[str, int]], frozenset[str]]:
    """The vdso's hash, the kernel's mappings (name, length), the CPU's features: read once per process."""
    global _own_host
    if _own_host is None:
        kernel = this_host.kernel_mappings(os.getpid())
        vdso = next(((start, size) for path, start, size in kernel if path == "[vdso]"), None)
        if vdso is None:
            raise KernelMismatch("kernel", "check", "it gives processes no vdso", "boot without vdso=0")
        content = bytes(ffi.buffer(ffi.cast("char *", vdso[0]), vdso[1]))
        layout = [(path, size) for path, _, size in kernel]
        _own_host = (this_host.vdso_hash(content), layout, this_host.cpu_flags())
    return _own_host


def check_huge_pages(name: str, needed: int, template: int) -> None:
    """Raises OutOfMemory unless the pool has the huge pages of the snapshot's content that the template does not have.

    Facts: a page that is missing when it is touched means SIGBUS. What the process will write takes pages of its own,
    which nobody can know. needed: pages of 2 MiB; template: the hugetlb memory file.
    """
    from lazyrestore.kernel.features_lazy import free_huge_pages  # few restores need it

    missing = needed - os.fstat(template).st_blocks * 512 // HUGE_PAGE
    free = free_huge_pages().get(HUGE_PAGE, 0)
    if missing > free:
        raise OutOfMemory(
            f"snapshot {name}",
            "check huge pages",
            f"its memory needs {missing} huge pages of 2 MiB, and {free} are free",
            f"raise {POOL}",
        )


def reserve_huge_pages(name: str, descriptor: int, owned: ExitStack) -> mmap.mmap:
    """All of a hugetlb memory file, mapped shared, which takes pages of the pool for all of it as long as the file is
    there. Raises OutOfMemory if there are too few."""
    size = os.fstat(descriptor).st_size
    try:
        return owned.enter_context(mmap.mmap(descriptor, size))
    except OSError as error:
        raise OutOfMemory(
            f"snapshot {name}",
            "check huge pages",
            f"its shared memory needs {size // HUGE_PAGE} huge pages of 2 MiB: {os.strerror(error.errno or 0)}",
            f"raise {POOL}",
        ) from error


def check_host(name: str, host: Host) -> None:
    """Raises CpuMismatch, KernelMismatch or MissingFeature unless a process of this snapshot can run here."""
    this_host.require_own_proc()
    own_hash, layout, flags = _this_host()
    if host.vdso_hash != own_hash or [(entry[0], entry[2]) for entry in host.vdso] != layout:
        raise KernelMismatch(
            f"snapshot {name}",
            "check kernel",
            f"it was taken on kernel {host.kernel}, whose vdso differs from this kernel's ({os.uname().release})",
            "restore on the same kernel build",
        )
    missing = sorted(set(host.cpu_flags) - flags)
    if missing:
        raise CpuMismatch(
            f"snapshot {name}",
            "check CPU",
            f"this CPU lacks {', '.join(missing)}",
            "restore on a CPU with these features",
        )


def check_pid_free(pid: int) -> None:
    """PidTaken if the process id is in use; before sockets are bound, as the one in use may be the original.

    An original that was killed keeps its id until its parent has collected it, which may take a moment, so that is
    waited for.
    """
    if not os.path.exists(f"/proc/{pid}"):
        return
    from lazyrestore.kernel import procfs  # few restores need it

    deadline = time.monotonic() + COLLECT_SECONDS
    while True:
        try:
            stat = procfs.parse_stat(procfs.read(pid, "stat"))
        except NoSuchProcess:
            return
        ended = stat.state in "ZX"
        if not ended or stat.ppid == os.getpid() or time.monotonic() > deadline:
            break
        time.sleep(0.002)
    if ended:
        reason = f"{stat.comm} has ended, but its parent, process {stat.ppid}, has not collected it"
        advice = (
            "wait() for it, or restore with --pid new (new_pid=True)"
            if stat.ppid == os.getpid()
            else "end that parent, or restore with --pid new (new_pid=True)"
        )
    else:
        reason, advice = f"it is in use by {stat.comm}", "end that process, or restore with --pid new (new_pid=True)"
    raise PidTaken(f"process id {pid}", "start process", reason, advice, errno=errno.EEXIST)
