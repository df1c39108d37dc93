"""Random calls on lazily served memory, against a model that knows every page."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import pytest
from helpers_pager import CHUNK, PAGE, Image, Victim, crc_of_pages

from lazyrestore.pager import PagerClient

pytestmark = pytest.mark.requires("root")

BASE = 0x10_0000_0000
LENGTH = 2 << 20
ROOM = 0x20_0000_0000  # where mappings are moved to; each gets a place of its own
STEPS = 80


class Model:
    """The pages that are mapped, and their contents."""

    def __init__(self, image: Image, seed: int) -> None:
        raw = image.raw(BASE, LENGTH)
        self.pages = {BASE + at: bytearray(raw[at : at + PAGE]) for at in range(0, LENGTH, PAGE)}
        self.random = random.Random(seed)
        self.room = ROOM

    def run(self, most: int = 40) -> tuple[int, int]:
        """A random mapped range."""
        start = self.random.choice(list(self.pages))
        length = PAGE
        wanted = self.random.randint(1, most) * PAGE
        while length < wanted and start + length in self.pages:
            length += PAGE
        return start, length

    def contents(self, start: int, length: int) -> bytes:
        return b"".join(self.pages[at] for at in range(start, start + length, PAGE))

    def poke(self, victim: Victim) -> None:
        start, length = self.run()
        at, byte = start + self.random.randrange(length), self.random.randrange(256)
        assert victim.ask("poke", at, byte) == "ok"
        self.pages[at & -PAGE][at & PAGE - 1] = byte

    def dontneed(self, victim: Victim) -> None:
        start, length = self.run()
        assert victim.ask("dontneed", start, length) == "ok"
        self.pages |= {at: bytearray(PAGE) for at in range(start, start + length, PAGE)}

    def munmap(self, victim: Victim) -> None:
        start, length = self.run(6)
        assert victim.ask("munmap", start, length) == "ok"
        for at in range(start, start + length, PAGE):
            del self.pages[at]

    def mprotect(self, victim: Victim) -> None:
        start, length = self.run(6)
        assert victim.ask("mprotect", start, length, 1) == "ok"
        assert victim.ask("mprotect", start, length, 3) == "ok"

    def remap(self, victim: Victim) -> None:
        start, length = self.run()
        grown = self.random.choice([0, 0, 1, 20]) * PAGE
        if victim.ask("remap", start, length, length + grown, self.room) != "ok":
            return  # spans more than one mapping: refused as a whole
        for at in range(0, length, PAGE):
            self.pages[self.room + at] = self.pages.pop(start + at)
        self.pages |= {self.room + length + at: bytearray(PAGE) for at in range(0, grown, PAGE)}
        self.room += length + grown + self.random.choice([0, 1]) * CHUNK

    def grow(self, victim: Victim) -> None:
        """In place, at the end of a mapping: into memory that was unmapped before, more often than not."""
        ends = [at + PAGE for at in self.pages if at + PAGE not in self.pages]
        end = self.random.choice(ends)
        free = 1
        while free < 6 and end + free * PAGE not in self.pages:
            free += 1
        if victim.ask("grow", end - PAGE, PAGE, (1 + free) * PAGE) == "ok":
            self.pages |= {end + at * PAGE: bytearray(PAGE) for at in range(free)}

    def read(self, victim: Victim) -> None:
        start, length = self.run()
        assert victim.ask("crc", start, length) == str(zlib.crc32(self.contents(start, length)))

    def walk(self, victim: Victim) -> None:
        start, length = self.run()
        sums = victim.ask("walk", 3, start, length, self.random.randrange(1000)).split()
        assert sums == [str(crc_of_pages(self.contents(start, length)))] * 3

    def all_pages(self, ask: Callable[..., str]) -> None:
        for at in self.pages:
            assert ask("crc", at, PAGE) == str(zlib.crc32(self.pages[at])), hex(at)


@pytest.mark.parametrize("seed", range(12))
def test_random_calls(
    make_image: Callable[..., Image],
    start: Callable[..., PagerClient],
    make_victim: Callable[[], Victim],
    seed: int,
) -> None:
    image = make_image()
    victim = make_victim()
    victim.clone(start(image), BASE, LENGTH)
    model = Model(image, seed)
    calls = [model.poke, model.dontneed, model.munmap, model.mprotect, model.remap, model.grow, model.read, model.walk]
    fork_at = model.random.randrange(STEPS)
    at_fork: dict[int, bytearray] = {}
    for step in range(STEPS):
        if step == fork_at:
            victim.fork()
            at_fork = {at: bytearray(page) for at, page in model.pages.items()}
        model.random.choice(calls)(victim)
    model.all_pages(victim.ask)
    model.pages = at_fork
    model.all_pages(victim.ask_child)


def test_forks_beside_faults(
    make_image: Callable[..., Image], start: Callable[..., PagerClient], make_victim: Callable[[], Victim]
) -> None:
    """Children are made and end while other threads of the parent wait for their memory."""
    image = make_image()
    client = start(image)
    victim = make_victim()
    victim.clone(client, BASE, LENGTH)
    raw = image.raw(BASE, LENGTH)
    first = crc_of_pages(raw[:PAGE])
    answer = victim.ask("forks", 40, BASE, PAGE, BASE, LENGTH).split()
    assert answer == [str(crc_of_pages(raw))] + [str(first % 251)] * 40
    assert client.stats().counters.forks == 40
