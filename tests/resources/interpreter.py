"""Descriptors in forked children: set up, survey, restore by running a program's operations through syscall(), check.

Children are forks of the test's own process that keep nothing but what the test gives them; they report through a
shared mapping, and stop themselves (SIGSTOP) to be looked at. The executor proper is C; this is an independent
reading of the same operations.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from lazyrestore._native import _core
from lazyrestore.program import Descriptors, ListAddress, OpList, Pointer, Program, Result, Word
from lazyrestore.resources import addresses, descriptors
from lazyrestore.resources.descriptors import FdTable, RestoreContext

lib = _core.lib
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

FIRST_RESERVED = 700


class Child:
    """A stopped child; `go(check)` lets it run its check and returns once it has ended well."""

    def __init__(self, body: Callable[[], None], check: Callable[[], None] | None = None) -> None:
        self._report = mmap.mmap(-1, 65536)
        self.pid = os.fork()
        if self.pid == 0:
            self._run(body, check)
        self.pidfd = os.pidfd_open(self.pid)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        self.alive = os.WIFSTOPPED(status)
        if not self.alive:
            message = self.complaint()
            self.close()
            raise AssertionError(f"child ended with {status:#x}: {message}")

    def complaint(self) -> str:
        return self._report[:].rstrip(b"\0").decode()

    def survey(self) -> FdTable:
        return descriptors.survey(self.pid, self.pidfd)

    def go(self) -> None:
        """Run the child's check. AssertionError with its traceback."""
        os.kill(self.pid, signal.SIGCONT)
        _, status = os.waitpid(self.pid, 0)
        self.alive = False
        assert status == 0, self.complaint()

    def close(self) -> None:
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.alive = False
        os.close(self.pidfd)

    def _run(self, body: Callable[[], None], check: Callable[[], None] | None) -> None:
        try:
            body()
            os.kill(os.getpid(), signal.SIGSTOP)
            if check is not None:
                check()
            os._exit(0)
        except BaseException:
            text = traceback.format_exc().encode()[:65000]
            self._report[: len(text)] = text
            os._exit(1)


@contextmanager
def child(body: Callable[[], None], check: Callable[[], None] | None = None) -> Iterator[Child]:
    """A child that has only /dev/null as 0, 1 and 2 when `body` runs."""

    def alone() -> None:
        null = os.open("/dev/null", os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.closerange(3, 4096)
        body()

    process = Child(alone, check)
    try:
        yield process
    finally:
        process.close()


def make_addresses_free(table: FdTable) -> None:
    """What a restore does with a table before it starts a process. RestoreError if an address is taken."""
    for address in descriptors.addresses(table):
        addresses.make_free(address)


@contextmanager
def restored(
    table: FdTable,
    check: Callable[[], None] | None = None,
    *,
    streams: dict[int, int] | None = None,
    shared: dict[tuple[int, int], int] | None = None,
    cwd: str = "/",
) -> Iterator[Child]:
    """A child that ran what compile() made of the table. streams: 0, 1, 2 → a descriptor of the test's to hand over."""
    descriptors.check_files(table)
    make_addresses_free(table)
    handed: dict[int, int] = {}
    numbers = iter(range(FIRST_RESERVED, FIRST_RESERVED + 100))
    std, memory = {}, {}
    for stream in range(3):
        std[stream] = next(numbers)
        handed[std[stream]] = (streams or {}).get(stream, -1)
    for key, number in (shared or {}).items():
        memory[key] = next(numbers)
        handed[memory[key]] = number
    program = Program()
    ops = program.add_list()
    fds = Descriptors(ops, handed, FIRST_RESERVED + 100)
    descriptors.compile(table, ops, fds, RestoreContext(std, lambda *key: memory.get(key), cwd))
    for number in handed:
        if number in fds.used:
            fds.close(number)
    null = os.open("/dev/null", os.O_RDWR)

    def body() -> None:
        moved = {number: os.dup(source if source >= 0 else null) for number, source in handed.items()}
        for number, source in moved.items():
            os.dup2(source, number)
        keep = [-1, *sorted(handed), 1 << 16]
        for low, high in itertools.pairwise(keep):
            os.closerange(low + 1, high)
        run(program, ops)

    try:
        process = Child(body, check)
    finally:
        os.close(null)
    try:
        yield process
    finally:
        process.close()


def run(program: Program, ops: OpList) -> None:
    """Run the operations in this process. AssertionError names the first surprise."""
    data = ctypes.create_string_buffer(bytes(program.data), len(program.data) + 1)
    address = ctypes.addressof(data)
    for where, target in program._relocations:
        struct.pack_into("<Q", data, where, address + target)
    results: list[int] = []
    for op in ops.ops:
        words = []
        for argument in op.arguments:
            match argument:
                case int():
                    words.append(argument)
                case Pointer(offset):
                    words.append(address + offset)
                case Result(index):
                    words.append(results[index])
                case Word(offset):
                    words.append(struct.unpack_from("<i", data, offset)[0])
                case ListAddress():
                    raise AssertionError("a list has no place here")
        words += [0] * (6 - len(words))
        result = _libc.syscall(ctypes.c_long(op.number), *(ctypes.c_long(word) for word in words))
        error = os.strerror(ctypes.get_errno()) if result < 0 else ""
        results.append(result)
        met = {
            lib.LR_EXPECT_OK: result >= 0,
            lib.LR_EXPECT_EQUAL: result == op.want,
            lib.LR_EXPECT_ANY: True,
        }[op.expect]
        assert met, f"{op.resource}: {op.name}{op.arguments}: {result} {error}, wanted {op.want}"


def round_trip(
    body: Callable[[], None],
    check: Callable[[], None] | None = None,
    *,
    ignore: tuple[str, ...] = (),
    streams: dict[int, int] | None = None,
    cwd: str = "/",
    twice: bool = True,
) -> FdTable:
    """Set up a child, survey and end it, restore; the copy's survey must be equal, and `check` must succeed in it.

    twice: survey twice, to see that the first one changed nothing.
    """
    with child(body) as original:
        table = original.survey()
        if twice:
            assert shape(original.survey(), ignore) == shape(table, ignore), "a survey changed something"
    stored = msgspec.msgpack.decode(msgspec.msgpack.encode(table), type=FdTable)
    assert stored == table
    with restored(stored, check, streams=streams, cwd=cwd) as copy:
        assert shape(copy.survey(), ignore) == shape(table, ignore)
        copy.go()
    return table


def record(table: FdTable, number: int) -> Any:
    """What `number` refers to."""
    index = next(descriptor.description for descriptor in table.descriptors if descriptor.number == number)
    return table.descriptions[index]


def shape(table: FdTable, ignore: tuple[str, ...] = ()) -> list[tuple[object, ...]]:
    """What must be equal before and after: numbers, flags, sharing, records; inodes are named by first occurrence."""
    assert table.unsupported == []
    names: dict[int, int] = {}
    seen = []
    for descriptor in table.descriptors:
        record = table.descriptions[descriptor.description]
        values = {name: getattr(record, name) for name in record.__struct_fields__}
        for field in ("inode", "peer"):
            if isinstance(values.get(field), int) and values[field]:
                values[field] = names.setdefault(values[field], len(names))
        for field in ("device", *ignore):
            values.pop(field, None)
        seen.append((descriptor.number, descriptor.cloexec, descriptor.description, type(record).__name__, values))
    return seen
