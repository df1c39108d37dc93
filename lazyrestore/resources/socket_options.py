"""Socket options: those that differ from a fresh socket's.

Facts. getsockopt() through a duplicate reads any option; there is no list of what was set, so a fresh socket of the
same kind is the yardstick. SO_SNDBUF and SO_RCVBUF read as twice what was set, and setting one switches its
autotuning off, which SO_BUF_LOCK (5.14) tells. Attached programs cannot be read back; multicast.py reads memberships.

Consequence. Only differing options are recorded; buffer sizes only if they are locked. A filter, whose presence can
be seen, is refused.
"""

from __future__ import annotations

import socket
import struct

import msgspec

from lazyrestore._native import _core
from lazyrestore.resources.descriptor import Build, Survey, Unsupported

lib = _core.lib


class Option(msgspec.Struct, frozen=True, array_like=True):
    level: int
    name: int
    value: bytes


_SNDBUF = (socket.SOL_SOCKET, socket.SO_SNDBUF)
_RCVBUF = (socket.SOL_SOCKET, socket.SO_RCVBUF)
_BUF_LOCK = (socket.SOL_SOCKET, int(lib.SO_BUF_LOCK))
# What a connection leaves in them, or allows, a socket without one may not take:
# TCP_MAXSEG, WINDOW_CLAMP, RTO_MIN_US, DELACK_MAX_US, SO_TIMESTAMPING_OLD, _NEW.
_TRACES = {(6, 2), (6, 10), (6, 45), (6, 46), (1, 37), (1, 65)}
_LOCKED = {_SNDBUF: 1, _RCVBUF: 2}
_FORCE = {_SNDBUF: int(lib.SO_SNDBUFFORCE), _RCVBUF: int(lib.SO_RCVBUFFORCE)}

# In the order in which they are set: IP_TOS changes SO_PRIORITY.
# Numbers without a name in Python are from linux/in.h, in6.h, tcp.h and udp.h.
_IP = [
    (socket.IPPROTO_IP, number)
    for number in (
        socket.IP_TOS,
        socket.IP_TTL,
        socket.IP_MULTICAST_TTL,
        socket.IP_MULTICAST_LOOP,
        socket.IP_MULTICAST_IF,
        socket.IP_TRANSPARENT,
        6,  # IP_RECVOPTS
        7,  # IP_RETOPTS
        8,  # IP_PKTINFO
        10,  # IP_MTU_DISCOVER
        11,  # IP_RECVERR
        12,  # IP_RECVTTL
        socket.IP_RECVTOS,
        15,  # IP_FREEBIND
        18,  # IP_PASSSEC
        20,  # IP_RECVORIGDSTADDR
        21,  # IP_MINTTL
        23,  # IP_CHECKSUM
        24,  # IP_BIND_ADDRESS_NO_PORT
        25,  # IP_RECVFRAGSIZE
        26,  # IP_RECVERR_RFC4884
        49,  # IP_MULTICAST_ALL
        51,  # IP_LOCAL_PORT_RANGE
    )
]
_IPV6 = [
    (socket.IPPROTO_IPV6, number)
    for number in (
        socket.IPV6_V6ONLY,
        socket.IPV6_UNICAST_HOPS,
        socket.IPV6_MULTICAST_HOPS,
        socket.IPV6_MULTICAST_IF,
        socket.IPV6_MULTICAST_LOOP,
        socket.IPV6_RECVPKTINFO,
        socket.IPV6_RECVHOPLIMIT,
        socket.IPV6_RECVTCLASS,
        socket.IPV6_TCLASS,
        2,  # IPV6_2292PKTINFO
        3,  # IPV6_2292HOPOPTS
        4,  # IPV6_2292DSTOPTS
        5,  # IPV6_2292RTHDR
        8,  # IPV6_2292HOPLIMIT
        11,  # IPV6_FLOWINFO
        23,  # IPV6_MTU_DISCOVER
        25,  # IPV6_RECVERR
        29,  # IPV6_MULTICAST_ALL
        31,  # IPV6_RECVERR_RFC4884
        33,  # IPV6_FLOWINFO_SEND
        socket.IPV6_RECVHOPOPTS,
        socket.IPV6_RECVRTHDR,
        socket.IPV6_RECVDSTOPTS,
        60,  # IPV6_RECVPATHMTU
        62,  # IPV6_DONTFRAG
        70,  # IPV6_AUTOFLOWLABEL
        72,  # IPV6_ADDR_PREFERENCES
        73,  # IPV6_MINHOPCOUNT
        74,  # IPV6_RECVORIGDSTADDR
        75,  # IPV6_TRANSPARENT
        77,  # IPV6_RECVFRAGSIZE
        78,  # IPV6_FREEBIND
    )
]
_TCP = [
    (socket.IPPROTO_TCP, number)
    for number in (
        socket.TCP_NODELAY,
        socket.TCP_MAXSEG,
        socket.TCP_WINDOW_CLAMP,
        socket.TCP_DEFER_ACCEPT,
        socket.TCP_KEEPIDLE,
        socket.TCP_KEEPINTVL,
        socket.TCP_KEEPCNT,
        socket.TCP_USER_TIMEOUT,
        socket.TCP_FASTOPEN,
        socket.TCP_SYNCNT,
        socket.TCP_LINGER2,
        socket.TCP_CORK,
        socket.TCP_CONGESTION,
        16,  # TCP_THIN_LINEAR_TIMEOUTS
        25,  # TCP_NOTSENT_LOWAT
        27,  # TCP_SAVE_SYN
        30,  # TCP_FASTOPEN_CONNECT
        34,  # TCP_FASTOPEN_NO_COOKIE
        36,  # TCP_INQ
        37,  # TCP_TX_DELAY
        44,  # TCP_RTO_MAX_MS
        45,  # TCP_RTO_MIN_US
        46,  # TCP_DELACK_MAX_US
    )
]
# UDP_CORK, ENCAP, NO_CHECK6_TX, NO_CHECK6_RX, SEGMENT, GRO
_UDP = [(socket.IPPROTO_UDP, number) for number in (1, 100, 101, 102, 103, 104)]
_SOCKET = [
    (socket.SOL_SOCKET, number)
    for number in (
        socket.SO_REUSEADDR,
        socket.SO_REUSEPORT,
        socket.SO_KEEPALIVE,
        socket.SO_BROADCAST,
        socket.SO_OOBINLINE,
        socket.SO_DONTROUTE,
        socket.SO_PRIORITY,
        socket.SO_MARK,
        socket.SO_RCVLOWAT,
        socket.SO_LINGER,
        socket.SO_RCVTIMEO,
        socket.SO_SNDTIMEO,
        socket.SO_BINDTODEVICE,
        socket.SO_PASSCRED,
        int(lib.SO_PASSSEC),
        int(lib.SO_PEEK_OFF),
        29,  # SO_TIMESTAMP_OLD
        35,  # SO_TIMESTAMPNS_OLD
        63,  # SO_TIMESTAMP_NEW
        64,  # SO_TIMESTAMPNS_NEW
        76,  # SO_PASSPIDFD
        83,  # SO_PASSRIGHTS
    )
]
_COMMON = [*_SOCKET, _BUF_LOCK, _SNDBUF, _RCVBUF]
# SO_NO_CHECK, TIMESTAMPING_OLD, RXQ_OVFL, SELECT_ERR_QUEUE, BUSY_POLL, MAX_PACING_RATE, ZEROCOPY, TXTIME,
# TIMESTAMPING_NEW, PREFER_BUSY_POLL, BUSY_POLL_BUDGET, TXREHASH, RCVMARK, RCVPRIORITY
_INET = [(socket.SOL_SOCKET, number) for number in (11, 37, 40, 45, 46, 47, 60, 61, 65, 69, 70, 74, 75, 82)]


