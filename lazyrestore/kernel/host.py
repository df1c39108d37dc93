"""What a process relies on of the host it runs on: the kernel's mappings in it, and the CPU's features.

Apart from `procfs`, since a restore needs nothing else of /proc, and its modules are most of what it waits for.
"""

from __future__ import annotations

import os

from lazyrestore.errors import MissingFeature, NoSuchProcess

KERNEL_MAPPINGS = ("[vdso]", "[vvar]", "[vvar_vclock]")
"""The paths, in maps, of what the kernel maps into every process."""

STUB_LENGTH = 256  # bytes at the vdso's end where a stub may stand (kernel/tracee.py)


def kernel_mappings(pid: int) -> list[tuple[str, int, int]]:
    """(path, start, length) of what the kernel has mapped into a process, in address order. NoSuchProcess."""
    try:
        with open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
            text = file.readall() or b""
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess(f"process {pid}", f"read /proc/{pid}/maps", "no such process") from error
    found = []
    for line in text.splitlines():
        if line.endswith(b"]"):
            path = line[line.rindex(b"[") :].decode(errors="replace")
            if path in KERNEL_MAPPINGS and line.split(None, 5)[5].decode(errors="replace") == path:
                start, _, end = line.partition(b" ")[0].partition(b"-")
                found.append((path, int(start, 16), int(end, 16) - int(start, 16)))
    return found


def vdso_hash(content: bytes) -> str:
    """Identifies a vdso: all of it but the padding at its end, where a stub may stand."""
    from _blake2 import blake2b  # hashlib's own, without OpenSSL, which takes 3 ms to load

    return blake2b(content[:-STUB_LENGTH], digest_size=16).hexdigest()


def cpu_flags() -> frozenset[str]:
    """The feature flags of this machine's CPUs (those that all have)."""
    with open("/proc/cpuinfo", "rb", buffering=0) as file:
        text = file.readall() or b""
    lines = {line.partition(b":")[2] for line in text.splitlines() if line.startswith(b"flags") and b":" in line}
    sets = [frozenset(line.split()) for line in lines]
    common = frozenset.intersection(*sets) if sets else frozenset[bytes]()
    return frozenset(flag.decode() for flag in common)


def require_own_proc() -> None:
    """MissingFeature unless /proc shows our PID namespace: in another's, a process id is that of another process."""
    try:
        own = os.readlink("/proc/self")
    except OSError:
        own = ""
    if own != str(os.getpid()):
        advice = "mount one of your own (unshare --mount-proc, or mount -t proc proc /proc)"
        raise MissingFeature("/proc", "read", "it shows another PID namespace than this one", advice)
