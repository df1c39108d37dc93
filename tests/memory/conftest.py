"""A store, a builder and the pager executable under test, as in the integration tests."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from helpers import Builder, Victims
from helpers_lazy_twin import InArena, Twins, twins_in
from helpers_twin import ARENA, ARENA_END

import lazyrestore
from lazyrestore.pager import launch

arenas = itertools.count()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.requires("root"))


@pytest.fixture(scope="session", autouse=True)
def other_pagerd() -> Iterator[None]:
    """$LAZYRESTORE_TEST_PAGERD: another executable to test (tools/sanitize)."""
    usual = launch.PAGERD
    if path := os.environ.get("LAZYRESTORE_TEST_PAGERD"):
        launch.PAGERD = Path(path)
    yield
    launch.PAGERD = usual


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("victims"))


@pytest.fixture(scope="session")
def run() -> Iterator[Path]:
    """A directory with a short path: Unix sockets allow 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="lr-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def store(run: Path) -> Iterator[lazyrestore.Store]:
    with lazyrestore.Store.open(run / "store") as opened:
        yield opened


@pytest.fixture(scope="session")
def victims(run: Path) -> Iterator[Victims]:
    started = Victims(run)
    yield started
    started.end()


@pytest.fixture
def in_arena(victims: Victims, build: Builder, store: lazyrestore.Store, run: Path) -> InArena:
    program = build.c("twin")

    def start(end: int = ARENA_END) -> AbstractContextManager[Twins]:
        directory = run / f"arena{next(arenas)}"
        return twins_in(victims, store, directory, lambda control: [program, control, hex(ARENA), hex(end)])

    return start
