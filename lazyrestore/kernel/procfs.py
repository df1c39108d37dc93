"""Parsers of /proc/PID files: bytes to records, without side effects; and small readers built on them.

Facts. /proc/PID/maps and smaps list VMAs in address order, one header line each: `start-end perms offset dev inode
path`; the path is escaped only for newlines (\\012), and a file that was unlinked has " (deleted)" behind it. smaps
walks every page table, so its cost grows with the resident memory; its VmFlags line (two letters a flag) is the only
place that tells madvise() settings. /proc/PID/stat's second field may hold spaces and parentheses: it ends at the last
')'. Source: proc(5), fs/proc/task_mmu.c.
"""

from __future__ import annotations

import os
import re
import socket
import struct

import msgspec

from lazyrestore.errors import NoSuchProcess


class Mapping(msgspec.Struct, frozen=True):
    """One line of maps; `flags` only from smaps. Addresses in bytes, `end` exclusive."""

    start: int
    end: int
    read: bool
    write: bool
    execute: bool
    shared: bool
    offset: int
    device: str
    inode: int
    path: str
    deleted: bool
    flags: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def file(self) -> tuple[int, int]:
        """(device, inode) of what is mapped, as stat() says them."""
        major, minor = (int(part, 16) for part in self.device.split(":"))
        return os.makedev(major, minor), self.inode

    @property
    def anonymous(self) -> bool:
        """No file behind it, as the kernel sees it."""
        return self.inode == 0


_HEADER = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ([r-])([w-])([x-])([sp]) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+) *([^\n]*)$"
    rb"(?:(?:\n[A-Z][^\n]*)*?\nVmFlags:([a-z0-9? ]*))?",
    re.MULTILINE,
)


def parse_maps(text: bytes) -> list[Mapping]:
    """The mappings of a maps or smaps text; the vsyscall page, which is no VMA, is left out."""
    mappings = []
    for found in _HEADER.finditer(text):
        start, end, r, w, x, kind, offset, device, inode, path, flags = found.groups()
        name = os.fsdecode(path.replace(b"\\012", b"\n"))
        if name == "[vsyscall]":
            continue
        deleted = name.endswith(" (deleted)") and inode != b"0"
        mappings.append(
            Mapping(
                int(start, 16),
                int(end, 16),
                r == b"r",
                w == b"w",
                x == b"x",
                kind == b"s",
                int(offset, 16),
                device.decode(),
                int(inode),
                name.removesuffix(" (deleted)") if deleted else name,
                deleted,
                tuple(flags.decode().split()) if flags else (),
            )
        )
    return mappings


class Stat(msgspec.Struct, frozen=True):
    """The fields of /proc/PID/stat that matter here."""

    comm: str
    state: str
    ppid: int
    pgrp: int
    session: int
    tty: int
    flags: int
    nice: int
    start_code: int
    end_code: int
    start_stack: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    rt_priority: int
    policy: int
    pending: int
    """Bit n-1: signal n waits for the thread itself; the first 31 only."""

    @property
    def kernel_thread(self) -> bool:
        return bool(self.flags & 0x00200000)  # PF_KTHREAD, include/linux/sched.h


def parse_stat(text: bytes) -> Stat:
    name, _, rest = text[text.index(b"(") + 1 :].rpartition(b")")
    f = [b"", b"", b"", *rest.split()]  # f[n] is field number n of proc(5)
    return Stat(
        os.fsdecode(name),
        f[3].decode(),
        *(int(f[n]) for n in (4, 5, 6, 7, 9, 19, 26, 27, 28, 45, 46, 47, 48, 49, 50, 51, 40, 41, 31)),
    )


def parse_status(text: bytes) -> dict[str, str]:
    """/proc/PID/status as a dictionary of its lines."""
    return {
        key: value.strip()
        for key, _, value in (line.partition(":") for line in text.decode(errors="surrogateescape").splitlines())
    }


def parse_limits(text: bytes) -> list[tuple[int, int]]:
    """/proc/PID/limits as (soft, hard) by resource number, -1 for unlimited.

    The file's lines are in the order of the resource numbers (fs/proc/base.c).
    """
    limits = []
    for line in text.decode().splitlines()[1:]:
        soft, hard = line[26:46].strip(), line[47:67].strip()
        limits.append((-1 if soft == "unlimited" else int(soft), -1 if hard == "unlimited" else int(hard)))
    return limits


def read(pid: int, name: str) -> bytes:
    """The contents of /proc/PID/name; NoSuchProcess when the process is gone."""
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.readall() or b""
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess(f"process {pid}", f"read /proc/{pid}/{name}", "no such process") from error


def threads(pid: int) -> list[int]:
    """The thread ids of a process, ascending."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess(f"process {pid}", "list threads", "no such process") from error


def is_exiting(pid: int, tid: int) -> bool:
    """Whether a thread ends, or has: it gives back what it shares (descriptors, namespaces) before it goes."""
    try:
        return bool(parse_stat(read(pid, f"task/{tid}/stat")).flags & 0x00000004)  # PF_EXITING, include/linux/sched.h
    except NoSuchProcess:
        return True


def children(pid: int) -> list[int]:
    """The children of all of a process's threads."""
    found: list[int] = []
    for tid in threads(pid):
        try:
            with open(f"/proc/{pid}/task/{tid}/children", "rb") as file:
                found += [int(child) for child in file.read().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread ended
    return found


def auxv(pid: int) -> bytes:
    return read(pid, "auxv")


def multicast_groups() -> list[tuple[int, int, bytes]]:
    """The groups that the interfaces of our network namespace are in: (IPPROTO_IP or IPPROTO_IPV6, interface, group as
    a struct sockaddr_storage)."""
    found = []
    interface = 0
    for line in _lines("/proc/self/net/igmp")[1:]:
        words = line.split()
        if line[:1].isdigit():
            interface = int(words[0])
        else:
            address = struct.pack("=HxxI120x", socket.AF_INET, int(words[0], 16))
            found.append((int(socket.IPPROTO_IP), interface, address))
    for line in _lines("/proc/self/net/igmp6"):
        number, _, group, *_ = line.split()
        address = struct.pack("=Hxx4x16s104x", socket.AF_INET6, bytes.fromhex(group))
        found.append((int(socket.IPPROTO_IPV6), int(number), address))
    return found


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.readlines()
    except FileNotFoundError:  # a kernel without it
        return []
