"""A restore program: a flat list of system calls, as data.

A manifest compiles to a `Program`; `link()` turns it into one blob (executor, ops, data, stacks) that runs at a fixed
address of a new process (see `_native/executor.h`). Nothing here knows a resource: resources append operations with
`call()`, and the builder keeps for every operation which resource it serves, so that a failure is reported as
`fd 7 (timerfd): timerfd_settime: EINVAL` and `explain()` can print the program without running it.

Descriptors are allocated while the program is compiled. The kernel always gives the lowest free number, so
`Descriptors` knows which number a call will return; the executor checks that it did.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Protocol

import msgspec

from lazyrestore._native import _core
from lazyrestore.restore_plan import Linked

lib = _core.lib
ffi = _core.ffi

_OP = struct.Struct("<I6BBB4x6Qqq")
assert _OP.size == ffi.sizeof("struct lr_op")
_KEEP = ffi.offsetof("struct lr_op", "keep")
_LIST = struct.Struct("<QQ")
_MASK = (1 << 64) - 1

# An operation whose arguments are all plain numbers, by how many they are: number, expect, arguments, want.
_PLAIN = [struct.Struct(f"<I6xB5x{count}q{8 * (6 - count)}xq8x") for count in range(7)]
assert all(plain.size == _OP.size for plain in _PLAIN)
_EXPECT_OK, _EXPECT_EQUAL, _EXPECT_ANY = lib.LR_EXPECT_OK, lib.LR_EXPECT_EQUAL, lib.LR_EXPECT_ANY

PAGE = 4096
LEADER_STACK = 4096
THREAD_STACK = 1024


@cache
def call_names() -> dict[int, str]:
    """System call numbers and the executor's special ones → their names, for people."""
    names: dict[int, str] = {getattr(lib, name): name[4:] for name in dir(lib) if name.startswith("SYS_")}
    names[lib.LR_OP_STOP] = "stop"
    names[lib.LR_OP_THREAD] = "start_thread"
    names[lib.LR_OP_REPEAT] = "repeat_while_0"
    return names


class Pointer(msgspec.Struct, frozen=True):
    """The address of `offset` bytes into the program's data."""

    offset: int

    def __add__(self, more: int) -> Pointer:
        return Pointer(self.offset + more)


class Result(msgspec.Struct, frozen=True):
    """The result of an earlier operation of the same list."""

    index: int


class Word(msgspec.Struct, frozen=True):
    """The signed 32-bit number that an earlier operation wrote at `offset` bytes into the data."""

    offset: int


class KernelMapping(msgspec.Struct, frozen=True):
    """Where the kernel's mapping of that number (at most 2: vvar, vdso and the like, by address) lies in a process that
    has just started."""

    number: int


class ListAddress(msgspec.Struct, frozen=True):
    """The address of another list of the program (a thread's)."""

    number: int


Argument = int | Pointer | Result | Word | KernelMapping | ListAddress


class Labelled(Protocol):
    """What an operation can serve besides a name: something that makes up its name when it is asked."""

    @property
    def label(self) -> str: ...


Served = str | Labelled


class Op(msgspec.Struct, frozen=True):
    """One system call: what the executor gets, plus what a person is told."""

    number: int
    arguments: tuple[Argument, ...]
    expect: int
    want: int
    resource: str
    note: str = ""

    @property
    def name(self) -> str:
        return call_names().get(self.number, f"syscall {self.number}")


class _Serving:
    """Names the resource of the operations that are appended inside its block."""

    __slots__ = ("_ops", "_outer", "_resource")

    def __init__(self, ops: OpList, resource: Served) -> None:
        self._ops, self._resource, self._outer = ops, resource, ops.resource

    def __enter__(self) -> None:
        self._ops.resource = self._resource

    def __exit__(self, *_: object) -> None:
        self._ops.resource = self._outer


