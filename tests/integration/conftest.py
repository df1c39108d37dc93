"""What every integration test needs: a short private directory, a store, victims that never outlive their test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import Builder, Victims
from helpers_copies import Copies

if TYPE_CHECKING:
    import lazyrestore


def pytest_itemcollected(item: pytest.Item) -> None:
    """Snapshots and restores need root, all of them."""
    item.add_marker(pytest.mark.requires("root"))


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory with a short path (Unix sockets allow 107 bytes) that every user may enter."""
    path = Path(tempfile.mkdtemp(prefix="lr-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def store(run: Path) -> Iterator[lazyrestore.Store]:
    import lazyrestore

    opened = lazyrestore.Store.open(run / "store")
    yield opened
    with suppress(AttributeError):
        opened.close()


@pytest.fixture
def victims(run: Path) -> Iterator[Victims]:
    started = Victims(run)
    yield started
    started.end()


@pytest.fixture
def copies(store: lazyrestore.Store, victims: Victims) -> Iterator[Copies]:
    """Snapshots and restores; asked before `victims` ends, so that copies are ended and reaped first."""
    made = Copies(store, victims)
    yield made
    made.end()


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("victims"))
