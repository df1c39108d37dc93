"""Bits of a stored index are flipped behind a pager's back: a page is what was stored, or SIGBUS, never another."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_pager import PAGE, Image, Victim, pages

from lazyrestore.pager import PagerClient, wire

pytestmark = pytest.mark.requires("root")

BASE = 0x10_0000_0000
COUNT = 400  # chunks of a page or two, some with holes behind them: four blocks of the index


def chunks(rng: random.Random) -> dict[int, bytes]:
    found, at = {}, BASE
    for number in range(COUNT):
        found[at] = pages(number, PAGE * rng.choice([1, 1, 2]))
        at += len(found[at]) + PAGE * rng.choice([0, 0, 0, 1])
    return found


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "no sums"])
@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits(
    make_image: Callable[..., Image],
    start: Callable[..., PagerClient],
    make_victim: Callable[[], Victim],
    runtime: Path,
    seed: int,
    sums: bool,
) -> None:
    """Without checksums, as before November 2026, the index is believed: then it is enough that all goes on."""
    rng = random.Random(seed)
    content = chunks(rng)
    image = make_image(content, sums=sums)
    damaged = rng.randrange(4) if seed else -1
    with image.path.open("r+b") as file:
        for _ in range(seed):
            entry = min(COUNT - 1, damaged * wire.INDEX_BLOCK + rng.randrange(16))
            offset = image.index_offset + entry * wire.CHUNK.size + rng.randrange(12)  # address or length
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    length = max(content) + len(content[max(content)]) - BASE
    in_doubt = {at for number, at in enumerate(content) if number // wire.INDEX_BLOCK == damaged}
    client = start(image)
    victim = make_victim()
    victim.clone(client, BASE, length)
    refused = 0
    for page in rng.sample(range(BASE, BASE + length, PAGE), length // PAGE):
        if victim.ask("touch", page) == "SIGBUS":
            refused += 1
            at = max(chunk for chunk in content if chunk <= page)
            # In a chunk of the block, or in a hole beside one.
            assert not sums or (damaged >= 0 and (at in in_doubt or page >= at + len(content[at])))
        elif sums:
            assert victim.ask("crc", page, PAGE) == str(zlib.crc32(image.raw(page, PAGE))), hex(page)
    if sums:
        assert refused >= sum(len(content[at]) // PAGE for at in in_doubt)
        assert ("index is damaged" in (runtime / "pager.log").read_text()) == bool(seed)
    assert client.stats().spaces[0].pid == victim.pid


def test_a_block_that_was_checked_may_be_damaged_later(
    make_image: Callable[..., Image], start: Callable[..., PagerClient], make_victim: Callable[[], Victim]
) -> None:
    """The file is mapped, and a page of it may be read from a failing disk again: what was checked is kept."""
    content = chunks(random.Random(1))
    image = make_image(content)
    length = max(content) + len(content[max(content)]) - BASE
    client = start(image)
    victim = make_victim()
    victim.clone(client, BASE, length)
    for at in list(content)[:: wire.INDEX_BLOCK]:  # one of each block
        assert victim.ask("crc", at, PAGE) == str(zlib.crc32(content[at][:PAGE]))
    with image.path.open("r+b") as file:
        for entry in range(1, COUNT, 5):
            file.seek(image.index_offset + entry * wire.CHUNK.size + 2)
            file.write(b"\x55\x55\x55")
    for at, raw in content.items():
        for page in range(0, len(raw), PAGE):
            assert victim.ask("crc", at + page, PAGE) == str(zlib.crc32(raw[page : page + PAGE])), hex(at + page)