class OpList:
    """The operations of one thread. `with ops.serving("fd 3 (file)"):` names the resource of what is appended.

    They are packed as they come, as there are hundreds of them, and compiling delays every first restore; arguments
    whose values depend on where the program will lie are left to link(). `ops` makes records of them again, for people.
    """

    def __init__(self, program: Program, number: int) -> None:
        self.program = program
        self.number = number
        self.resource: Served = ""
        self._packed = bytearray()
        self._told: list[tuple[Served, str, int]] = []  # of each operation: what it serves, note, number of arguments
        self._open: dict[int, tuple[Argument, ...]] = {}  # operation → arguments that are not all plain numbers

    def __len__(self) -> int:
        return len(self._told)

    @property
    def ops(self) -> list[Op]:
        return [self.op(index) for index in range(len(self._told))]

    def op(self, index: int) -> Op:
        number, expect, *values, want = _PLAIN[6].unpack_from(self._packed, index * _OP.size)
        served, note, count = self._told[index]
        arguments = self._open.get(index, tuple(values[:count]))
        return Op(number, arguments, expect, want, served if isinstance(served, str) else served.label, note)

    def serving(self, resource: Served) -> _Serving:
        return _Serving(self, resource)

    def call(self, number: int, *arguments: Argument, note: str = "") -> None:
        """Append a call that must not fail."""
        self._append(number, arguments, _EXPECT_OK, 0, note)

    def call_expecting(self, want: int, number: int, *arguments: Argument, note: str = "") -> None:
        """Append a call that must return exactly `want`."""
        self._append(number, arguments, _EXPECT_EQUAL, want, note)

    def try_call(self, number: int, *arguments: Argument, note: str = "") -> Result:
        """Append a call whose failure does not matter."""
        return Result(self._append(number, arguments, _EXPECT_ANY, 0, note))

    def stop(self, note: str) -> None:
        """Let the tracer in at this point."""
        self._append(lib.LR_OP_STOP, (), _EXPECT_ANY, 0, note)

    def repeat_while_zero(self, value: Result, start: Result, note: str = "") -> None:
        """Go back to the operation of `start` as long as `value` is 0."""
        self._append(lib.LR_OP_REPEAT, (value, start.index), _EXPECT_ANY, 0, note)

    def start_thread(self, clone_args: Pointer, size: int, ops: OpList, want_tid: int) -> None:
        self._append(lib.LR_OP_THREAD, (clone_args, size, ListAddress(ops.number)), _EXPECT_EQUAL, want_tid, "")

    def linked(self, data_at: int, lists: list[int]) -> bytearray:
        """The operations for a program with its data at `data_at` and its lists at `lists`."""
        packed = bytearray(self._packed)
        for index, arguments in self._open.items():
            number, expect, *_, want = _PLAIN[6].unpack_from(packed, index * _OP.size)
            kinds, values = _resolve(arguments, data_at, lists)
            _OP.pack_into(packed, index * _OP.size, number, *kinds, expect, 0, *values, want, 0)
        for index in {a.index for arguments in self._open.values() for a in arguments if isinstance(a, Result)}:
            packed[index * _OP.size + _KEEP] = 1
        return packed

    def _append(self, number: int, arguments: tuple[Argument, ...], expect: int, want: int, note: str) -> int:
        """Returns the index of the operation."""
        index = len(self._told)
        try:
            self._packed += _PLAIN[len(arguments)].pack(number, expect, *arguments, want)
        except struct.error:  # not a plain number, or one above 2^63
            self._packed += _PLAIN[0].pack(number, expect, want)
            self._open[index] = arguments
        self._told.append((self.resource, note, len(arguments)))
        return index


