"""Runs `doctor --json` with something taken away from the process first.

usage: denied.py '{"number": N, "argument": I, "value": V}' | '{"file_size": BYTES}' | '{"user": UID}' | '{}'

number: a system call that is answered ENOSYS by a seccomp filter, if its argument number I has the value V (low 32
bits), or whatever its arguments are.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import struct
import sys

from lazyrestore.cli.doctor import doctor_command

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000


def filter_program(number: int, argument: int | None, value: int | None) -> bytes:
    """A classic BPF program over struct seccomp_data: number at 0, argument i at 16 + 8 i, little endian."""
    steps = [(LOAD, 0, 0, 0)]
    if argument is None:
        steps += [(JUMP_IF_EQUAL, 0, 1, number)]
    else:
        steps += [(JUMP_IF_EQUAL, 0, 3, number), (LOAD, 0, 0, 16 + 8 * argument), (JUMP_IF_EQUAL, 0, 1, value or 0)]
    steps += [(RETURN, 0, 0, ERRNO | errno.ENOSYS), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def deny(number: int, argument: int | None = None, value: int | None = None) -> None:
    """Install the filter for this process and its children."""
    code = filter_program(number, argument, value)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    wish = json.loads(sys.argv[1])
    if "file_size" in wish:
        resource.setrlimit(resource.RLIMIT_FSIZE, (wish["file_size"], wish["file_size"]))
    elif "user" in wish:
        os.setresuid(wish["user"], wish["user"], wish["user"])
    elif wish:
        deny(**wish)
    doctor_command(["--json"])


if __name__ == "__main__":
    main()
