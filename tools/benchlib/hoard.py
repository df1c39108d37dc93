"""A victim that holds a given amount of memory: for "a restore costs O(VMAs)" and "zeros cost nothing".

usage: hoard.py SOCKET MEGABYTES {filled|zeros|untouched}

filled: every page differs from every other and compresses like ordinary data (about 4:1). zeros: the memory is
written with zeros. untouched: it is only mapped. Each connection to the Unix socket is answered with the sum over a few
pages.
"""

from __future__ import annotations

import socket
import sys

import numpy as np

WORDS_PER_PAGE = 4096 // 8
PAGES_TOUCHED = 16


def fill(memory: np.ndarray) -> None:
    """Write a pattern with the entropy of small numbers, and a counter into every page."""
    block = np.random.Generator(np.random.PCG64(3)).integers(0, 4096, size=1 << 17, dtype=np.int64)
    for start in range(0, len(memory), len(block)):
        part = memory[start : start + len(block)]
        part[:] = block[: len(part)]
    memory[::WORDS_PER_PAGE] = np.arange(len(memory[::WORDS_PER_PAGE]), dtype=np.int64)


def main() -> None:
    path, megabytes, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    memory = np.empty(megabytes << 17, dtype=np.int64)
    if mode == "filled":
        fill(memory)
    elif mode == "zeros":
        memory[:] = 0
    step = len(memory) // PAGES_TOUCHED
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    while True:
        connection, _ = server.accept()
        with connection:
            connection.recv(64)
            connection.sendall(str(int(memory[::step].sum())).encode())


if __name__ == "__main__":
    main()