class Program(msgspec.Struct):
    """Lists of operations (the first is the leader's) and the data they point to."""

    lists: list[OpList] = msgspec.field(default_factory=list)
    data: bytearray = msgspec.field(default_factory=bytearray)
    _strings: dict[bytes, Pointer] = msgspec.field(default_factory=dict)
    _stack_fields: list[tuple[int, int]] = msgspec.field(default_factory=list)

    def add_list(self) -> OpList:
        ops = OpList(self, len(self.lists))
        self.lists.append(ops)
        return ops

    def op(self, number: int, index: int) -> Op:
        """Operation `index` of a list, for people, also of one behind its end."""
        ops = self.lists[number]
        return ops.op(index) if index < len(ops) else Op(0, (), 0, 0, "program", "")

    def place(self, content: bytes, align: int = 8) -> Pointer:
        """Put bytes into the data area."""
        self.data.extend(bytes(-len(self.data) % align))
        pointer = Pointer(len(self.data))
        self.data.extend(content)
        return pointer

    def reserve(self, length: int) -> Pointer:
        """Room that an operation writes to."""
        return self.place(bytes(length))

    def string(self, text: str | bytes) -> Pointer:
        """A NUL-terminated string; equal strings are stored once."""
        content = os.fsencode(text) + b"\0"
        if content not in self._strings:
            self._strings[content] = self.place(content, align=1)
        return self._strings[content]

    def stack_of(self, pointer: Pointer, ops: OpList) -> None:
        """Let the 8 bytes at `pointer` hold the lowest address of that list's executor stack when linked."""
        self._stack_fields.append((pointer.offset, ops.number))

    def pointer_at(self, pointer: Pointer, target: Pointer) -> None:
        """Let the 8 bytes at `pointer` hold the address of `target` when linked (a pointer inside a structure)."""
        self._relocations.append((pointer.offset, target.offset))

    _relocations: list[tuple[int, int]] = msgspec.field(default_factory=list)

    def size(self) -> int:
        """Bytes of address space that the linked program takes, a multiple of the page size."""
        code, _ = executor_code()
        total = _align(len(code), PAGE) + len(self.lists) * _LIST.size
        total += sum(map(len, self.lists)) * _OP.size + _align(len(self.data), 16) + 32
        return _align(total + LEADER_STACK + (len(self.lists) - 1) * THREAD_STACK, PAGE)

    def link(self, base: int) -> Linked:
        """Lay the program out for `base` (a page boundary): executor, lists, operations, data, stacks."""
        code, entry = executor_code()
        lists_at = base + _align(len(code), PAGE)
        ops_at = _align(lists_at + len(self.lists) * _LIST.size, 16)
        data_at = _align(ops_at + sum(map(len, self.lists)) * _OP.size, 16)
        stacks_at = _align(data_at + len(self.data), 16)
        image = bytearray(self.size())
        image[: len(code)] = code
        lists: list[int] = []
        stacks: list[int] = []
        op_addresses: list[int] = []
        at, stack = ops_at, stacks_at
        for ops in self.lists:
            lists.append(lists_at + len(lists) * _LIST.size)
            _LIST.pack_into(image, lists[-1] - base, at, len(ops))
            op_addresses.append(at)
            at += len(ops) * _OP.size
            stacks.append(stack)
            stack += THREAD_STACK if ops.number else LEADER_STACK
        for ops, at in zip(self.lists, op_addresses, strict=True):
            image[at - base : at - base + len(ops) * _OP.size] = ops.linked(data_at, lists)
        data = bytearray(self.data)
        for where, number in self._stack_fields:
            struct.pack_into("<Q", data, where, stacks[number])
        for where, target in self._relocations:
            struct.pack_into("<Q", data, where, data_at + target)
        image[data_at - base : data_at - base + len(data)] = data
        tops = [low + (THREAD_STACK if number else LEADER_STACK) for number, low in enumerate(stacks)]
        return Linked(base, image, base + entry, lists, tops, op_addresses, data_at)

    def explain(self) -> Iterator[str]:
        """The program, one line per operation."""
        for ops in self.lists:
            yield f"# {'leader' if ops.number == 0 else f'thread {ops.number}'}"
            for index, op in enumerate(ops.ops):
                yield f"{index:5} {op.resource or '-':32} {self._describe(op)}"

    def _describe(self, op: Op) -> str:
        words = ", ".join(self._word(argument) for argument in op.arguments)
        want = f" == {op.want:#x}" if op.expect == lib.LR_EXPECT_EQUAL else ""
        return f"{op.name}({words}){want}" + (f"  # {op.note}" if op.note else "")

    def _word(self, argument: Argument) -> str:
        match argument:
            case int():
                return str(argument) if -1024 < argument < 65536 else hex(argument & _MASK)
            case Pointer(offset):
                end = self.data.find(b"\0", offset)
                text = bytes(self.data[offset:end])
                if Pointer(offset) == self._strings.get(text + b"\0"):
                    return repr(os.fsdecode(text))
                return f"data+{offset:#x}"
            case Result(index):
                return f"result[{index}]"
            case Word(offset):
                return f"*(int *)(data+{offset:#x})"
            case KernelMapping(number):
                return f"kernel mapping {number}"
            case ListAddress(number):
                return f"list {number}"


