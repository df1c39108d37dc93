"""Names of capabilities. Facts: bit n of a set in /proc/PID/status is capability number n of <linux/capability.h>."""

from __future__ import annotations

_NAMES = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
]

SYS_PTRACE = 1 << _NAMES.index("SYS_PTRACE")


def names(capabilities: int) -> list[str]:
    """Of a set, as in /proc/PID/status: ["CAP_CHOWN", ...]; a number where a newer kernel has more."""
    return [
        f"CAP_{_NAMES[bit]}" if bit < len(_NAMES) else f"capability {bit}"
        for bit in range(capabilities.bit_length())
        if capabilities >> bit & 1
    ]