def capture(sock: socket.socket, survey: Survey) -> tuple[Option, ...]:
    """The options of a duplicate that differ from a fresh socket's. Unsupported, OSError."""
    from lazyrestore.kernel import libc

    if libc.has_socket_filter(sock.fileno()):
        raise Unsupported("a socket filter is attached")
    key = (int(sock.family), int(sock.type), sock.proto)
    defaults = survey.option_defaults.get(key)
    if defaults is None:
        with socket.socket(*key) as fresh:
            defaults = survey.option_defaults[key] = _read(fresh)
    now = _read(sock)
    locked = struct.unpack("=i", now.pop(_BUF_LOCK, bytes(4)))[0]
    options = []
    for name, value in now.items():
        if name in _LOCKED:
            if locked & _LOCKED[name]:
                options.append(Option(*name, value))
        elif defaults.get(name) != value or name == (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            options.append(Option(*name, value))
    return tuple(options)


def without_traces(options: tuple[Option, ...]) -> tuple[Option, ...]:
    """The options of a socket that was connected once, without those that tell of its connection."""
    return tuple(option for option in options if (option.level, option.name) not in _TRACES)


def restore(options: tuple[Option, ...], number: int, build: Build) -> None:
    """Append the calls that set `options` on the socket `number`."""
    for option in options:
        name = (option.level, option.name)
        if name not in _LOCKED:
            set_option(number, option, build)
            continue
        half = Option(*name, struct.pack("=i", struct.unpack("=i", option.value)[0] // 2))
        set_option(number, half, build)
        forced = build.place(half.value)  # beyond the system's limit, where the restorer may
        build.ops.try_call(lib.SYS_setsockopt, number, option.level, _FORCE[name], forced, 4, note="SO_…BUFFORCE")


def set_option(number: int, option: Option, build: Build) -> None:
    """Append one setsockopt()."""
    value = build.place(option.value)
    build.ops.call(lib.SYS_setsockopt, number, option.level, option.name, value, len(option.value))


def integer(level: int, name: int, value: int) -> Option:
    return Option(level, name, struct.pack("=i", value))


def _read(sock: socket.socket) -> dict[tuple[int, int], bytes]:
    names = _COMMON
    if sock.family == socket.AF_INET:
        names = [*_IP, *_COMMON]
    elif sock.family == socket.AF_INET6:
        names = [*_IPV6, *_IP, *_COMMON]
    if sock.family != socket.AF_UNIX:
        names = [*names, *_INET, *(_TCP if sock.type == socket.SOCK_STREAM else _UDP)]
    found = {}
    for level, name in names:
        try:
            found[level, name] = sock.getsockopt(level, name, 64)
        except OSError:  # not an option of this kind of socket, or of this kernel
            continue
    return found
