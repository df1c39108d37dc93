"""Two identical victims under the same memory operations: one is snapshotted and restored now and then, one never.

A program is a list of steps, each a name and four small numbers. The numbers become addresses by a model of what is
mapped, so every sublist of a program is a program too: it can be shrunk.

The arena is a range of addresses that is free at first. The model's `Page.origin` numbers the VMAs: pages of one origin
that follow one another lie in one VMA in either process. mremap gets nothing else: a restored mapping is a file mapping
and merges with its neighbours less often than anonymous memory does, so that mremap over two of them is refused
(docs/memory-semantics.md).
"""

from __future__ import annotations

import errno
import itertools
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from helpers import Builder, Victim, Victims, ask

import lazyrestore
from lazyrestore.store import ImageStore
from lazyrestore.store.format import TOUCHED

PAGE = 4096
ARENA, ARENA_PAGES = 0x1000_0000_0000, 512
ARENA_END = ARENA + ARENA_PAGES * PAGE
MEMFD_PAGES = 64
READ, WRITE, EXEC = 1, 2, 4
MAYMOVE_FIXED, DONTUNMAP = 3, 7
ANONYMOUS, SHARED, MEMFD_PRIVATE, MEMFD_SHARED = range(4)

ADVICE = {
    "DONTNEED": 4, "FREE": 8, "REMOVE": 9, "DONTFORK": 10, "DOFORK": 11, "MERGEABLE": 12, "UNMERGEABLE": 13,
    "HUGEPAGE": 14, "NOHUGEPAGE": 15, "DONTDUMP": 16, "DODUMP": 17, "COLD": 20, "PAGEOUT": 21,
    "POPULATE_READ": 22, "POPULATE_WRITE": 23, "NORMAL": 0, "RANDOM": 1, "SEQUENTIAL": 2,
    "WILLNEED": 3,
}  # fmt: skip
# Advice that a file mapping takes otherwise than anonymous memory: known differences, with either result.
DIFFERENT = {
    "FREE": ("0 0", f"-1 {errno.EINVAL}"),
    "REMOVE": (f"-1 {errno.EINVAL}", f"-1 {errno.EACCES}"),
}
SPLITTING = {
    "DONTFORK", "DOFORK", "MERGEABLE", "UNMERGEABLE", "HUGEPAGE", "NOHUGEPAGE", "DONTDUMP", "DODUMP", "NORMAL",
    "RANDOM", "SEQUENTIAL",
}  # fmt: skip

Step = tuple[str, int, int, int, int]


@dataclass(frozen=True)
class Page:
    origin: int
    kind: int
    protection: int
    offset: int = 0  # of a memfd, in pages


class Difference(AssertionError):
    """The two victims did not agree."""


