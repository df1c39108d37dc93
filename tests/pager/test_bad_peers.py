"""Requests that no client of ours sends, from a peer that is allowed to ask: each is refused, or ends its connection,
and nothing else: the pager is the same, answers the next one, serves its process, and holds no descriptor more."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import until
from helpers_pager import CHUNK, PAGE, Image, Victim, crc_of_pages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyrestore.pager import PagerClient, wire
from lazyrestore.pager.launch import socket_path

pytestmark = pytest.mark.requires("root")

MORE = int(os.environ.get("LAZYRESTORE_FUZZ", "1"))  # times as many examples
BASE = 0x10_0000_0000
LENGTH = 32 * CHUNK
GRANTED = [
    wire.HELLO,
    wire.STATS,
    wire.STOP,
    wire.WORKING_SET,
]  # to whoever asks; it stops when its processes have ended
words = st.one_of(st.integers(0, 4), st.sampled_from([248, 253, 2**20, 2**20 + 1, 2**31, 2**32 - 1]))
ranges = st.builds(
    wire.RANGE.pack,
    *(
        st.sampled_from([0, PAGE, 2 * PAGE, BASE, 2**47 - PAGE, 2**47, 2**63, 2**64 - PAGE, 2**64 - 1, 17])
        for _ in "sei"
    ),
    st.integers(0, 4),
    st.just(0),
)


def descriptor(kind: str, content: bytes) -> int:
    if kind == "memfd":
        made = os.memfd_create("fuzz")
        os.write(made, content)
        return made
    if kind == "pidfd":
        return os.pidfd_open(os.getpid())
    if kind == "eventfd":
        return os.eventfd(0)
    return os.open({"null": "/dev/null", "directory": "/"}[kind], os.O_RDONLY)


requests = st.one_of(
    st.binary(max_size=2000),  # of no size that is known, but once in a while
    st.builds(
        lambda head, numbers, extra: wire.REQUEST.pack(*head, *(numbers + [0] * 248)[:248]) + extra,
        st.tuples(
            st.one_of(st.just(wire.ATTACH), st.sampled_from(GRANTED), words),
            st.one_of(st.just(wire.VERSION), st.just(wire.VERSION), words),
            words,
            words,
            words,
        ),
        st.lists(words, max_size=5),
        st.sampled_from([b"", b"", b"", b"x", bytes(100_000)]),
    ),
)
handed_over = st.lists(st.sampled_from(["memfd", "pidfd", "eventfd", "null", "directory"]), max_size=6)


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(os.fspath(path))
        yield connection


def held(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_malformed_requests(
    make_image: Callable[..., Image],
    start: Callable[..., PagerClient],
    make_victim: Callable[[], Victim],
    runtime: Path,
) -> None:
    image = make_image()
    client = start(image)
    victim = make_victim()
    victim.clone(client, BASE, LENGTH)
    path = socket_path(image.key, runtime_dir=runtime)
    pids = client.pids()
    refused = ended = 0
    before = held(pids[0])

    @settings(max_examples=250 * MORE, deadline=None, suppress_health_check=list(HealthCheck))
    @given(request=requests, kinds=handed_over, listed=st.lists(ranges, max_size=3), then=st.booleans())
    def send(request: bytes, kinds: list[str], listed: list[bytes], then: bool) -> None:
        nonlocal refused, ended
        given_over = [descriptor(kind, b"".join(listed)) for kind in kinds]
        try:
            with connected(path) as connection:
                with contextlib.suppress(BrokenPipeError):
                    socket.send_fds(connection, [request], given_over)
                if not then:
                    return  # gone before the answer
                answer, received, _, _ = socket.recv_fds(connection, 1 << 16, 253)
                for number in received:
                    os.close(number)
                if len(request) != wire.REQUEST.size:
                    assert not answer
                    ended += 1
                    return
                kind, version = wire.REQUEST.unpack(request)[:2]
                assert answer
                if kind not in GRANTED or version != wire.VERSION:
                    assert wire.REPLY.unpack(answer)[1]  # an errno: no userfaultfd was among what it was given
                    refused += 1
        finally:
            for number in given_over:
                os.close(number)

    send()
    assert refused and ended
    assert client.pids() == pids
    until(lambda: held(pids[0]) == before, f"{before} descriptors of the pager")
    assert client.stats().spaces[0].pid == victim.pid
    assert victim.ask("walk", 1, BASE, LENGTH, 3) == str(crc_of_pages(image.raw(BASE, LENGTH)))
