"""What the C core makes of a chunk is read back by the store's own reader, which is Python; and it is small."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyrestore.store import format
from lazyrestore.store.compressor import ROOM, Compressor

zstandard = pytest.importorskip("zstandard")


def floats(source: random.Random, length: int) -> bytes:
    return struct.pack(f"<{length // 4}f", *(source.randrange(1000) / 8 for _ in range(length // 4)))


def doubles(source: random.Random, length: int) -> bytes:
    return struct.pack(f"<{length // 8}d", *(source.gauss(0, 1) for _ in range(length // 8)))


def integers(source: random.Random, length: int) -> bytes:
    return struct.pack(f"<{length // 8}q", *(source.randrange(10**6) for _ in range(length // 8)))


def text(source: random.Random, length: int) -> bytes:
    words = [source.randbytes(source.randrange(2, 9)).hex().encode() for _ in range(200)]
    return b" ".join(source.choice(words) for _ in range(length // 3))[:length].ljust(length, b".")


def pointers(source: random.Random, length: int) -> bytes:
    places = [0x7F31_2000_0000 + source.randrange(4096) * 16 for _ in range(500)]
    return struct.pack(f"<{length // 8}Q", *(source.choice([0, 1, *places]) for _ in range(length // 8)))


def noise(source: random.Random, length: int) -> bytes:
    return source.randbytes(length)


def zeros(_: random.Random, length: int) -> bytes:
    return bytes(length)


KINDS = [floats, doubles, integers, text, pointers, noise, zeros]
kinds = st.sampled_from(KINDS)
sizes = st.integers(1, 6).map(lambda pages: pages * format.PAGE)


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.tuples(kinds, sizes, st.booleans()), max_size=40),
    seed=st.integers(0, 2**32),
    level=st.sampled_from([1, 3, 19]),
)
def test_every_chunk_comes_back(chunks: list[tuple[Callable[..., bytes], int, bool]], seed: int, level: int) -> None:
    source = random.Random(seed)
    contents: list[bytes | memoryview] = []
    for kind, size, view in chunks:
        content = kind(source, size)
        contents.append(memoryview(b"x" + content)[1:] if view else content)
    compressor = Compressor(level)
    stored = compressor.compress(contents)
    for content, payload in zip(contents, stored, strict=True):
        same = format.decompress(payload, len(content)) == content
        assert same
    again = Compressor(level).compress(contents) == stored  # whatever the compressor was used for before
    assert again and compressor.compress(contents) == stored


@pytest.mark.parametrize("kind", [floats, doubles, integers])
def test_numbers_take_less_in_planes(kind: Callable[..., bytes]) -> None:
    contents = [kind(random.Random(seed), format.CHUNK) for seed in range(20)]
    stored = Compressor(1).compress(contents)
    usual = zstandard.ZstdCompressor(level=1, write_checksum=True).compress
    assert sum(map(len, stored)) < 0.95 * sum(len(usual(content)) for content in contents)
    assert all(payload[: len(format.PLANES_MARK)] == format.PLANES_MARK for payload in stored)


@pytest.mark.parametrize("kind", [text, pointers, noise, zeros])
def test_what_is_no_number_is_left_as_it_is(kind: Callable[..., bytes]) -> None:
    """Also behind numbers, at once."""
    source = random.Random(7)
    contents = [floats(source, format.CHUNK)] * 5 + [kind(source, format.CHUNK) for _ in range(20)]
    stored = Compressor(1).compress(contents)[5:]
    assert not any(payload[: len(format.PLANES_MARK)] == format.PLANES_MARK for payload in stored)


@pytest.mark.parametrize("kind", KINDS)
def test_huge_pages(kind: Callable[..., bytes]) -> None:
    """More of them than there is room for at first."""
    contents = [kind(random.Random(seed), format.HUGE_CHUNK // 8) * 8 for seed in range(2)]
    contents += [random.Random(2).randbytes(format.HUGE_CHUNK)] * (ROOM // format.HUGE_CHUNK)
    for content, payload in zip(contents, Compressor(1).compress(contents), strict=True):
        same = format.decompress(payload, len(content)) == content
        assert same


def test_a_damaged_mark_is_damage() -> None:
    content = floats(random.Random(1), format.CHUNK)
    (payload,) = Compressor(1).compress([content])
    for bit in range(8 * len(format.PLANES_MARK)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"."):
            format.decompress(bytes(damaged), len(content))
