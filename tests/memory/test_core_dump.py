"""The kernel's core dump of a restored process of which most was never touched."""

from __future__ import annotations

import ctypes
import itertools
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import Builder, Victims, ask
from helpers_lazy_twin import PAGE, Twins, twins_in

import lazyrestore

SIZE = 32 * PAGE
PATTERN = Path("/proc/sys/kernel/core_pattern")
USUAL_KINDS, ALL_KINDS = "0x33", "0x7f"  # core(5): all is also mappings of files, which restored memory is
KINDS = ["private", "shared"]
NAMES = ("never", "restored")
PT_LOAD = 1
numbers = itertools.count()

libc = ctypes.CDLL(None, use_errno=True)
libc.process_vm_readv.restype = ctypes.c_long


class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@pytest.fixture
def twins(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path) -> Iterator[Twins]:
    """Both may dump core, in their directories."""
    pattern = PATTERN.read_text().strip()
    if pattern.startswith(("|", "@", "/")) or "%" in pattern:
        pytest.skip(f"core_pattern is {pattern}, and is the machine's")
    program = build.c("syscalls")
    with twins_in(victims, store, run / f"core{next(numbers)}", lambda control: [program, control]) as twins:
        for pid in twins.pids:
            resource.prlimit(pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        yield twins


def core_of(twins: Twins, name: str, kinds: str) -> Path:
    """Ends one of the two by abort(); its core file, with these kinds of mappings."""
    pid = twins.pids[NAMES.index(name)]
    Path(f"/proc/{pid}/coredump_filter").write_text(kinds)
    with suppress(OSError):  # it does not come to an answer
        ask(twins.directory / name / "control", "abort")
    if name == "never":
        assert twins.never.process.wait() == -signal.SIGABRT
    else:
        assert twins.copy
        assert twins.copy.wait(60) == -signal.SIGABRT
    return next((twins.directory / name).glob("core*"))


def dumped(core: Path, start: int, length: int) -> bytes | None:
    """What a core says of a range of memory, None if it says nothing of it: gdb then has no such memory."""
    with core.open("rb") as file:
        header = file.read(64)
        offset, count = struct.unpack_from("<Q", header, 32)[0], struct.unpack_from("<H", header, 56)[0]
        for index in range(count):
            file.seek(offset + index * 56)
            kind, _, at, address, _, stored, _, _ = struct.unpack("<IIQQQQQQ", file.read(56))
            if kind == PT_LOAD and address <= start and start + length <= address + stored:
                file.seek(at + start - address)
                return file.read(length)
    return None


def touch(pid: int, start: int, length: int) -> None:
    """Read the process's memory as process_vm_readv does, which waits for the pager."""
    room = ctypes.create_string_buffer(length)
    local, remote = Vector(ctypes.addressof(room), length), Vector(start, length)
    assert libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) == length


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_touched_is_in_the_core(twins: Twins, kind: str) -> None:
    at = int(twins.both("region", "core", kind))
    twins.restore()
    for pid in twins.pids:
        touch(pid, at + 8 * PAGE, 3 * PAGE)
    never, restored = (core_of(twins, name, ALL_KINDS) for name in NAMES)
    expected = dumped(never, at, SIZE)
    found = dumped(restored, at, SIZE)
    assert expected
    assert found
    assert any(expected[8 * PAGE : 11 * PAGE])
    assert found[8 * PAGE : 11 * PAGE] == expected[8 * PAGE : 11 * PAGE]
    for i in range(0, SIZE, PAGE):
        assert found[i : i + PAGE] in (expected[i : i + PAGE], bytes(PAGE))  # never anything else


@pytest.mark.xfail(strict=True, reason="the kernel does not ask a userfaultfd while it dumps core: zeros")
@pytest.mark.parametrize("kind", KINDS)
def test_all_is_in_the_core(twins: Twins, kind: str) -> None:
    at = int(twins.both("region", "core", kind))
    twins.restore()
    never, restored = (core_of(twins, name, ALL_KINDS) for name in NAMES)
    same = dumped(restored, at, SIZE) == dumped(never, at, SIZE)  # pytest would take minutes to show the difference
    assert same


def test_what_was_read_is_in_a_core_of_the_usual_kinds(twins: Twins) -> None:
    at = int(twins.both("region", "core", "private"))
    twins.restore()
    for pid in twins.pids:
        touch(pid, at, SIZE)
    never, restored = (core_of(twins, name, USUAL_KINDS) for name in NAMES)
    expected = dumped(never, at, SIZE)
    assert expected
    same = dumped(restored, at, SIZE) == expected
    assert same
