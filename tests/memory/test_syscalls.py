"""System calls on memory that has not arrived: the right bytes, the same results and errno as in a twin."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import VICTIMS, Builder, Victims
from helpers_lazy_twin import PAGE, Twins, twins_in

import lazyrestore

SIZE = 32 * PAGE
CASES = re.findall(r"CASE\((\w+)\)", (VICTIMS / "syscalls.c").read_text().partition("cases[] = {")[2])
KINDS = ["private", "shared"]
# Private anonymous memory is a file mapping after a restore: MADV_WIPEONFORK is refused, and nothing is wiped.
WIPE = ("wipe_on_fork", "private")

libc = ctypes.CDLL(None, use_errno=True)
libc.process_vm_readv.restype = libc.ptrace.restype = ctypes.c_long


class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@pytest.fixture(scope="module")
def twins(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path) -> Iterator[Twins]:
    program = build.c("syscalls")
    with twins_in(victims, store, run / "syscalls", lambda control: [program, control]) as twins:
        twins.restore()
        yield twins


def region(twins: Twins, case: str, kind: str) -> int:
    return int(twins.both("region", case, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_case(twins: Twins, case: str, kind: str) -> None:
    if (case, kind) == WIPE:
        never, restored = twins.ask("never", case, kind).split(), twins.ask("restored", case, kind).split()
        assert (never[0], restored[0]) == ("0", "-1(EINVAL)")
        assert never[-1] == restored[-1]  # the parent's memory
        return
    answer = twins.both(case, kind)
    if case == "stack_to_limit":
        assert answer.startswith("42 ")  # it was where it should be that the stack ended
    assert "EFAULT" not in answer or case == "names"  # which asks for a bad path


@pytest.mark.parametrize("kind", KINDS)
def test_process_vm_readv_and_writev_from_outside(twins: Twins, kind: str) -> None:
    at = region(twins, "outside_vm", kind)
    found = []
    for pid in twins.pids:
        room = ctypes.create_string_buffer(SIZE)
        local = Vector(ctypes.addressof(room), SIZE // 2)
        remote = Vector(at + 99, SIZE // 2)
        assert libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) == SIZE // 2
        written = Vector(at + SIZE - 5 * PAGE - 1, 2 * PAGE + 2)  # over the borders of pages that nobody has read
        source = Vector(ctypes.addressof(room), 2 * PAGE + 2)
        assert libc.process_vm_writev(pid, ctypes.byref(source), 1, ctypes.byref(written), 1, 0) == 2 * PAGE + 2
        local = Vector(ctypes.addressof(room), SIZE)
        remote = Vector(at, SIZE)
        assert libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) == SIZE
        found.append(room.raw)
    assert found[0] == found[1]
    assert any(found[0])


def peek(pid: int, address: int) -> int | OSError:
    """PTRACE_PEEKDATA of a process that is attached to for it."""
    attach, detach, peek_data = 16, 17, 2
    if libc.ptrace(attach, pid, None, None):
        raise OSError(ctypes.get_errno(), "PTRACE_ATTACH")
    try:
        with open(f"/proc/{pid}/status") as status:
            while not re.search(r"^State:\tt", status.read(), re.MULTILINE):
                status.seek(0)
        ctypes.set_errno(0)
        word = libc.ptrace(peek_data, pid, ctypes.c_void_p(address), None)
        number = ctypes.get_errno()
        return OSError(number, os.strerror(number)) if number else word
    finally:
        libc.ptrace(detach, pid, None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_proc_mem_and_ptrace(twins: Twins, kind: str) -> None:
    """Since Linux 6.5 these do not wait for a userfaultfd: EIO where nothing has arrived, but never wrong bytes.
    What was touched once they read like any memory."""
    at = region(twins, "outside", kind)
    never, restored = (os.open(f"/proc/{pid}/mem", os.O_RDWR) for pid in twins.pids)
    try:
        expected = os.pread(never, SIZE, at)
        for page in range(0, 32, 5):
            try:
                assert os.pread(restored, PAGE, at + page * PAGE) == expected[page * PAGE :][:PAGE]
            except OSError as error:
                assert error.errno == errno.EIO
            word = peek(twins.pids[1], at + page * PAGE + 8)
            if isinstance(word, OSError):
                assert word.errno == errno.EIO
            else:
                assert word == peek(twins.pids[0], at + page * PAGE + 8)
        room = ctypes.create_string_buffer(SIZE)  # touches all of it
        local, remote = Vector(ctypes.addressof(room), SIZE), Vector(at, SIZE)
        assert libc.process_vm_readv(twins.pids[1], ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) == SIZE
        assert room.raw == os.pread(restored, SIZE, at) == expected
        assert peek(twins.pids[1], at + 8) == peek(twins.pids[0], at + 8)
        for descriptor in (never, restored):
            assert os.pwrite(descriptor, b"written from outside", at + 3 * PAGE - 7) == 20
        assert os.pread(restored, SIZE, at) == os.pread(never, SIZE, at)
    finally:
        os.close(never)
        os.close(restored)


@pytest.mark.requires("program:gdb")
def test_gdb(twins: Twins) -> None:
    """A debugger calls a function of the process: the call reads what gdb itself could not."""
    at = region(twins, "debugger", "private")
    found = []
    for pid in twins.pids:
        script = [f"print/x *(long *){at + 2 * PAGE}"]
        script += [f"print/x (unsigned long)hash_of({at}, {SIZE})", *script, "bt 1"]
        command = ["gdb", "-p", str(pid), "-batch", "-nx", *(word for line in script for word in ("-ex", line))]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        found.append(re.findall(r"^\$\d+ = (0x\w+)", ended.stdout, re.MULTILINE))
        assert len(found[-1]) >= 2, ended.stdout + ended.stderr
        assert "accept" in ended.stdout, ended.stdout
    assert found[1] in (found[0], found[0][1:])  # the first one is the one that may have to fail
