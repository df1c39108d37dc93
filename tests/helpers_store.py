"""Stores for tests: memory made of seeded pages, and child processes that use a store and are told what to do."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazyrestore.store import ImageStore

PAGE = 4096
BASE = 0x7F00_0000_0000


def pages(count: int, seed: int = 0, noise: int = 1024) -> bytearray:
    """`count` pages, each different; `noise` incompressible bytes in each."""
    source = random.Random(seed)
    return bytearray(
        b"".join(source.randbytes(noise) + bytes([number % 251 + 1]) * (PAGE - noise) for number in range(count))
    )


def put(store: ImageStore, name: str, data: bytes | bytearray, *, base: int = BASE, replace: bool = False) -> int:
    """Store `data` as one run at `base`; returns the snapshot's id."""
    with store.writer(name, replace=replace) as writer:
        writer.add(memoryview(data), [(base, 0, len(data))])
        return writer.commit(b"manifest of " + name.encode())


def get(store: ImageStore, name: str, length: int, *, base: int = BASE) -> bytes:
    with store.open_image(name) as image:
        return image.read(base, length)


class Child:
    """A Python process that runs `code` with `store` open as the store at `path`; `say` and `hear` pass lines."""

    PROLOGUE = (
        "import sys\n"
        "from lazyrestore.store import ImageStore\n"
        "from helpers_store import *\n"
        "def say(*words): print(*words, flush=True)\n"
        "def hear(): return sys.stdin.readline().strip()\n"
        "store = ImageStore.open(sys.argv[1])\n"
    )

    def __init__(self, path: Path, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROLOGUE + code, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={"PYTHONPATH": ":".join(entry for entry in sys.path if entry)},
        )

    def hear(self) -> str:
        """The next line it says, "" if it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, line: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def child(path: Path, code: str) -> Iterator[Child]:
    """A Child that is gone at the end, whatever happens."""
    started = Child(path, code)
    try:
        yield started
    finally:
        started.kill()
        for pipe in (started.process.stdin, started.process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A small file system of its own at `folder`; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "lazyrestore-test", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
