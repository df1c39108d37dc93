"""A network namespace of its own for a restored process, for `--net new`: every port and abstract name is free in it.

Facts. A new network namespace has one interface, lo, which is down, so that even 127.0.0.1 cannot be reached
(network_namespaces(7)); SIOCSIFFLAGS brings it up (netdevice(7)). A socket belongs for ever to the namespace it was
made in, so a socket of the caller that the process inherits stays the way in.
"""

from __future__ import annotations

import socket
import struct

from lazyrestore.program import Descriptors, OpList, Program, lib


def enter_new(program: Program, ops: OpList, fds: Descriptors) -> None:
    """Append the way into a new network namespace, with its loopback interface up. It takes CAP_SYS_ADMIN."""
    with ops.serving("network namespace"):
        ops.call(lib.SYS_unshare, lib.CLONE_NEWNET)
        control = fds.create(lib.SYS_socket, socket.AF_INET, socket.SOCK_DGRAM | lib.SOCK_CLOEXEC, 0)
        request = program.place(struct.pack("<16sh22x", b"lo", lib.IFF_UP))  # struct ifreq
        ops.call(lib.SYS_ioctl, control, lib.SIOCSIFFLAGS, request, note="lo up")
        fds.close(control)
