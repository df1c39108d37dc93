"""Copies in other cgroups than their pager: ended with it, whatever kills it; never left to read zeros."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import children_of, until
from helpers_cgroup import Groups, groups, kill, members
from helpers_pager import Image, Victim, await_end, libc

from lazyrestore.errors import PagerError
from lazyrestore.pager import PagerClient, connect_existing, connect_or_start

pytestmark = pytest.mark.requires("root")

BASE = 0x10_0000_0000
LENGTH = 2 << 20
HALF = LENGTH // 2
# The same on every architecture.
CLONE_NEWNS, CLONE_NEWCGROUP, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20000, 0x2000000, 0x4000, 0x40000, 2

Start = Callable[..., PagerClient]
MakeVictim = Callable[[], Victim]


@pytest.fixture
def trees() -> Iterator[Groups]:
    with groups() as made:
        yield made


@pytest.fixture
def image(make_image: Callable[..., Image]) -> Image:
    return make_image()


class Place:
    """A cgroup, with copies that this process, when it was there, gave to the pager over a connection from there."""

    def __init__(self, trees: Groups, name: str, image: Image, runtime: Path, make_victim: MakeVictim) -> None:
        self.group = trees.make(name)
        self.client: PagerClient | None = None
        self._parts = trees, image, runtime, make_victim

    def copy(self) -> Victim:
        """One more, half of it touched."""
        trees, image, runtime, make_victim = self._parts
        with trees.inside(self.group):
            if self.client is None:
                self.client = connect_existing(image.key, image.name, runtime_dir=runtime)
            assert self.client is not None
            victim = make_victim()
            victim.clone(self.client, BASE, LENGTH)
        assert victim.ask("crc", BASE, HALF) == str(zlib.crc32(image.raw(BASE, HALF)))
        return victim

    def keepers(self, *copies: Victim) -> list[int]:
        """What is in the cgroup besides these copies."""
        return [pid for pid in members(self.group) if pid not in {copy.pid for copy in copies}]

    def disconnect(self) -> None:
        if self.client is not None:
            self.client.close()


@pytest.fixture
def place(trees: Groups, image: Image, runtime: Path, make_victim: MakeVictim) -> Iterator[Callable[[str], Place]]:
    with ExitStack() as stack:

        def make(name: str) -> Place:
            made = Place(trees, name, image, runtime, make_victim)
            stack.callback(made.disconnect)
            return made

        yield make


@pytest.fixture
def pager(trees: Groups, image: Image, start: Start) -> PagerClient:
    """One that was started from the cgroup "first"."""
    with trees.inside(trees.make("first")):
        client = start(image)
    assert set(client.pids()) == set(members(trees.make("first")))
    return client


def hide(mount: Path, hidden: str) -> None:
    """From this process: what is below the mount; all cgroups but its own; or all that shows that there are any."""
    assert not libc.unshare(CLONE_NEWCGROUP if hidden == "namespace" else CLONE_NEWNS)
    if hidden == "namespace":
        return
    assert not libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    if hidden == "mount":
        assert not libc.mount(b"none", os.fsencode(mount), b"tmpfs", 0, None)
    else:
        assert not libc.umount2(os.fsencode(mount), MNT_DETACH)


def is_killed(copy: Victim) -> bool:
    """Before it has read the other half; what it reads meanwhile waits."""
    assert copy.ask("crc", BASE, LENGTH) == ""
    return copy.process.wait() == -signal.SIGKILL


def all_are_ended(copies: list[Victim], places: list[Place], runtime: Path) -> None:
    """The copies are killed, and nothing else is left in their cgroups, nor the socket of the pager."""
    assert all(is_killed(copy) for copy in copies)
    for place in places:
        until(lambda group=place.group: not members(group), "an empty cgroup")  # type: ignore[misc]
    assert not list(runtime.glob("*.sock"))


def test_pager_and_keeper_are_killed_at_once(
    trees: Groups, pager: PagerClient, place: Callable[[str], Place], runtime: Path
) -> None:
    others = [place("second"), place("third")]
    copies = [other.copy() for other in others for _ in range(2)]
    child = copies[0].fork()
    assert copies[0].ask_child("crc", BASE, HALF)
    kill(trees.top / "first")
    all_are_ended(copies, others, runtime)
    await_end(child)


def test_killed_again_and_again(
    trees: Groups, image: Image, start: Start, place: Callable[[str], Place], runtime: Path
) -> None:
    """What the keepers of one pager do side by side does not hurt the next one."""
    first = trees.make("first")
    for round_ in range(8):
        with trees.inside(first):
            pids = start(image).pids()
        others = [place(f"{round_}-{number}") for number in range(3)]
        copies = [other.copy() for other in others]
        kill(first)
        with trees.inside(first):
            following = start(image)
        assert set(following.pids()).isdisjoint(pids)
        assert all(is_killed(copy) for copy in copies)
        with connect_existing(image.key, image.name, runtime_dir=runtime) or pytest.fail("its socket is gone") as found:
            assert found.pids() == following.pids()
        following.close()
        until(lambda: not members(first), "the end of the next pager")


def test_one_keeper_per_cgroup_that_needs_one(trees: Groups, pager: PagerClient, place: Callable[[str], Place]) -> None:
    """Those whose cgroup is covered by another keeper's, or the pager's, need none."""
    process, keeper = pager.pids()
    same, below = place("first"), place("first/below")
    copies = [same.copy(), below.copy()]
    assert children_of(process) == [keeper]
    assert same.keepers(copies[0]) and below.keepers(copies[1]) == []
    other, similar, lower = place("second"), place("secondly"), place("second/below")
    copy = other.copy()
    (further,) = other.keepers(copy)
    others = [other.copy() for _ in range(4)]
    assert other.keepers(copy, *others) == [further]
    lower.copy()
    assert sorted(children_of(process)) == sorted([keeper, further])
    copy = similar.copy()
    assert len(similar.keepers(copy)) == 1
    assert len(children_of(process)) == 3


def test_a_killed_keeper_is_replaced(trees: Groups, pager: PagerClient, place: Callable[[str], Place]) -> None:
    other = place("second")
    copies = [other.copy()]
    for _ in range(2):
        (further,) = other.keepers(*copies)
        os.kill(further, signal.SIGKILL)
        await_end(further)
        until(lambda further=further: set(other.keepers(*copies)) - {further}, "another keeper")  # type: ignore[misc]
    (further,) = other.keepers(*copies)
    os.kill(further, signal.SIGKILL)
    copies.append(other.copy())  # whoever comes first starts it
    until(lambda: len(set(other.keepers(*copies)) - {further}) == 1, "one keeper")
    kill(trees.top / "first")
    assert all(is_killed(copy) for copy in copies)


def test_the_pager_alone_is_killed(pager: PagerClient, place: Callable[[str], Place], runtime: Path) -> None:
    others = [place("second"), place("third")]
    copies = [other.copy() for other in others]
    process, keeper = pager.pids()
    os.kill(process, signal.SIGKILL)
    all_are_ended(copies, others, runtime)
    await_end(keeper)


def test_nothing_is_left_after_the_last_copy(
    trees: Groups, image: Image, pager: PagerClient, place: Callable[[str], Place]
) -> None:
    """It stays while its cgroup has a copy, a child of one, or somebody who may bring the next one."""
    other = place("second")
    process, keeper = pager.pids()
    descriptors = set(os.listdir(f"/proc/{process}/fd"))
    copy = other.copy()
    child = copy.fork()
    (further,) = [pid for pid in other.keepers(copy) if pid != child]
    copy.kill()
    again = other.copy()
    assert further in members(other.group)
    other.disconnect()
    again.kill()
    assert copy.ask_child("crc", BASE, LENGTH) == str(zlib.crc32(image.raw(BASE, LENGTH)))
    assert further in members(other.group)
    copy.end_child()
    until(lambda: not members(other.group), "an empty cgroup")
    until(lambda: other.group.rmdir() or True, "the end of the cgroup")  # type: ignore[func-returns-value]
    until(lambda: children_of(process) == [keeper], "its end to be collected")
    until(lambda: set(os.listdir(f"/proc/{process}/fd")) == descriptors, "closed descriptors")


def test_a_threaded_cgroup(trees: Groups, pager: PagerClient, place: Callable[[str], Place]) -> None:
    """No process can be cloned into one; it goes to the nearest one above that takes it."""
    threaded = place("second/threaded")
    (threaded.group / "cgroup.type").write_text("threaded")
    copy = threaded.copy()
    assert len(members(threaded.group.parent)) == 2  # the copy counts there, too
    kill(trees.top / "first")
    assert is_killed(copy)


@pytest.mark.parametrize(
    ("hidden", "why"),
    [("mount", "No such file"), ("namespace", "Invalid cross-device link"), ("everything", "")],
)
def test_none_can_be_started(
    trees: Groups, image: Image, runtime: Path, place: Callable[[str], Place], hidden: str, why: str
) -> None:
    """Where the pager is not let into a cgroup, nothing is taken over: it could read zeros one day. Where it sees no
    cgroups at all, that is said in the log."""
    with trees.inside(trees.make("first")):
        child = os.fork()
        if not child:
            status = 1
            try:
                hide(trees.mount, hidden)
                connect_or_start(image, runtime_dir=runtime, linger_ms=3_600_000)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0) == (child, 0)
    other = place("second")
    if why:
        with pytest.raises(PagerError, match=f"a keeper for the restorer's cgroup: {why}.*; restore as root"):
            other.copy()
        assert other.client
        assert not other.client.stats().spaces
    else:
        copy = other.copy()
        assert other.keepers(copy) == []
        assert "would outlive pager and keeper" in (runtime / "pager.log").read_text()
