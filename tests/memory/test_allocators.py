"""Real allocators return memory to the kernel and take it again, after a restore as before: glibc, jemalloc, tcmalloc,
mimalloc. The oracles: every block holds its pattern, calloc gives zeros, the contents are those of a twin that was
never snapshotted, and memory that was returned is no longer resident."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import Builder, Victims, until
from helpers_lazy_twin import lazily_freed, resident, twins_in

import lazyrestore

numbers = itertools.count()
SLACK = 4 << 20  # bytes by which two processes that do the same may differ
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")


class Allocator(NamedTuple):
    """`trim` is its function that returns memory, if it does not do so by itself; `lazily`: with MADV_FREE, which
    restored memory refuses."""

    library: str = ""
    trim: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    lazily: bool = False


ALLOCATORS = {
    "glibc": Allocator(),
    "glibc-trim": Allocator(trim="malloc_trim"),
    "glibc-mmap": Allocator(trim="malloc_trim", environment=(("MALLOC_MMAP_THRESHOLD_", "4096"),)),
    "jemalloc": Allocator("libjemalloc.so.2", environment=(("MALLOC_CONF", "dirty_decay_ms:0,muzzy_decay_ms:0"),)),
    "jemalloc-background": Allocator(
        "libjemalloc.so.2",
        environment=(("MALLOC_CONF", "dirty_decay_ms:0,muzzy_decay_ms:0,background_thread:true"),),
    ),
    "jemalloc-free": Allocator(
        "libjemalloc.so.2", environment=(("MALLOC_CONF", "dirty_decay_ms:1,muzzy_decay_ms:-1"),), lazily=True
    ),
    "tcmalloc": Allocator("libtcmalloc_minimal.so.4", "MallocExtension_ReleaseFreeMemory"),
    "mimalloc": Allocator("libmimalloc.so.2.0", "mi_collect", (("MIMALLOC_DECOMMIT_DELAY", "0"),)),
    "mimalloc-free": Allocator(
        "libmimalloc.so.2.0",
        "mi_collect",
        (("MIMALLOC_ALLOW_DECOMMIT", "0"), ("MIMALLOC_PAGE_RESET", "1"), ("MIMALLOC_DECOMMIT_DELAY", "0")),
        lazily=True,
    ),
}


def returned(copy: lazyrestore.RestoredProcess) -> int:
    """How many times the pager was told that memory was returned."""
    counters = copy.stats().counters
    return counters.removes + counters.unmaps


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("first", ["work", "empty"])
def test_returns_memory_and_takes_it_again(
    victims: Victims, build: Builder, store: lazyrestore.Store, run: Path, name: str, first: str
) -> None:
    """first: what the restored process does before anything else, with nothing of its memory there."""
    allocator = ALLOCATORS[name]
    environment = dict(allocator.environment)
    if allocator.library:
        library = LIBRARIES / allocator.library
        if not library.exists():
            pytest.skip(f"no {library}: tools/setup --test")
        environment["LD_PRELOAD"] = str(library)
    program = build.c("allocator")

    with twins_in(
        victims,
        store,
        run / f"a{next(numbers)}",
        lambda control: [program, control, *filter(None, [allocator.trim])],
        environment,
    ) as twins:
        assert allocator.library in Path(f"/proc/{twins.original.pid}/maps").read_text()

        def both(*words: object) -> None:
            assert twins.both(*words).startswith("0 wrong, ")

        both("work", 1, 1500)
        both("empty")
        both("work", 2, 1000)
        for generation in range(2 if first == "work" else 1):
            copy = twins.restore()
            if first == "work":
                both("work", 10 + generation, 300)
            else:
                both("empty")
            both("work", 20 + generation, 1500)
            dropped, before = returned(copy), resident(copy.pid)
            both("empty")
            if allocator.lazily:
                assert lazily_freed(twins.never.pid)
            else:
                # glibc by itself returns only what is free at the end of a heap; which block lies there depends on how
                # its threads ran, and it may be one that was taken after the restore, which raises no event.
                if name != "glibc":  # the pager counts an event after it has let its caller go on
                    until(lambda copy=copy, dropped=dropped: returned(copy) > dropped, "an event to be counted")
                # Or half of it: of a heap that its threads share, either of the two may keep twice what the other does.
                assert resident(copy.pid) < max(resident(twins.never.pid) * 1.25 + SLACK, before / 2)
            both("work", 30 + generation, 1000)
            both("check")
