"""A stored image made by hand, and a process that maps it and does to its memory what a test says."""

from __future__ import annotations

import ctypes
import os
import random
import select
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import zstandard

from lazyrestore.pager import BACKING_SHARED, BACKING_TEMPLATE, PagerClient, PagerStats, Range, wire
from lazyrestore.store.format import PLANES, PLANES_MARK, sums_of, tag_of, touched_runs

PAGE = 4096
CHUNK = 64 << 10
PIDFD_GETFD = 438  # the same on every architecture
HERE = Path(__file__).parent / "pager"

libc = ctypes.CDLL(None, use_errno=True)


@cache
def victim_program() -> str:
    directory = tempfile.mkdtemp(prefix="lazyrestore-victim-")
    program = f"{directory}/victim"
    subprocess.run(
        ["cc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", HERE / "victim.c", "-o", program],
        check=True,
    )
    return program


def pages(seed: int, length: int = CHUNK) -> bytes:
    """Bytes that compress somewhat, different on each page and for each seed, and never zero."""
    rng = random.Random(seed)
    return b"".join(bytes(rng.choices(range(1, 40), k=64)) * (PAGE // 64) for _ in range(length // PAGE))


@dataclass
class Image:
    """A plain file that stands for data.mdb. `chunks`: image address to raw bytes; every other one is stored in planes.
    Meets `StoredImage`."""

    path: Path
    chunks: Mapping[int, bytes]
    key: str = "test"
    name: str = "test"
    hugetlb: bool = False
    working_set: bytes = b""
    frames: bytes = b""
    frames_offset: int = 0
    recorder: Sequence[str] = ()
    per_pack: int = 7
    data_fd: int = -1
    pin_fd: int = -1
    pin_at: int = 0
    index_offset: int = 0
    sums: bool = True
    packs: list[tuple[int, int]] = field(default_factory=list)
    stored_at: dict[int, tuple[int, int]] = field(default_factory=dict)  # file offset and length of each frame

    def __post_init__(self) -> None:
        compressor = zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True)
        index = bytearray()
        with self.path.open("wb") as file:
            file.write(b"before the first pack")
            for i, (address, raw) in enumerate(sorted(self.chunks.items())):
                if i % self.per_pack == 0:
                    self.packs.append((file.tell(), 0))
                start, length = self.packs[-1]
                frame = compressor.compress(raw)
                if i % 2:
                    frame = PLANES_MARK + compressor.compress(b"".join(raw[plane::PLANES] for plane in range(PLANES)))
                index += wire.CHUNK.pack(address, len(raw), len(self.packs) - 1, length, len(frame))
                self.stored_at[address] = (file.tell(), len(frame))
                self.packs[-1] = (start, length + len(frame))
                file.write(frame)
            file.write(bytes(-file.tell() % 8))
            self.index_offset = file.tell()
            file.write(index)
            file.write(sums_of(index))
        self.data_fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.pin_fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def n_chunks(self) -> int:
        return len(self.chunks)

    def add_frames(self, *counts: int) -> None:
        """The working set's pack: frames of so many of its chunks each, behind all else in the file."""
        compressor = zstandard.ZstdCompressor(level=-5, write_checksum=True, write_content_size=True)
        addresses = sorted(self.chunks)
        touched = [(number, pages) for number, _, pages in wire.TOUCHED.iter_unpack(self.working_set)]
        with self.path.open("ab") as file:
            self.frames_offset = file.tell()
            for count in counts:
                held = touched[:count]
                raw = b"".join(
                    self.chunks[addresses[number]][start:end]
                    for number, pages in held
                    for start, end in touched_runs(pages, len(self.chunks[addresses[number]]))
                )
                frame = compressor.compress(raw)
                del touched[:count]
                self.frames += wire.FRAME.pack(len(frame), count, tag_of(held, frame))
                file.write(frame)

    def damage(self, address: int) -> None:
        """Flips a bit in the middle of a stored chunk."""
        self.flip(*self.stored_at[address])

    def flip(self, offset: int, length: int) -> None:
        """Flips a bit in the middle of these bytes of the file."""
        with self.path.open("r+b") as file:
            file.seek(offset + length // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    def raw(self, address: int, length: int) -> bytes:
        """What memory holds at image addresses [address, address + length)."""
        out = bytearray(length)
        for start, raw in self.chunks.items():
            low, high = max(start, address), min(start + len(raw), address + length)
            if low < high:
                out[low - address : high - address] = raw[low - start : high - start]
        return bytes(out)

    def close(self) -> None:
        os.close(self.data_fd)
        os.close(self.pin_fd)


def crc_of_pages(raw: bytes) -> int:
    """What the victim's `walk` prints."""
    return sum(zlib.crc32(raw[at : at + PAGE]) for at in range(0, len(raw), PAGE))


class Victim:
    """A running victim.c. `ask` sends a command and returns its answer; "" when the process died instead."""

    def __init__(self, pass_fds: Iterable[int] = ()) -> None:
        to_child, self._child_in = os.pipe()
        self._child_out, from_child = os.pipe()
        self.process = subprocess.Popen(
            [victim_program(), str(to_child), str(from_child)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[to_child, from_child, *pass_fds],
        )
        os.close(to_child)
        os.close(from_child)
        self.pid = self.process.pid
        self.pidfd = os.pidfd_open(self.pid)
        self._child_reader = os.fdopen(self._child_out)

    def ask(self, *words: object) -> str:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):  # it died before the question
            self.send(*words)
        return self.process.stdout.readline().strip()

    def send(self, *words: object) -> None:
        assert self.process.stdin
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def fork(self) -> int:
        """Returns the child's pid; `ask_child` talks to it."""
        return int(self.ask("fork"))

    def ask_child(self, *words: object) -> str:
        self.send_child(*words)
        return self.answer_of_child()

    def send_child(self, *words: object) -> None:
        os.write(self._child_in, (" ".join(map(str, words)) + "\n").encode())

    def answer_of_child(self) -> str:
        """Empty when it died instead."""
        return self._child_reader.readline().strip()

    def end_child(self) -> None:
        """The child exits for want of commands."""
        if self._child_in >= 0:
            os.close(self._child_in)
        self._child_in = -1

    def map(self, address: int, length: int, fd: int, offset: int, *, shared: bool = False) -> None:
        assert self.ask("map", address, length, fd, offset, int(shared)) == "ok"

    def attach(
        self,
        client: PagerClient,
        ranges: Iterable[Range],
        shared: Mapping[int, int] | None = None,
        *,
        eager: bool = False,
        record: bool | None = False,
        replay: bool = False,
        own_pages: bool = False,
        fill: str = "none",
    ) -> None:
        """Hands the victim's memory to the pager, and leaves no userfaultfd open but the pager's."""
        inner = int(self.ask("uffd"))
        uffd = libc.syscall(PIDFD_GETFD, self.pidfd, inner, 0)
        assert uffd >= 0, os.strerror(ctypes.get_errno())
        try:
            assert self.ask("close", inner) == "ok"
            client.attach(
                uffd,
                self.pidfd,
                ranges,
                shared,
                eager=eager,
                record=record,
                replay=replay,
                own_pages=own_pages,
                fill=fill,
            )
        finally:
            os.close(uffd)

    def clone(
        self,
        client: PagerClient,
        start: int,
        length: int,
        *,
        record: bool | None = False,
        replay: bool = False,
        own_pages: bool = False,
        fill: str = "none",
    ) -> None:
        """Maps [start, start + length) of the template at the same address, and attaches."""
        self.map(start, length, self.open(f"/proc/{os.getpid()}/fd/{client.template_fd}"), start)
        ranges = [Range(start, start + length, start, BACKING_TEMPLATE)]
        self.attach(client, ranges, record=record, replay=replay, own_pages=own_pages, fill=fill)

    def open(self, path: str) -> int:
        return int(self.ask("open " + path))

    def kill(self) -> None:
        """It has ended, and was collected."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            with suppress(BrokenPipeError):  # what it never read
                stream.close()
        self.end_child()
        self._child_reader.close()
        os.close(self.pidfd)


def stats_when(client: PagerClient, condition: Callable[[PagerStats], bool]) -> PagerStats:
    """The first statistics that meet a condition: the pager counts after it has let the process go on."""
    while not condition(stats := client.stats()):
        os.sched_yield()
    return stats


def await_end(pid: int) -> None:
    """Waits until the process, which need not be our child, has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
    finally:
        os.close(pidfd)


def shared_address(number: int) -> int:
    """Image address of shared object `number`."""
    return (number + 1) << 47


def shared_backing(number: int) -> int:
    return BACKING_SHARED + number
