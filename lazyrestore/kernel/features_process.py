"""Probes of what one process may do to another, of memory files and of a process's layout.

Facts. The snapshotter stops a process with ptrace and lets it make calls through a stub in the zero padding behind the
vdso's code; the restorer gives a new process its old id, its old layout and its old vdso address. Each of these hangs
on a capability, a kernel option, Yama, a sysctl or a container's filter.
Choice. Each is done to a child made for it (features_process.c, features.c). Cost: about a millisecond each.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

from lazyrestore import _native
from lazyrestore._native import _core
from lazyrestore.kernel import cpu_latency
from lazyrestore.kernel.features_record import Probe, native, trying

STUB_ROOM = 256  # bytes: the stub takes about 200 (docs/architecture.md)
IMAGE_SIZE = 1 << 47  # bytes: the user half of the address space, the size of a template
STATE_COMPONENTS = {  # bits of XCR0, Intel SDM volume 1, 13.1
    0: "x87",
    1: "SSE",
    2: "AVX",
    5: "AVX-512 opmask",
    6: "AVX-512 ZMM_Hi256",
    7: "AVX-512 Hi16_ZMM",
    9: "PKRU",
    17: "AMX TILECFG",
    18: "AMX TILEDATA",
}
ROOT = "run as root (in a container: with the capability, and a seccomp profile that allows it)"


def vdso_range() -> tuple[int, int]:
    """Where our vdso is mapped: start and end address, end exclusive. Raises OSError without one."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            start, end = line.split(" ", 1)[0].split("-")
            return int(start, 16), int(end, 16)
    raise OSError(0, "this process has no vdso", "/proc/self/maps")


def vdso_tail() -> int:
    """Zero bytes at the end of our vdso's mapping."""
    start, end = vdso_range()
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        code = os.pread(memory.fileno(), end - start, start)
    return len(code) - len(code.rstrip(b"\0"))


def cpu_state() -> list[str]:
    """The CPU's state components that the kernel has switched on, by name."""
    bits = _core.lib.lr_cpu_xcr0()
    return [STATE_COMPONENTS.get(bit, f"component {bit}") for bit in range(64) if bits >> bit & 1]


def _architecture() -> str:
    if platform.machine() != "x86_64":
        raise OSError(0, f"this is {platform.machine()}", "uname")
    return ""


def _xsave() -> str:
    if not _core.lib.lr_cpu_xcr0():
        raise OSError(0, "this CPU has no XSAVE, or the kernel does not use it", "cpuid")
    native("trace", _core.lib.LR_TRACE_XSTATE, 0)
    return f"{', '.join(cpu_state())}; {_core.lib.lr_cpu_xsave_size()} bytes"


def _tail() -> str:
    room = vdso_tail()
    if room < STUB_ROOM:
        raise OSError(0, f"{room} bytes", "/proc/self/maps")
    return f"{room} bytes"


def _write_vdso() -> str:
    native("trace", _core.lib.LR_TRACE_MEMORY, vdso_range()[1] - 64)
    return ""


def _move_vdso() -> str:
    native("move", *vdso_range())
    return ""


def _pagerd() -> str:
    path = Path(_native.__file__).with_name("pagerd")
    if not os.access(path, os.X_OK):
        raise OSError(0, "not built", str(path))
    return ""


def _tracing(what: str) -> Callable[[], str]:
    return trying("trace", getattr(_core.lib, f"LR_TRACE_{what}"), 0)


def _cpu_latency() -> str:
    device = cpu_latency.request()
    try:
        if int.from_bytes(os.read(device, 4), "little"):
            raise OSError(0, "the kernel does not heed it", cpu_latency.DEVICE)
    finally:
        os.close(device)
    return "" if cpu_latency.wanted() else f"switched off by {cpu_latency.SWITCH}"


