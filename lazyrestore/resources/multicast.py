"""Multicast groups that a UDP socket is a member of.

Facts. A socket's memberships are not listed anywhere. But /proc/net/igmp and igmp6 tell which groups an interface is in
on behalf of whomever, and getsockopt(MCAST_MSFILTER) fails with EADDRNOTAVAIL for a group that the socket is not in.
Consequence. Each socket is asked for each of those groups, of which there are few. A membership is written down as the
option that makes it.
Cost. Lists of sources (IP_ADD_SOURCE_MEMBERSHIP, IP_BLOCK_SOURCE) are refused.
"""

from __future__ import annotations

import socket
import struct

from lazyrestore.resources.descriptor import Survey, Unsupported
from lazyrestore.resources.socket_options import Option

_MCAST_JOIN_GROUP = 42  # linux/in.h
_MCAST_EXCLUDE = 0


def capture(sock: socket.socket, survey: Survey) -> tuple[Option, ...]:
    """The memberships of a duplicate. Unsupported, OSError."""
    from lazyrestore.kernel import libc

    found = []
    for level, interface, group in survey.multicast_groups():
        if level == socket.IPPROTO_IPV6 and sock.family != socket.AF_INET6:
            continue
        filtered = libc.multicast_filter(sock.fileno(), level, interface, group)
        if filtered is None:
            continue
        if filtered != (_MCAST_EXCLUDE, 0):
            raise Unsupported("in a multicast group for some sources only")
        found.append(Option(level, _MCAST_JOIN_GROUP, struct.pack("=I4x", interface) + group))
    return tuple(found)
