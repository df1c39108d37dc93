"""hugetlb memory: a template of its own, 2 MiB pages."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator

import pytest
from helpers_hugetlb import larger_pool
from helpers_pager import Image, Victim, pages

from lazyrestore.pager import BACKING_HUGETLB, PagerClient, Range

pytestmark = pytest.mark.requires("root")

HUGE = 2 << 20
AT = 0x40_0000_0000
NEEDED = 16


@pytest.fixture(autouse=True)
def huge_pages() -> Iterator[None]:
    with larger_pool(NEEDED):
        yield


@pytest.fixture
def image(make_image: Callable[..., Image]) -> Image:
    return make_image({AT: pages(1, HUGE), AT + 2 * HUGE: pages(2, HUGE)}, hugetlb=True)


@pytest.fixture
def client(start: Callable[..., PagerClient], image: Image) -> PagerClient:
    return start(image)


@pytest.fixture
def victim(client: PagerClient, make_victim: Callable[[], Victim]) -> Victim:
    victim = make_victim()
    victim.map(AT, 4 * HUGE, victim.open(f"/proc/{os.getpid()}/fd/{client.hugetlb_fd}"), AT)
    victim.attach(client, [Range(AT, AT + 4 * HUGE, AT, BACKING_HUGETLB)])
    return victim


def crc(raw: bytes | bytearray) -> str:
    return str(zlib.crc32(raw))


def test_contents_writes_and_zeros(image: Image, victim: Victim) -> None:
    expected = bytearray(image.raw(AT, 4 * HUGE))
    assert victim.ask("poke", AT + 2 * HUGE + 12345, 240) == "ok"
    assert victim.ask("poke", AT + HUGE + 5, 241) == "ok"
    expected[2 * HUGE + 12345] = 240
    expected[HUGE + 5] = 241
    assert victim.ask("crc", AT, 4 * HUGE) == crc(expected)


def test_dontneed_reads_zero(image: Image, victim: Victim) -> None:
    assert victim.ask("dontneed", AT + 2 * HUGE, HUGE) == "ok"
    assert victim.ask("crc", AT, 4 * HUGE) == crc(image.raw(AT, HUGE) + bytes(3 * HUGE))


def test_forked_child(image: Image, victim: Victim) -> None:
    victim.fork()
    assert victim.ask_child("crc", AT, 4 * HUGE) == crc(image.raw(AT, 4 * HUGE))


def test_damaged(image: Image, victim: Victim) -> None:
    image.damage(AT + 2 * HUGE)
    assert victim.ask("touch", AT + 2 * HUGE) == "SIGBUS"
    assert victim.ask("crc", AT, HUGE) == crc(image.raw(AT, HUGE))
