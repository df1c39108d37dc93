"""A private mapping of a file of which every second page was written. usage: private_file.py CONTROL_SOCKET FILE

Requests: "bytes", answered with the first byte of each page; "drop" (MADV_DONTNEED of all) with the same afterwards."""

from __future__ import annotations

import mmap
import sys

import control

with open(sys.argv[2], "rb") as file:
    memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
for at in range(0, len(memory), 2 * mmap.PAGESIZE):
    memory[at] = ord("w")


def answer(request: str) -> str:
    if request == "drop":
        memory.madvise(mmap.MADV_DONTNEED)
    return memory[:: mmap.PAGESIZE].decode()


control.serve(sys.argv[1], answer)
