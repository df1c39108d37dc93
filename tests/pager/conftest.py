from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers_pager import CHUNK, Image, Victim, await_end, pages

from lazyrestore.pager import PagerClient, connect_or_start, launch

BASE = 0x10_0000_0000


@pytest.fixture(autouse=True)
def other_pagerd(monkeypatch: pytest.MonkeyPatch) -> None:
    """$LAZYRESTORE_TEST_PAGERD: another executable to test (tools/sanitize)."""
    if path := os.environ.get("LAZYRESTORE_TEST_PAGERD"):
        monkeypatch.setattr(launch, "PAGERD", Path(path))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A run-time directory of this test's own: its pagers are nobody else's."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def make_image(tmp_path: Path, stack: ExitStack) -> Callable[..., Image]:
    def make(chunks: dict[int, bytes] | None = None, **more: object) -> Image:
        if chunks is None:  # 2 MiB from BASE on, with holes
            chunks = {BASE + i * CHUNK: pages(i) for i in range(32) if i % 8 not in (2, 5)}
        image = Image(tmp_path / "data", chunks, **more)  # type: ignore[arg-type]
        stack.callback(image.close)
        return image

    return make


@pytest.fixture
def start(runtime: Path) -> Iterator[Callable[..., PagerClient]]:
    """Connects to an image's pager, starting it; at the end of the test, waits for it to exit."""
    with ExitStack() as stack:

        def start(image: Image, linger_ms: int = 0) -> PagerClient:
            client = connect_or_start(image, runtime_dir=runtime, linger_ms=linger_ms)
            pager, _ = client.pids()
            stack.callback(await_end, pager)
            stack.callback(client.close)
            return client

        yield start


@pytest.fixture
def make_victim(start: object) -> Iterator[Callable[[], Victim]]:
    """Victims end before the pagers are waited for, hence `start`."""
    with ExitStack() as stack:

        def make() -> Victim:
            victim = Victim()
            stack.callback(victim.close)
            return victim

        yield make
