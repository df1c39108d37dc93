"""Which process a forked child is: found by its first faults, and never mistaken for another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers_facts import read_memory
from helpers_pager import CHUNK, Image, Victim

from lazyrestore.pager import PagerClient

pytestmark = pytest.mark.requires("root")

BASE, LENGTH = 0x10_0000_0000, 2 << 20


def pids(client: PagerClient) -> dict[int, int]:
    """By generation: 0 is what was restored."""
    return {space.generation: space.pid for space in client.stats().spaces}


def test_a_child_is_found_by_what_it_touches(
    make_image: Callable[..., Image], start: Callable[..., PagerClient], make_victim: Callable[[], Victim]
) -> None:
    image = make_image()
    client, clone, other = start(image), make_victim(), make_victim()
    clone.clone(client, BASE, LENGTH)
    child = clone.fork()
    # The first fault of the child's memory is another's doing, then a system call's of its own.
    assert read_memory(child, BASE, 1) == image.raw(BASE, 1)
    assert clone.ask("crc", BASE, 4 * CHUNK) and pids(client) == {0: clone.pid, 1: 0}
    assert clone.ask_child("touch", BASE + 16 * CHUNK) == str(image.raw(BASE + 16 * CHUNK, 1)[0])
    assert clone.ask_child("touch", BASE + 32 * CHUNK)  # which is served once it was found
    assert pids(client) == {0: clone.pid, 1: child}
    other.clone(client, BASE, LENGTH)
    assert sorted(space.pid for space in client.stats().spaces) == sorted((clone.pid, other.pid, child))
