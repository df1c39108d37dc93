"""What belongs to the process as a whole: memory layout fields, working directory, credentials, limits, prctl's flags.

Facts. PR_SET_MM_MAP sets all layout fields, auxv and the exe link in one call (CAP_SYS_RESOURCE); the exe link may only
change once no mapping of the old executable is left. Changing user or group ids clears `dumpable` and, without
KEEPCAPS, the capabilities, so the order is: bounding set, groups, gids, uids, capabilities, ambient set, dumpable.
Threads have credentials of their own; they inherit those of the thread that makes them, and making a thread with a
chosen id takes a privilege, so every thread drops its privileges itself, last. Source: prctl(2), capabilities(7),
kernel/sys.c.
"""

from __future__ import annotations

import os
import struct

import msgspec

from lazyrestore.errors import FileChanged, UnsupportedResources
from lazyrestore.kernel import procfs
from lazyrestore.kernel.tracee import Frozen, check
from lazyrestore.program import Descriptors, OpList, Program, lib

LIMITS = (
    "CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE",
    "MEMLOCK", "AS", "LOCKS", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME",
)  # fmt: skip
RLIMITS = range(len(LIMITS))
MEMBARRIER_GET_REGISTRATIONS = 1 << 9  # linux/membarrier.h
MEMBARRIER_REGISTER = 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8  # global, private, that of cores, that of rseq
DROPPED_PRIVILEGES_LAST = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


