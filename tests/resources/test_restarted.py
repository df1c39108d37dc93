"""Which call a thread in restart_syscall() has made; tests/integration/test_interrupted_calls.py tries it for real."""

from __future__ import annotations

import errno
import struct

import pytest

from lazyrestore.kernel.restarted import interrupted_call

POLL, NANOSLEEP, FUTEX, CLOCK_NANOSLEEP = 7, 35, 202, 230
CODE, PLACE, OTHER = 0x401007, 0x7FFF00000000, 0x7FFF00001000
SECONDS = struct.pack("<qq", 5, 0)


@pytest.mark.parametrize("number", [POLL, NANOSLEEP, FUTEX, CLOCK_NANOSLEEP])
def test_by_the_code(number: int) -> None:
    assert found(struct.pack("<BIH", 0xB8, number, 0x050F), b"", 0, 0, 0, 0) == number


@pytest.mark.parametrize(
    ("number", "there", "arguments"),
    [
        (POLL, b"", (0, 0, 5000, 0)),
        (POLL, struct.pack("<iHHiHH", 3, 1, 0, 4, 1, 0), (PLACE, 2, 5000, 0)),
        (POLL, struct.pack("<iHHiHH", 3, 1, 0, 4, 1, 0), (PLACE, 9, 5000, OTHER)),
        (POLL, b"", (PLACE, 0, 5000, 0)),
        (POLL, b"\xff" * 16, (PLACE, 0, 5000, 0)),
        (NANOSLEEP, SECONDS, (PLACE, 0, 0, 0)),
        (NANOSLEEP, SECONDS, (PLACE, 0, 77, OTHER)),
        (NANOSLEEP, SECONDS, (PLACE, OTHER, 0, 0)),
        (CLOCK_NANOSLEEP, SECONDS, (1, 0, PLACE, 0)),
        (CLOCK_NANOSLEEP, SECONDS, (0xFFFFFFFA, 0, PLACE, PLACE)),
        (FUTEX, SECONDS, (PLACE, 0, 5, OTHER)),
        (FUTEX, SECONDS, (PLACE, 128, 5, OTHER)),
        (FUTEX, SECONDS, (PLACE, 9 | 128 | 256, 5, OTHER)),
    ],
)
def test_by_the_arguments(number: int, there: bytes, arguments: tuple[int, int, int, int]) -> None:
    assert found(b"\x90" * 5 + b"\x0f\x05", there, *arguments) == number
    assert found(b"", there, *arguments) == number


def found(code: bytes, there: bytes, *arguments: int) -> int:
    """`code` ends where the thread goes on, `there` begins at PLACE; nothing else is mapped."""

    def read(address: int, length: int) -> bytes:
        mapped = {CODE - 7: code, PLACE: there, PLACE + 8: there[8:]}.get(address, b"")[:length]
        if len(mapped) < length:
            raise OSError(errno.EIO, "not mapped")
        return mapped

    registers = dict(zip(("rdi", "rsi", "rdx", "r10"), arguments, strict=True), rip=CODE)
    return interrupted_call(registers, read)
