"""What the kernel says of a process, in a form in which an original and its restored copy must be equal.

The oracle is /proc, read from outside. What may differ is left out, each with its reason: times, inode numbers of pipes
and sockets, how many mappings the kernel made of one range, and the 32 bytes of each thread's rseq area, which the
kernel writes.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import resource
from contextlib import suppress
from pathlib import Path

SHARED_FIELDS = ["Name", "Pid", "Uid", "Gid", "Groups", "SigPnd", "SigBlk", "CapPrm", "CapEff", "Cpus_allowed"]
STATUS_FIELDS = [
    *SHARED_FIELDS,
    *("Umask", "Tgid", "Threads", "ShdPnd", "SigIgn", "SigCgt", "CapInh", "CapBnd", "CapAmb"),
    *("NoNewPrivs", "Seccomp", "THP_enabled", "VmLck"),
]
FLAGS_KEPT = {"rd", "wr", "ex", "sh", "gd", "lo", "dc", "dd", "wf"}  # of VmFlags; the rest depends on the backing
PAGE = resource.getpagesize()
BLOCK = 32  # an rseq area's size and alignment

libc = ctypes.CDLL(None, use_errno=True)
libc.process_vm_readv.restype = ctypes.c_ssize_t

Facts = dict[str, object]


def _status(path: Path, fields: list[str]) -> dict[str, str]:
    table = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return {name: table[name].strip() for name in fields if name in table}


def tasks(pid: int) -> dict[int, dict[str, str]]:
    """Per thread: name, masks, credentials, nice value."""
    found: dict[int, dict[str, str]] = {}
    for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda path: int(path.name)):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since it was listed
            stat = (task / "stat").read_text().rpartition(")")[2].split()
            found[int(task.name)] = {
                **_status(task / "status", SHARED_FIELDS),
                "comm": (task / "comm").read_text(),
                "nice": stat[16],
                "policy": stat[38],
            }
    return found


def mappings(pid: int) -> list[tuple[int, int, str]]:
    """(start, end, permissions) of all mappings, neighbours with equal permissions merged: a restored process may
    need more or fewer VMAs for the same range. vsyscall is the kernel's, not the process's.
    """
    merged: list[tuple[int, int, str]] = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[vsyscall]"):
            continue
        span, permissions = line.split()[:2]
        start, end = (int(word, 16) for word in span.split("-"))
        if merged and merged[-1][1] == start and merged[-1][2] == permissions:
            merged[-1] = (merged[-1][0], end, permissions)
        else:
            merged.append((start, end, permissions))
    return merged


def flags(pid: int) -> list[tuple[int, int, frozenset[str]]]:
    """(start, end, VmFlags of those in FLAGS_KEPT), equal neighbours merged."""
    merged: list[tuple[int, int, frozenset[str]]] = []
    start = end = 0
    skip = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = int(match[1], 16), int(match[2], 16)
            skip = line.endswith(("[vsyscall]", "[vvar]", "[vvar_vclock]", "[vdso]"))
        elif line.startswith("VmFlags:") and not skip:
            kept = frozenset(line.split()[1:]) & FLAGS_KEPT
            if merged and merged[-1][1] == start and merged[-1][2] == kept:
                merged[-1] = (merged[-1][0], end, kept)
            else:
                merged.append((start, end, kept))
    return merged


def descriptors(pid: int) -> dict[int, tuple[str, str, str]]:
    """Per descriptor: (what it is, offset, flags). Inode numbers of pipes and sockets are left out: new objects.

    The standard streams' targets too: those to the outside are replaced.
    """
    found: dict[int, tuple[str, str, str]] = {}
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            target = re.sub(r"^(pipe|socket):\[\d+\]$", r"\1", os.readlink(entry.path))
            lines = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().splitlines()
        except FileNotFoundError:
            continue  # a JVM at work opens and closes files: this one was closed since it was listed
        info = dict(line.split(":", 1) for line in lines if ":" in line)
        found[int(entry.name)] = (target, info["pos"].strip(), info["flags"].strip())
    return found


def process_facts(pid: int) -> Facts:
    """Everything that must be equal in a restored process, by name."""
    base = Path(f"/proc/{pid}")
    stat = (base / "stat").read_text().rpartition(")")[2].split()
    return {
        "status": _status(base / "status", STATUS_FIELDS),
        "nice": stat[16],
        "addresses": stat[23:26] + stat[42:49],  # start/end code, start stack, data, brk, arguments, environment
        "tasks": tasks(pid),
        "limits": (base / "limits").read_text(),
        "comm": (base / "comm").read_text(),
        "cmdline": (base / "cmdline").read_bytes(),
        "environ": (base / "environ").read_bytes(),
        "auxv": (base / "auxv").read_bytes(),
        "personality": (base / "personality").read_text(),
        "exe": os.readlink(base / "exe"),
        "cwd": os.readlink(base / "cwd"),
        "root": os.readlink(base / "root"),
        "oom_score_adj": (base / "oom_score_adj").read_text(),
        "coredump_filter": (base / "coredump_filter").read_text(),
        "timerslack_ns": (base / "timerslack_ns").read_text(),
        "mappings": mappings(pid),
        "flags": flags(pid),
        "descriptors": descriptors(pid),
    }


def differences(before: Facts, after: Facts) -> dict[str, object]:
    """What differs, by name; for dicts and lists only the differing parts."""
    found: dict[str, object] = {}
    for name, old in before.items():
        new = after[name]
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found[name] = {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}
        elif isinstance(old, list) and isinstance(new, list):
            found[name] = ([x for x in old if x not in new], [x for x in new if x not in old])
        else:
            found[name] = (old, new)
    return found


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_memory(pid: int, address: int, length: int) -> bytes:
    """The process's memory; process_vm_readv waits for pages that a pager must bring, /proc/PID/mem answers EIO.

    Shorter than `length` where the rest of a file mapping lies behind the end of the file.
    """
    buffer = ctypes.create_string_buffer(length)
    done = 0
    while done < length:
        local, remote = Iovec(ctypes.addressof(buffer) + done, length - done), Iovec(address + done, length - done)
        got = libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if got <= 0:
            if done and ctypes.get_errno() == errno.EFAULT:
                break
            raise OSError(ctypes.get_errno(), f"process_vm_readv of {address + done:#x}")
        done += got
    return buffer.raw[:done]


def memory_blocks(pid: int) -> dict[int, bytes]:
    """The bytes of every page of every readable mapping, by address; zero pages and holes left out.

    Only for processes that are blocked: nothing may write meanwhile. Read whole: not for reservations of GiBs.
    """
    pages: dict[int, bytes] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        start, end = (int(word, 16) for word in span.split("-"))
        if "r" not in permissions or line.endswith(("[vvar]", "[vvar_vclock]", "[vsyscall]")):
            continue
        data = read_memory(pid, start, end - start)
        for offset in range(0, len(data), PAGE):
            if any(page := data[offset : offset + PAGE]):
                pages[start + offset] = page
    return pages


def memory_differences(before: dict[int, bytes], after: dict[int, bytes]) -> list[int]:
    """Addresses of the 32-byte blocks that differ."""
    zero = bytes(PAGE)
    found: list[int] = []
    for address in sorted(before.keys() | after.keys()):
        old, new = before.get(address, zero), after.get(address, zero)
        if old != new:
            found += [address + at for at in range(0, PAGE, BLOCK) if old[at : at + BLOCK] != new[at : at + BLOCK]]
    return found


def digest(pages: dict[int, bytes]) -> str:
    """One digest of all pages with their addresses."""
    total = hashlib.sha256()
    for address in sorted(pages):
        total.update(address.to_bytes(8, "little") + pages[address])
    return total.hexdigest()