class Pair:
    """The twins. `send` asks both and compares."""

    def __init__(self, victims: Victims, build: Builder, store: lazyrestore.Store, directory: Path) -> None:
        self._store = store
        self._images = store.path
        self._directory = directory
        self._copy: lazyrestore.RestoredProcess | None = None
        self._snapshots: list[lazyrestore.Snapshot] = []
        self.log: list[str] = []
        self.replays = False  # whether the last restore brought a working set
        self._victims = [self._start(victims, build, name) for name in ("never", "restored")]

    def _start(self, victims: Victims, build: Builder, name: str) -> Victim:
        (self._directory / name).mkdir(parents=True)
        control = self._directory / name / "control"
        victim = victims.start([build.c("twin"), control, hex(ARENA), hex(ARENA_END)], cwd=self._directory / name)
        victim.listens(control)
        return victim

    def ask(self, name: str, *words: object) -> str:
        return ask(self._directory / name / "control", " ".join(map(str, words)))

    def send(self, *words: object, different: tuple[str, str] | None = None) -> str:
        """The answer of the one that was never snapshotted; `different`: a pair of results that is right, too."""
        self.log.append(" ".join(f"{word:#x}" if isinstance(word, int) and word > 9 else str(word) for word in words))
        answers = []
        for name in ("never", "restored"):
            try:
                answers.append(self.ask(name, *words))
            except OSError as error:
                raise Difference(f"{name}: {error!r} at {self.log[-1]!r}\n" + "\n".join(self.log)) from error
        if answers[0] != answers[1]:
            results = tuple(answer.rsplit(" ", 1)[0] for answer in answers)
            if results != different:
                raise Difference(f"{answers[0]!r} != {answers[1]!r} at {self.log[-1]!r}\n" + "\n".join(self.log))
        return answers[0]

    def restore(self) -> None:
        """Snapshot, kill and restore one of the two."""
        self.log.append("snapshot")
        pid = self._victims[1].pid
        number = len(self._snapshots)
        snapshot = self._store.snapshot(pid, name=f"{self._directory.name}-{number}", kill=True)
        self._snapshots.append(snapshot)
        if self._copy is None:
            self._victims[1].gone()
        else:
            self._copy.wait()
        self.replays = number % 2 == zlib.crc32(self._directory.name.encode()) % 2
        if self.replays:
            snapshot = self._with_working_set(snapshot)
        self._copy = snapshot.restore()
        assert self._copy.pid == pid

    def _with_working_set(self, snapshot: lazyrestore.Snapshot) -> lazyrestore.Snapshot:
        """With all of its memory in the working set: it arrives while the process does what it does."""
        with ImageStore.open(self._images) as store, store.open_image(snapshot.name) as image:
            everything = b"".join(TOUCHED.pack(k, k * k % 16, k % 16) for k in reversed(range(image.n_chunks)))
            assert store.keep_working_set(snapshot.name, image.snapshot, everything)
        snapshot.close()
        self._snapshots[-1] = self._store.get(snapshot.name)
        return self._snapshots[-1]

    def stats(self) -> lazyrestore.pager.PagerStats:
        assert self._copy
        return self._copy.stats()

    def close(self) -> None:
        for victim in self._victims:
            victim.kill()
        if self._copy is not None:
            self._copy.kill()
            self._copy.wait()
        for snapshot in self._snapshots:
            snapshot.close()
            self._store.remove(snapshot.name)


