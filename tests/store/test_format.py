"""The format on disk: old stores stay readable, and docs/format.md tells the truth."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers_golden
import pytest

from lazyrestore.errors import StoreVersionError
from lazyrestore.store import ImageStore, format
from lazyrestore.store.writer import BATCH


@pytest.fixture(params=helpers_golden.FOLDERS)
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def path(tmp_path: Path, version: int) -> Path:
    return Path(shutil.copytree(helpers_golden.FOLDERS[version], tmp_path / "golden"))


@pytest.fixture
def store(path: Path) -> ImageStore:
    return ImageStore.open(path, create=False)


def test_the_golden_store_is_readable(store: ImageStore, version: int) -> None:
    pieces = helpers_golden.pieces(version)
    assert [each.name for each in store.ls()] == ["golden", "second-1.0:@+_"]
    report = store.verify()
    assert not report.damage and report.snapshots == 2
    assert store.manifest("golden") == helpers_golden.MANIFEST
    with store.open_image("golden") as first, store.open_image("second-1.0:@+_") as second:
        assert first.hugetlb
        for address, content in pieces.items():
            assert first.read(address, len(content)) == content
            assert second.read(address, len(content)) == b"changed" + content[7:]
    shown = store.show("second-1.0:@+_")
    assert shown.added_bytes < shown.stored_bytes
    assert shown.raw_bytes == sum(map(len, pieces.values()))
    store.close()


def test_the_golden_store_is_writable(store: ImageStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added is of this version, which an older lazyrestore refuses to read."""
    content = helpers_golden.PIECES[helpers_golden.PRIVATE]
    with store.writer("new") as writer:
        writer.add(memoryview(content), [(helpers_golden.PRIVATE, 0, len(content))], chunk_size=1 << 16)
        writer.commit(b"")
    assert store.show("new").added_bytes == 0
    store.rm("golden")
    assert not store.verify().damage
    store.close()
    monkeypatch.setattr(format, "VERSION", format.VERSION - 1)
    with pytest.raises(StoreVersionError, match=f"format {format.VERSION + 1}"):
        ImageStore.open(path)


@pytest.mark.parametrize("version", [2], indirect=True)
def test_numbers_are_stored_in_planes(store: ImageStore) -> None:
    with store, store.open_image("golden") as image:
        entries = [each for each in image.entries() if each[0] >> 32 == helpers_golden.NUMBERS >> 32]
        assert entries
        for _, _, slot, offset, stored in entries:
            assert image.read_data(image.packs[slot][0] + offset, stored).startswith(format.PLANES_MARK)


def test_the_documented_layouts() -> None:
    text = Path("docs/format.md").read_text()
    assert f"version {format.VERSION}" in text
    letters = {"u64": "Q", "u32": "I"}
    for name, layout in (("struct lr_chunk {", format.ENTRY), ("location {", format.LOCATION)):
        block = text.split(name, 1)[1].split("}", 1)[0]
        assert "<" + "".join(letters[kind] for kind in re.findall(r"\b(u64|u32) ", block)) == layout.format
        assert f"{layout.size} bytes" in block
    for value in (format.IDENTITY, format.COUNTERS):
        assert f'"{value.decode()}"' in text
    for table in (
        value for name, value in vars(format).items() if name.isupper() and isinstance(value, bytes) and len(value) == 1
    ):
        assert f"`{table.decode()}` +" in text
    for number in (format.CHUNK, format.HUGE_CHUNK, format.PACK_MAX):
        assert f"{number} " in text


def test_importing_the_store_is_cheap() -> None:
    """What only writing and verifying need is loaded when they need it."""
    heavy = ("zstandard", "blake3", "ctypes", "concurrent.futures", "logging", "numpy")
    code = f"import sys; from lazyrestore.store import ImageStore; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert BATCH % format.HUGE_CHUNK == 0
