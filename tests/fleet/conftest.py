"""Real clones of real processes: a short private directory, a store, victims that never outlive their test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Builder, Victims

import lazyrestore


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.requires("root"))


@pytest.fixture
def run() -> Iterator[Path]:
    """A directory with a short path: Unix sockets allow 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="lr-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def store(run: Path) -> Iterator[lazyrestore.Store]:
    with lazyrestore.Store.open(run / "store") as opened:
        yield opened


@pytest.fixture
def victims(run: Path) -> Iterator[Victims]:
    started = Victims(run)
    yield started
    started.end()


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("victims"))
