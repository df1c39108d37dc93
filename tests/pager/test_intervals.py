"""What a process's memory shows where it never wrote, as the pager tells it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from helpers_pager import CHUNK, PAGE, Image, Victim, pages, shared_address, shared_backing, stats_when

from lazyrestore.errors import PagerError
from lazyrestore.pager import BACKING_TEMPLATE, Interval, PagerClient, Range

pytestmark = pytest.mark.requires("root")

BASE = 0x10_0000_0000
LENGTH = 2 << 20
ELSEWHERE = 0x20_0000_0000

Start = Callable[..., PagerClient]
MakeImage = Callable[..., Image]
MakeVictim = Callable[[], Victim]


def shown(start: int, end: int, image: int) -> Interval:
    return Interval(start, end, image, BACKING_TEMPLATE, zero=False)


@pytest.fixture
def client(start: Start, make_image: MakeImage) -> PagerClient:
    return start(make_image())


@pytest.fixture
def clone(client: PagerClient, make_victim: MakeVictim) -> Victim:
    victim = make_victim()
    victim.clone(client, BASE, LENGTH)
    return victim


def test_as_restored(client: PagerClient, clone: Victim) -> None:
    assert client.intervals(clone.pidfd) == [shown(BASE, BASE + LENGTH, BASE)]
    assert client.stats().chunks_filled == 0


def test_dropped_unmapped_and_moved(client: PagerClient, clone: Victim) -> None:
    assert clone.ask("dontneed", BASE + PAGE, PAGE) == "ok"
    assert clone.ask("munmap", BASE + 4 * PAGE, PAGE) == "ok"
    assert clone.ask("remap", BASE + 8 * PAGE, 3 * PAGE, 5 * PAGE, ELSEWHERE) == "ok"
    intervals = client.intervals(clone.pidfd)
    assert [(each.start, each.end, each.zero) for each in intervals] == [
        (BASE, BASE + PAGE, False),
        (BASE + PAGE, BASE + 2 * PAGE, True),
        (BASE + 2 * PAGE, BASE + 4 * PAGE, False),
        (BASE + 5 * PAGE, BASE + 8 * PAGE, False),
        (BASE + 11 * PAGE, BASE + LENGTH, False),
        (ELSEWHERE, ELSEWHERE + 3 * PAGE, False),
    ]
    assert intervals[-1].image == BASE + 8 * PAGE
    assert all(each.image == each.start for each in intervals[:-1] if not each.zero)


def test_two_clones_have_their_own(client: PagerClient, clone: Victim, make_victim: MakeVictim) -> None:
    second = make_victim()
    second.clone(client, BASE, LENGTH)
    assert second.ask("munmap", BASE + PAGE, LENGTH - PAGE) == "ok"
    assert client.intervals(clone.pidfd) == [shown(BASE, BASE + LENGTH, BASE)]
    assert client.intervals(second.pidfd) == [shown(BASE, BASE + PAGE, BASE)]


def test_every_change_that_has_returned_is_told(client: PagerClient, clone: Victim) -> None:
    """The answer waits for the end of what the pager has read but not yet settled."""
    left = LENGTH
    while left > PAGE:
        left -= PAGE
        assert clone.ask("munmap", BASE + left, PAGE) == "ok"
        assert client.intervals(clone.pidfd) == [shown(BASE, BASE + left, BASE)]


def test_while_it_is_at_work(client: PagerClient, clone: Victim) -> None:
    """Nobody waits for ever when the process does not stand still."""
    dropped = 8 * CHUNK
    clone.send("trim", BASE, dropped, 2000, BASE + dropped, LENGTH - dropped)
    for _ in range(200):
        intervals = client.intervals(clone.pidfd)
        assert intervals[0].start == BASE
        assert intervals[-1] == shown(intervals[-1].start, BASE + LENGTH, intervals[-1].start)
    assert clone.process.stdout
    assert clone.process.stdout.readline()


def test_untouched_shared_memory(make_image: MakeImage, start: Start, make_victim: MakeVictim) -> None:
    """Only what was never filled; a chunk touched by any process is in nobody's list."""
    image = make_image({shared_address(3) + i * CHUNK: pages(i) for i in range(4)})
    client = start(image)
    first, second = make_victim(), make_victim()
    memfd = os.memfd_create("shared")
    try:
        os.ftruncate(memfd, 8 * CHUNK)
        for victim, at in ((first, BASE), (second, ELSEWHERE)):
            victim.map(at, 8 * CHUNK, victim.open(f"/proc/{os.getpid()}/fd/{memfd}"), 0, shared=True)
            victim.attach(client, [Range(at, at + 8 * CHUNK, shared_address(3), shared_backing(3))], {3: memfd})
    finally:
        os.close(memfd)
    assert second.ask("poke", ELSEWHERE + CHUNK + PAGE, 9) == "ok"
    for victim, at in ((first, BASE), (second, ELSEWHERE)):
        assert [(each.start - at, each.end - at, each.image) for each in client.intervals(victim.pidfd)] == [
            (i * CHUNK, (i + 1) * CHUNK, shared_address(3) + i * CHUNK) for i in (0, 2, 3)
        ]


def test_a_stranger_has_none(client: PagerClient, clone: Victim, make_victim: MakeVictim) -> None:
    with pytest.raises(PagerError) as stranger:
        client.intervals(make_victim().pidfd)
    assert stranger.value.errno == errno.ESRCH
    child = os.pidfd_open(clone.fork())
    try:
        with pytest.raises(PagerError) as forked:
            client.intervals(child)
    finally:
        os.close(child)
    assert forked.value.errno == errno.ESRCH


def test_a_dead_process_has_none(client: PagerClient, clone: Victim) -> None:
    clone.kill()
    with pytest.raises(PagerError) as dead:
        client.intervals(clone.pidfd)
    assert dead.value.errno == errno.ESRCH
    stats_when(client, lambda stats: not stats.spaces)