class Memory(msgspec.Struct, frozen=True):
    """mm_struct's fields, addresses; auxv as in /proc/PID/auxv."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_brk: int
    brk: int
    start_stack: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    auxv: bytes


class Credentials(msgspec.Struct, frozen=True):
    """uids and gids: real, effective, saved, file system.

    capabilities: inheritable, permitted, effective, bounding, ambient.
    """

    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    groups: list[int]
    capabilities: tuple[int, int, int, int, int]
    no_new_privileges: bool
    secure_bits: int


class Attributes(msgspec.Struct, frozen=True):
    executable: str
    command_line: bytes
    memory: Memory
    credentials: Credentials
    cwd: str
    root: str
    umask: int
    personality: int
    limits: list[tuple[int, int]]
    dumpable: int
    keep_capabilities: int
    parent_death_signal: int
    child_subreaper: int
    thp_disable: int
    deny_write_execute: int  # PR_GET_MDWE
    memory_merge: int
    oom_score_adjust: int
    session_leader: bool
    group_leader: bool
    core_dump_filter: int
    stopped: bool
    membarriers: int = 0  # MEMBARRIER_CMD_GET_REGISTRATIONS


def credentials_of(pid: int, tid: int) -> Credentials:
    status = procfs.parse_status(procfs.read(pid, f"task/{tid}/status"))
    uids = tuple(int(word) for word in status["Uid"].split())
    gids = tuple(int(word) for word in status["Gid"].split())
    return Credentials(
        uids=(uids[0], uids[1], uids[2], uids[3]),
        gids=(gids[0], gids[1], gids[2], gids[3]),
        groups=[int(word) for word in status["Groups"].split()],
        capabilities=(*(int(status[name], 16) for name in DROPPED_PRIVILEGES_LAST),),  # type: ignore[arg-type]
        no_new_privileges=status.get("NoNewPrivs") == "1",
        secure_bits=0,
    )


def out_of_place(pid: int) -> list[str]:
    """What the process runs and where it is, if the path of that does not lead to it any more; one line each."""
    lines = []
    for name, what in (("exe", "an executable"), ("cwd", "a working directory"), ("root", "a root directory")):
        try:
            path = os.readlink(f"/proc/{pid}/{name}")
        except FileNotFoundError:  # it is ending
            continue
        try:
            in_place = os.path.samestat(os.stat(f"/proc/{pid}/{name}"), os.stat(path))
        except OSError:
            in_place = False
        if not in_place:
            lines.append(f"{what} that was deleted or replaced ({path})")
    return lines


def check_place(attributes: Attributes) -> None:
    """FileChanged if its working directory or root is gone."""
    for what, path in (("working directory", attributes.cwd), ("root directory", attributes.root)):
        if not os.path.isdir(path):
            raise FileChanged(f"{what} {path}", "enter", "it is gone", "make it again, or take a new snapshot")


def capture(frozen: Frozen, *, stopped: bool) -> Attributes:
    """stopped: whether it was stopped by job control before it was frozen."""
    pid = frozen.pid
    stat = procfs.parse_stat(procfs.read(pid, "stat"))
    status = procfs.parse_status(procfs.read(pid, "status"))
    with frozen.calls(pid) as call:
        dumpable = check(call(lib.SYS_prctl, lib.PR_GET_DUMPABLE), pid, "PR_GET_DUMPABLE")
        keep = check(call(lib.SYS_prctl, lib.PR_GET_KEEPCAPS), pid, "PR_GET_KEEPCAPS")
        secure_bits = check(call(lib.SYS_prctl, lib.PR_GET_SECUREBITS), pid, "PR_GET_SECUREBITS")
        deny = max(0, call(lib.SYS_prctl, lib.PR_GET_MDWE))  # before Linux 6.3: EINVAL
        merge = max(0, call(lib.SYS_prctl, lib.PR_GET_MEMORY_MERGE))
        thp = check(call(lib.SYS_prctl, lib.PR_GET_THP_DISABLE), pid, "PR_GET_THP_DISABLE")
        if call(lib.SYS_modify_ldt, 0, frozen.scratch, 8) > 0:
            raise UnsupportedResources(f"process {pid}", ["segments of its own (modify_ldt)"])
        membarriers = call(lib.SYS_membarrier, MEMBARRIER_GET_REGISTRATIONS, 0, 0)
        if membarriers < 0:  # before Linux 6.3 nothing tells; to be registered in vain does no harm
            membarriers = call(lib.SYS_membarrier, 0, 0, 0) & MEMBARRIER_REGISTER
        check(call(lib.SYS_prctl, lib.PR_GET_PDEATHSIG, frozen.scratch), pid, "PR_GET_PDEATHSIG")
        check(call(lib.SYS_prctl, lib.PR_GET_CHILD_SUBREAPER, frozen.scratch + 8), pid, "PR_GET_CHILD_SUBREAPER")
        death, subreaper = struct.unpack("<i4xi4x", frozen.read(frozen.scratch, 16))
        brk = call(lib.SYS_brk, 0)
    memory = Memory(
        stat.start_code,
        stat.end_code,
        stat.start_data,
        stat.end_data,
        stat.start_brk,
        brk,
        stat.start_stack,
        stat.arg_start,
        stat.arg_end,
        stat.env_start,
        stat.env_end,
        procfs.auxv(pid),
    )
    return Attributes(
        executable=os.readlink(f"/proc/{pid}/exe"),
        command_line=procfs.read(pid, "cmdline"),
        memory=memory,
        credentials=msgspec.structs.replace(credentials_of(pid, pid), secure_bits=secure_bits),
        cwd=os.readlink(f"/proc/{pid}/cwd"),
        root=os.readlink(f"/proc/{pid}/root"),
        umask=int(status["Umask"], 8),
        personality=int(procfs.read(pid, "personality"), 16),
        limits=procfs.parse_limits(procfs.read(pid, "limits")),
        dumpable=dumpable,
        keep_capabilities=keep,
        parent_death_signal=death,
        child_subreaper=subreaper,
        thp_disable=thp,
        deny_write_execute=deny,
        memory_merge=merge,
        oom_score_adjust=int(procfs.read(pid, "oom_score_adj")),
        session_leader=stat.session == pid,
        group_leader=stat.pgrp == pid,
        stopped=stopped,
        core_dump_filter=int(procfs.read(pid, "coredump_filter") or b"0", 16),
        membarriers=max(0, membarriers),
    )


# -- restore -----------------------------------------------------------------------------------------------------------


def restore_memory(attributes: Attributes, program: Program, ops: OpList, fds: Descriptors) -> None:
    m = attributes.memory
    with ops.serving(f"executable {attributes.executable}"):
        executable = fds.create(
            lib.SYS_openat, lib.AT_FDCWD, program.string(attributes.executable), os.O_RDONLY | os.O_CLOEXEC
        )
        auxv = program.place(m.auxv)
        fields = (
            m.start_code,
            m.end_code,
            m.start_data,
            m.end_data,
            m.start_brk,
            m.brk,
            m.start_stack,
            m.arg_start,
            m.arg_end,
            m.env_start,
            m.env_end,
        )
        layout = program.place(struct.pack("<12QIi", *fields, 0, len(m.auxv), executable))
        program.pointer_at(layout + 11 * 8, auxv)
        ops.call(lib.SYS_prctl, lib.PR_SET_MM, lib.PR_SET_MM_MAP, layout, 12 * 8 + 8, 0)
        fds.close(executable)


def restore_place(attributes: Attributes, program: Program, ops: OpList) -> None:
    """Root, working directory and umask; paths are opened before this."""
    with ops.serving(f"working directory {attributes.cwd}"):
        ops.call(lib.SYS_chdir, program.string(attributes.cwd))
    if attributes.root != "/":  # both paths are the outside's, so this comes second
        with ops.serving(f"root directory {attributes.root}"):
            ops.call(lib.SYS_chroot, program.string(attributes.root))
    ops.call(lib.SYS_umask, attributes.umask)


def restore_membarriers(attributes: Attributes, ops: OpList) -> None:
    """While there is one thread: with more, the kernel waits until every CPU has been through its scheduler."""
    for command in (1 << bit for bit in range(attributes.membarriers.bit_length())):
        if attributes.membarriers & command:
            ops.call(lib.SYS_membarrier, command, 0, 0)


def restore_flags(attributes: Attributes, program: Program, ops: OpList) -> None:
    with ops.serving("process attributes"):
        ops.call(lib.SYS_personality, attributes.personality)
        # Whatever it is: the restorer's is inherited. Since Linux 6.18 there are flags above the first bit.
        disable = attributes.thp_disable
        ops.call(lib.SYS_prctl, lib.PR_SET_THP_DISABLE, disable & 1, disable & ~1, 0, 0)
        if attributes.child_subreaper:
            ops.call(lib.SYS_prctl, lib.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with ops.serving("resource limits"):
        # All of them, though most are the restorer's already: the program then does not depend on the restorer's.
        for which, limit in zip(RLIMITS, attributes.limits, strict=True):
            words = struct.pack("<QQ", *(value & (1 << 64) - 1 for value in limit))
            ops.call(lib.SYS_prlimit64, 0, which, program.place(words), 0, note=f"RLIMIT_{LIMITS[which]}")


def restore_credentials(attributes: Attributes, own: Credentials, program: Program, ops: OpList) -> None:
    """Append to one thread's list what turns the restorer's credentials (`own`) into the process's."""
    want = attributes.credentials
    with ops.serving("credentials"):
        changed = (want.uids, want.gids, want.groups, want.capabilities) != (
            own.uids,
            own.gids,
            own.groups,
            own.capabilities,
        )
        if changed:
            for capability in range(64):
                if own.capabilities[3] >> capability & 1 and not want.capabilities[3] >> capability & 1:
                    ops.call(lib.SYS_prctl, lib.PR_CAPBSET_DROP, capability, 0, 0, 0)
            ops.call(lib.SYS_prctl, lib.PR_SET_KEEPCAPS, 1, 0, 0, 0)
            groups = program.place(struct.pack(f"<{len(want.groups)}I", *want.groups))
            ops.call(lib.SYS_setgroups, len(want.groups), groups)
            ops.call(lib.SYS_setresgid, *want.gids[:3])
            ops.call(lib.SYS_setresuid, *want.uids[:3])
            if want.gids[3] != want.gids[1]:
                ops.try_call(lib.SYS_setfsgid, want.gids[3])
            if want.uids[3] != want.uids[1]:
                ops.try_call(lib.SYS_setfsuid, want.uids[3])
        if want.secure_bits & ~0x10:
            ops.call(lib.SYS_prctl, lib.PR_SET_SECUREBITS, want.secure_bits & ~0x10, 0, 0, 0)
        if changed:
            inheritable, permitted, effective = want.capabilities[:3]
            header = program.place(struct.pack("<Ii", 0x20080522, 0))  # _LINUX_CAPABILITY_VERSION_3
            low = 0xFFFFFFFF
            words = struct.pack(
                "<6I",
                effective & low,
                permitted & low,
                inheritable & low,
                effective >> 32,
                permitted >> 32,
                inheritable >> 32,
            )
            ops.call(lib.SYS_capset, header, program.place(words))
            for capability in range(64):
                if want.capabilities[4] >> capability & 1:
                    ops.call(lib.SYS_prctl, lib.PR_CAP_AMBIENT, lib.PR_CAP_AMBIENT_RAISE, capability, 0, 0)
        if changed or attributes.keep_capabilities:
            ops.call(lib.SYS_prctl, lib.PR_SET_KEEPCAPS, attributes.keep_capabilities, 0, 0, 0)
        if want.no_new_privileges:
            ops.call(lib.SYS_prctl, lib.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def restore_after_credentials(attributes: Attributes, ops: OpList) -> None:
    """What a change of credentials would have reset."""
    with ops.serving("process attributes"):
        if attributes.memory_merge:
            ops.call(lib.SYS_prctl, lib.PR_SET_MEMORY_MERGE, 1, 0, 0, 0)
        else:  # the restorer's is inherited; before Linux 6.4 there is none
            ops.try_call(lib.SYS_prctl, lib.PR_SET_MEMORY_MERGE, 0, 0, 0, 0)
        if attributes.deny_write_execute:
            ops.call(lib.SYS_prctl, lib.PR_SET_MDWE, attributes.deny_write_execute, 0, 0, 0)
        if attributes.dumpable in (0, 1):
            ops.call(lib.SYS_prctl, lib.PR_SET_DUMPABLE, attributes.dumpable, 0, 0, 0)
        if attributes.parent_death_signal:
            ops.call(lib.SYS_prctl, lib.PR_SET_PDEATHSIG, attributes.parent_death_signal, 0, 0, 0)
