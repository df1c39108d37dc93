"""The machine's pool of 2 MiB huge pages, larger for as long as a test runs."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import until

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
FREE, SURPLUS = POOL.with_name("free_hugepages"), POOL.with_name("surplus_hugepages")


def persistent() -> int:
    """The size of the pool, without the pages that are still in use since it was made smaller."""
    while True:
        surplus, size = int(SURPLUS.read_text()), int(POOL.read_text())
        if int(SURPLUS.read_text()) == surplus:  # else one was freed between the two
            return size - surplus


@contextmanager
def larger_pool(pages: int) -> Iterator[None]:
    """`pages` more than there are, under a lock: other test runs do the same. Skips if they cannot be had."""
    if not POOL.exists():
        pytest.skip("no 2 MiB huge pages on this machine")
    with open("/run/lock/lazyrestore-test-hugepages", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = persistent()
        POOL.write_text(str(before + pages))
        try:
            if persistent() < before + pages:
                pytest.skip(f"no {pages} free huge pages")
            # Those in use since before, by pagers that linger, are surplus now and go first.
            until(lambda: int(FREE.read_text()) >= pages, f"{pages} free huge pages")
            yield
        finally:
            POOL.write_text(str(before))