class Model:
    """What is mapped where; turns steps into requests."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.pages: dict[int, Page] = {}
        self._origins = itertools.count()
        self._brk = 0
        self._trimmed = False  # some mapping of anonymous shared memory does not show all of it any more

    # -- ranges ----

    def _any(self, place: int, length: int) -> tuple[int, int]:
        """Any range of the arena, mapped or not: first page and number of pages."""
        start = place % ARENA_PAGES
        return start, max(1, min(length, ARENA_PAGES - start))

    def _mapped(self, place: int, length: int, same: Callable[[Page], object] = lambda _: None) -> tuple[int, int]:
        """A mapped range on whose pages `same` agrees; (0, 0) if nothing is mapped."""
        known = sorted(self.pages)
        if not known:
            return 0, 0
        start = known[place % len(known)]
        first, n = self.pages[start], 1
        while n < length and (page := self.pages.get(start + n)) and same(page) == same(first):
            n += 1
        return start, n

    def _split(self, start: int, n: int) -> None:
        """The range's ends are ends of VMAs from now on: new origins for its pieces, and for what follows it."""
        for low, high in ((start, start + n), (start + n, ARENA_PAGES)):
            fresh: dict[int, int] = {}
            inner = {self.pages[i].origin for i in range(start, start + n) if i in self.pages}
            for i in range(low, high):
                if (page := self.pages.get(i)) and (low == start or page.origin in inner):
                    origin = fresh.setdefault(page.origin, -1)
                    if origin < 0:
                        origin = fresh[page.origin] = next(self._origins)
                    self.pages[i] = replace(page, origin=origin)

    def _forget(self, start: int, n: int) -> None:
        self._split(start, n)
        for i in range(start, start + n):
            page = self.pages.pop(i, None)
            if page and page.kind == SHARED:
                self._trimmed = True

    def _hidden(self, start: int) -> bool:
        return bool(TRIMMED) and self._trimmed and self.pages[start].kind == SHARED

    # -- steps ----

    def run(self, step: Step) -> None:
        name, *numbers = step
        getattr(self, f"do_{name}")(*numbers)

    def do_map(self, place: int, length: int, kind: int, more: int) -> None:
        start, n = self._any(place, length)
        kind, offset = kind % 4, more % 16
        protection = [READ | WRITE, READ | WRITE, READ, 0, READ | WRITE | EXEC][more % 5]
        if AVOIDED and kind == SHARED and not protection:
            protection = READ
        over = more & 1
        answer = self.pair.send("map", ARENA + start * PAGE, n * PAGE, protection, kind, offset * PAGE, over)
        if not answer.startswith("0 "):
            return
        self._forget(start, n)
        origin = next(self._origins)
        for i in range(n):
            self.pages[start + i] = Page(origin, kind, protection, offset + i)

    def do_unmap(self, place: int, length: int, *_: int) -> None:
        start, n = self._any(place, length)
        self.pair.send("unmap", ARENA + start * PAGE, n * PAGE)
        self._forget(start, n)

    def do_protect(self, place: int, length: int, protection: int, _: int) -> None:
        start, n = self._mapped(place, length)
        if not n:
            return
        protection = [0, READ, READ | WRITE, READ | EXEC, READ | WRITE][protection % 5]
        if AVOIDED and not protection and any(self.pages[i].kind == SHARED for i in range(start, start + n)):
            protection = READ
        self.pair.send("protect", ARENA + start * PAGE, n * PAGE, protection)
        self._split(start, n)
        for i in range(start, start + n):
            self.pages[i] = replace(self.pages[i], protection=protection)

    def do_move(self, place: int, length: int, to: int, more: int) -> None:
        """mremap to a fixed address: the same size, smaller, larger; sometimes the source stays mapped."""
        start, n = self._mapped(place, length, lambda page: page.origin)
        target = to % ARENA_PAGES
        if not n:
            return
        stays = more % 4 == 0 and self.pages[start].kind in (ANONYMOUS, SHARED)
        new = n if stays else max(1, n + more % 9 - 4)
        new = min(new, ARENA_PAGES - target)
        if stays and new != n:
            return
        if new > n and self._hidden(start):
            return
        if target < start + n and start < target + new:  # they overlap
            return
        flags = DONTUNMAP if stays else MAYMOVE_FIXED
        answer = self.pair.send("remap", ARENA + start * PAGE, n * PAGE, new * PAGE, ARENA + target * PAGE, flags)
        if not answer.startswith("0 "):
            return
        first = self.pages[start]
        if stays:
            self._split(start, n)
        else:
            self._forget(start, n)
        self._forget(target, new)
        origin = next(self._origins)
        for i in range(new):
            self.pages[target + i] = replace(first, origin=origin, offset=first.offset + i)

    def do_resize(self, place: int, _: int, by: int, __: int) -> None:
        """mremap in place, at the end of a mapping."""
        start, n = self._mapped(place, ARENA_PAGES, lambda page: page.origin)
        new = min(max(1, n + by % 33 - 16), ARENA_PAGES - start)
        if not n or any(start + i in self.pages for i in range(n, max(n + 1, new))):
            return
        if new > n and self._hidden(start):
            return
        if not self.pair.send("remap", ARENA + start * PAGE, n * PAGE, new * PAGE, 0, 0).startswith("0 "):
            return
        first = self.pages[start]
        self._forget(start + new, max(0, n - new))
        for i in range(n, new):
            self.pages[start + i] = replace(first, offset=first.offset + i)

    def do_advise(self, place: int, length: int, which: int, _: int) -> None:
        start, n = self._mapped(place, length, lambda page: page.kind)
        if not n:
            return
        name = list(ADVICE)[which % len(ADVICE)]
        kind = self.pages[start].kind
        at, size = ARENA + start * PAGE, n * PAGE
        if kind == MEMFD_PRIVATE and name in DIFFERENT:
            return  # where it was written, it is anonymous in one and a file in the other
        if name == "FREE" and not all(self.pages[i].protection & WRITE for i in range(start, start + n)):
            return  # old contents or zeros, as the kernel likes, until it is written
        different = DIFFERENT.get(name) if kind == ANONYMOUS else None
        self.pair.send("advise", at, size, ADVICE[name], different=different)
        if name == "FREE":  # may be zero from now on; an allocator writes before it reads
            self.pair.send("write", at, size, which)
        if name in SPLITTING:
            self._split(start, n)

    def do_brk(self, by: int, _: int, __: int, seed: int) -> None:
        delta = max(-self._brk, by % 65 - 24)
        self._brk += delta
        self.pair.send("brk", (delta * PAGE) % (1 << 64), seed)

    def do_write(self, place: int, length: int, seed: int, _: int) -> None:
        start, n = self._mapped(place, length)
        if n:
            self.pair.send("write", ARENA + start * PAGE, n * PAGE, seed + 1)

    def do_read(self, place: int, length: int, *_: int) -> None:
        start, n = self._mapped(place, length)
        if n:
            self.pair.send("read", ARENA + start * PAGE, n * PAGE)

    def do_fork(self, place: int, length: int, seed: int, how: int) -> None:
        start, n = self._mapped(place, length)
        if n:
            self.pair.send("vfork" if how % 5 == 0 else "fork", ARENA + start * PAGE, n * PAGE, seed + 1)

    def do_pipe(self, place: int, length: int, *_: int) -> None:
        start, n = self._mapped(place, min(length, 16))
        if n:
            self.pair.send("pipe", ARENA + start * PAGE, n * PAGE)

    def do_file(self, place: int, length: int, offset: int, _: int) -> None:
        start, n = self._mapped(place, length)
        if n:
            self.pair.send("file", ARENA + start * PAGE, n * PAGE, offset % MEMFD_PAGES * PAGE)

    def do_list(self, *_: int) -> None:
        self.pair.send("list")

    def do_restore(self, *_: int) -> None:
        self.pair.restore()