class Descriptors:
    """The new process's descriptor table while its program is compiled.

    `reserved` are numbers that hold something of ours (handed over at spawn) until the end of the program.
    """

    def __init__(self, ops: OpList, reserved: Iterable[int], high: int) -> None:
        self.ops = ops
        self.used: set[int] = set(reserved)
        self._high = high
        self._full_below = 0  # every number below is used

    def lowest(self, minimum: int = 0) -> int:
        number = max(minimum, self._full_below)
        while number in self.used:
            number += 1
        if minimum <= self._full_below:
            self._full_below = number
        return number

    def create(self, syscall: int, *arguments: Argument, note: str = "") -> int:
        """Append a call that returns a new descriptor; returns the number it will have."""
        number = self.lowest()
        self.ops.call_expecting(number, syscall, *arguments, note=note)
        self.used.add(number)
        return number

    def create_pair(self, syscall: int, *arguments: Argument, note: str = "") -> tuple[int, int]:
        """Append a call (pipe2, socketpair, …) that makes two descriptors; its out pointer is among the arguments."""
        first = self.lowest()
        second = self.lowest(first + 1)
        self.ops.call_expecting(0, syscall, *arguments, note=note)
        self.used.update((first, second))
        return first, second

    def close(self, number: int) -> None:
        self.ops.call(lib.SYS_close, number)
        self.used.discard(number)
        self._full_below = min(self._full_below, number)

    def settle(self, moves: dict[int, dict[int, bool]]) -> None:
        """Put each descriptor where it belongs: {current number: {wanted number: close-on-exec}}.

        A current number that is not wanted is closed. A wanted number may be another one's current number: that one
        goes first. As no number is wanted twice, who waits for one another waits in a ring, and one of each ring steps
        aside: a single number above is enough, however many there are and however low the limit is.
        """
        wanted_by = {want: now for now, wants in moves.items() for want in wants if want != now}
        waits_for = {now: len(wants.keys() & (moves.keys() - {now})) for now, wants in moves.items()}
        ready = [now for now, others in waits_for.items() if not others]
        aside: dict[int, int] = {}
        unsettled = dict.fromkeys(moves)  # in order
        while unsettled:
            if ready:
                now = ready.pop()
                del unsettled[now]
                self._place(aside.get(now, now), moves[now])
                leaves = now not in aside and now not in moves[now]
            else:
                now, leaves = next(iter(unsettled)), True
                self.ops.call(lib.SYS_fcntl, now, lib.F_DUPFD_CLOEXEC, self._high, note="out of the way")
                aside[now] = self.lowest(self._high)
                self.used.add(aside[now])
                self.close(now)
            if leaves and now in wanted_by:
                waits_for[wanted_by[now]] -= 1
                if not waits_for[wanted_by[now]]:
                    ready.append(wanted_by[now])

    def _place(self, at: int, wants: dict[int, bool]) -> None:
        for want, cloexec in wants.items():
            if want == at:
                self.ops.call(lib.SYS_fcntl, at, lib.F_SETFD, lib.FD_CLOEXEC if cloexec else 0)
            else:
                self.ops.call_expecting(want, lib.SYS_dup3, at, want, lib.O_CLOEXEC if cloexec else 0)
            self.used.add(want)
        if at not in wants:
            self.close(at)


_code: tuple[bytes, int] | None = None


def _resolve(arguments: tuple[Argument, ...], data_at: int, lists: list[int]) -> tuple[list[int], list[int]]:
    """Kinds and values of six arguments."""
    kinds, values = [0] * 6, [0] * 6
    for position, argument in enumerate(arguments):
        if isinstance(argument, int):
            values[position] = argument & _MASK
        elif isinstance(argument, Pointer):
            values[position] = data_at + argument.offset
        elif isinstance(argument, Result):
            kinds[position], values[position] = lib.LR_RESULT, argument.index
        elif isinstance(argument, Word):
            kinds[position], values[position] = lib.LR_WORD, data_at + argument.offset
        elif isinstance(argument, KernelMapping):
            kinds[position], values[position] = lib.LR_KERNEL, argument.number
        else:
            values[position] = lists[argument.number]
    return kinds, values


def executor_code() -> tuple[bytes, int]:
    """The executor's position-independent bytes and the offset of its entry point."""
    global _code
    if _code is None:
        length, entry = ffi.new("size_t *"), ffi.new("size_t *")
        address = lib.lr_executor_code(length, entry)
        _code = bytes(ffi.buffer(address, length[0])), int(entry[0])
    return _code


def _align(value: int, boundary: int) -> int:
    return -(-value // boundary) * boundary