PROBES = (
    Probe(
        "x86-64",
        "registers, the stub and the executor are this architecture's",
        True,
        "uname",
        "everything",
        "a 64-bit x86 machine",
        _architecture,
    ),
    Probe(
        "pagerd",
        "the program that serves restored memory",
        True,
        "the file beside the extension",
        "restore",
        "install again: tools/setup, or pip install .",
        _pagerd,
    ),
    Probe(
        "ptrace",
        "stopping a process and reading its registers",
        True,
        "seize, interrupt and read a child of ours",
        "snapshot and restore",
        ROOT,
        _tracing("CHILD"),
    ),
    Probe(
        "ptrace-stranger",
        "snapshotting a process that this one did not start",
        True,
        "the same with a process whose parent is gone",
        "snapshot",
        "run as root, or set kernel.yama.ptrace_scope=0",
        _tracing("STRANGER"),
    ),
    Probe(
        "xstate",
        "FPU, SSE and AVX registers",
        True,
        "read and write back a child's extended state",
        "snapshot and restore",
        "a CPU with XSAVE",
        _xsave,
    ),
    Probe(
        "ptrace-rseq",
        "restartable sequences stay registered",
        True,
        "PTRACE_GET_RSEQ_CONFIGURATION of a child",
        "snapshot",
        "Linux 5.13 or newer with CONFIG_RSEQ",
        _tracing("RSEQ"),
    ),
    Probe(
        "proc-mem-write",
        "putting the stub behind the vdso's code",
        True,
        "write a child's read-only page by /proc/PID/mem",
        "snapshot",
        "boot without proc_mem.force_override=never",
        _write_vdso,
    ),
    Probe(
        "vdso-tail",
        "room for the stub",
        True,
        f"at least {STUB_ROOM} zero bytes behind our vdso's code",
        "snapshot",
        "another kernel",
        _tail,
    ),
    Probe(
        "vdso-move",
        "the vdso goes to its old address",
        True,
        "mremap the vdso in a child",
        "restore",
        "a kernel without CONFIG_MSEAL_SYSTEM_MAPPINGS",
        _move_vdso,
    ),
    Probe(
        "kcmp",
        "duplicated descriptors stay duplicates",
        True,
        "compare a descriptor with a child's",
        "snapshot",
        "a kernel with CONFIG_KCMP; " + ROOT,
        trying("kcmp"),
    ),
    Probe(
        "pidfd-getfd",
        "fetching the userfaultfd from the new process",
        True,
        "fetch a child's descriptor",
        "restore",
        "Linux 5.6 or newer; " + ROOT,
        trying("pidfd_getfd"),
    ),
    Probe(
        "set-tid",
        "processes and threads get their old ids",
        True,
        "clone3 with set_tid",
        "restore",
        "Linux 5.5 or newer; " + ROOT,
        trying("set_tid"),
    ),
    Probe(
        "mm-map",
        "the layout that /proc shows, and the auxiliary vector",
        True,
        "PR_SET_MM_MAP in a child",
        "restore",
        "a kernel with CONFIG_CHECKPOINT_RESTORE",
        trying("mm_map"),
    ),
    Probe(
        "exe-link",
        "/proc/PID/exe names the old program",
        True,
        "PR_SET_MM_MAP with an exe file, in a child",
        "restore",
        "run as root, or with CAP_CHECKPOINT_RESTORE",
        trying("exe_link"),
    ),
    Probe(
        "memfd",
        "the memory that clones share",
        True,
        "memfd_create",
        "restore",
        "a kernel with CONFIG_MEMFD_CREATE",
        trying("memfd"),
    ),
    Probe(
        "memfd-exec",
        "the new process starts from a memfd",
        True,
        "run a tiny ELF file from a memfd",
        "restore",
        "set vm.memfd_noexec=0 or 1",
        trying("memfd_exec"),
    ),
    Probe(
        "sparse-memfd",
        "file offset is address, up to 2^47",
        True,
        "write and read the last page of a 2^47-byte memfd",
        "restore",
        "lift the file size limit (ulimit -f)",
        trying("sparse_memfd", IMAGE_SIZE),
    ),
    Probe(
        "pagemap-scan",
        "finding populated memory quickly",
        False,
        "PAGEMAP_SCAN of four pages, one touched",
        "nothing; finding the pages of large processes takes longer",
        "Linux 6.7 or newer",
        trying("pagemap_scan"),
    ),
    Probe(
        "cpu-latency",
        "idle CPUs stay awake while a process is restored",
        False,
        "ask for wake-ups of 0 us by /dev/cpu_dma_latency, and read that back",
        "nothing; faults take several times as long where idle CPUs sleep",
        ROOT,
        _cpu_latency,
    ),
    Probe(
        "pid-namespace",
        "restore --pid new",
        False,
        "a chosen process id in a new namespace",
        "restore --pid new",
        ROOT,
        trying("pid_namespace"),
    ),
    Probe(
        "seccomp-suspend",
        "processes under a seccomp filter",
        False,
        "PTRACE_O_SUSPEND_SECCOMP on a child",
        "snapshot and restore of processes under seccomp",
        "a kernel with CONFIG_CHECKPOINT_RESTORE; " + ROOT,
        _tracing("SECCOMP"),
    ),
    Probe(
        "prlimit",
        "limits of another user's process",
        False,
        "read and set a child's limit, as another user's if allowed",
        "restore of processes whose hard limits are above the restorer's",
        "grant CAP_SYS_RESOURCE",
        trying("prlimit"),
    ),
)