NAMES = [name.removeprefix("do_") for name in vars(Model) if name.startswith("do_")]
COMMON = ["map", "map", "move", "write", "write", "read", "advise", "advise", "protect", "resize", "fork"]
MOST_RESTORES = 3
AVOIDED = "a restored shared mapping without PROT_READ cannot be snapshotted again yet: EIO from /proc/PID/mem"
TRIMMED = "what an anonymous shared object holds where no mapping shows it is not stored: growing there reads zero"


def random_program(seed: int, steps: int) -> list[Step]:
    """A program that fills the arena first, then does anything, with one to three restores."""
    rng = random.Random(seed)

    def step(name: str) -> Step:
        return (
            name,
            rng.randrange(ARENA_PAGES),
            rng.choice([1, 2, 5, 16, 40, 100]),
            rng.randrange(64),
            rng.randrange(64),
        )

    program = [step(rng.choice(["map", "map", "write"])) for _ in range(10)]
    program += [step(rng.choice([*COMMON, *NAMES])) for _ in range(steps)]
    program = [step for step in program if step[0] != "restore"]
    for _ in range(rng.randint(1, MOST_RESTORES)):
        program.insert(rng.randrange(10, len(program)), ("restore", 0, 0, 0, 0))
    return program


def to_text(program: Iterable[Step]) -> str:
    return "".join(" ".join(map(str, step)) + "\n" for step in program)


def from_text(text: str) -> list[Step]:
    rows = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, int(a), int(b), int(c), int(d)) for name, a, b, c, d in rows]


@contextmanager
def pair_in(victims: Victims, build: Builder, store: lazyrestore.Store, directory: Path) -> Iterator[Pair]:
    pair = Pair(victims, build, store, directory)
    try:
        yield pair
    finally:
        pair.close()


def run_program(pair: Pair, program: Iterable[Step]) -> None:
    """Runs it on both; raises Difference with all that was asked. The last question is for everything."""
    model = Model(pair)
    for step in program:
        model.run(step)
    pair.send("digest")
    pair.send("digest")  # nothing changed by looking


def shrink(program: list[Step], fails: Callable[[list[Step]], bool]) -> list[Step]:
    """The shortest program found that still fails, by leaving out ever smaller parts."""
    size = len(program) // 2
    while size:
        at = 0
        while at < len(program):
            shorter = program[:at] + program[at + size :]
            if shorter and fails(shorter):
                program = shorter
            else:
                at += size
        size //= 2
    return program
