"""wire.py and protocol.h say the same, by the compiler's own sizes and offsets; both refuse what is out of bounds."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from struct import Struct

import pytest

from lazyrestore.pager import BACKING_HUGETLB, BACKING_SHARED, BACKING_TEMPLATE, wire
from lazyrestore.resources import inherited

PROTOCOL = Path(__file__).parents[2] / "lazyrestore/_native/pager/protocol.h"
STRUCTS = {
    "lr_image": (
        wire.IMAGE,
        "magic version flags n_packs index_offset n_chunks n_working_set n_frames frames_offset name",
    ),
    "lr_pack": (wire.PACK, "offset length"),
    "lr_chunk": (wire.CHUNK, "address length pack offset stored"),
    "lr_touched": (wire.TOUCHED, "chunk written pages"),
    "lr_frame": (wire.FRAME, "stored chunks tag"),
    "lr_range": (wire.RANGE, "start end image backing flags"),
    "lr_request": (wire.REQUEST, "kind version flags n_ranges n_shared shared"),
    "lr_reply": (wire.REPLY, "kind error address step pager keeper n_fds n_spaces"),
    "lr_totals": (
        wire.TOTALS,
        (
            "kind error n_spaces spaces_ended uptime_ns chunks_total chunks_filled chunks_bad bytes_filled bytes_read"
            " faults service_p50_ns service_p99_ns service_max_ns counters"
        ),
    ),
    "lr_space_stats": (
        wire.SPACE,
        "pid generation id intervals bytes_registered service_p50_ns service_p99_ns service_max_ns counters",
    ),
}
CONSTANTS = {
    "LR_PROTOCOL_VERSION": wire.VERSION,
    "LR_IMAGE_MAGIC": wire.IMAGE_MAGIC,
    "LR_IMAGE_HUGETLB": wire.IMAGE_HUGETLB,
    "LR_IMAGE_SUMS": wire.IMAGE_SUMS,
    "LR_INDEX_BLOCK": wire.INDEX_BLOCK,
    "LR_MAX_SHARED": wire.MAX_SHARED,
    "LR_MAX_CHUNK": wire.MAX_CHUNK,
    "LR_HELLO": wire.HELLO,
    "LR_ATTACH": wire.ATTACH,
    "LR_STATS": wire.STATS,
    "LR_STOP": wire.STOP,
    "LR_WORKING_SET": wire.WORKING_SET,
    "LR_INTERVALS": wire.INTERVALS,
    "LR_ATTACH_EAGER": wire.ATTACH_EAGER,
    "LR_ATTACH_NO_RECORD": wire.ATTACH_NO_RECORD,
    "LR_ATTACH_RECORD_AGAIN": wire.ATTACH_RECORD_AGAIN,
    "LR_ATTACH_FILL_IDLE": wire.ATTACH_FILL_IDLE,
    "LR_ATTACH_FILL_NOW": wire.ATTACH_FILL_NOW,
    "LR_ATTACH_NO_REPLAY": wire.ATTACH_NO_REPLAY,
    "LR_ATTACH_OWN_PAGES": wire.ATTACH_OWN_PAGES,
    "LR_WORKING_SET_END": wire.WORKING_SET_END,
    "LR_WORKING_SET_FILLED": wire.WORKING_SET_FILLED,
    "LR_BACKING_TEMPLATE": BACKING_TEMPLATE,
    "LR_BACKING_HUGETLB": BACKING_HUGETLB,
    "LR_BACKING_SHARED": BACKING_SHARED,
    "LR_RANGE_ZERO": wire.RANGE_ZERO,
    "LR_N_COUNTERS": len(wire.COUNTERS),
}


def offsets(layout: Struct, n_fields: int) -> list[int]:
    """Where the first `n_fields` fields lie, by packing ever longer prefixes of the format."""
    codes = _expand(layout.format)
    return [Struct("<" + "".join(codes[:i])).size for i in range(n_fields)]


def _expand(text: str) -> list[str]:
    codes, count = [], ""
    for char in text.removeprefix("<"):
        if char.isdigit():
            count += char
            continue
        codes += [f"{count}s"] if char == "s" else [char] * int(count or 1)
        count = ""
    return codes


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    lines = [f'P("{name}", {name})' for name in CONSTANTS]
    for name, (_, fields) in STRUCTS.items():
        lines.append(f'P("{name}", sizeof(struct {name}))')
        lines += [f'P("{name}.{field}", offsetof(struct {name}, {field}))' for field in fields.split()]
    directory = tmp_path_factory.mktemp("wire")
    source = directory / "sizes.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{PROTOCOL}"\n'
        '#define P(name, value) printf("%s %lld\\n", name, (long long)(value));\n'
        "int main(void) {" + "\n".join(lines) + "}"
    )
    subprocess.run(["cc", source, "-o", directory / "sizes"], check=True)
    text = subprocess.run([directory / "sizes"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


@pytest.mark.parametrize("name", STRUCTS)
def test_struct(name: str, compiler: dict[str, int]) -> None:
    layout, fields = STRUCTS[name]
    assert layout.size == compiler[name]
    names = fields.split()
    assert offsets(layout, len(names)) == [compiler[f"{name}.{field}"] for field in names]


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant(name: str, compiler: dict[str, int]) -> None:
    assert compiler[name] == CONSTANTS[name]


def test_every_constant_is_compared() -> None:
    names = set(re.findall(r"\b(LR_[A-Z_]+) =", PROTOCOL.read_text()))
    assert {name for name in names if not name.startswith("LR_COUNT_")} == set(CONSTANTS)


def test_resources_know_the_same_backings() -> None:
    """They may not import the pager."""
    assert inherited.TEMPLATE == BACKING_TEMPLATE
    assert inherited.HUGETLB == BACKING_HUGETLB
    assert inherited.SHARED == BACKING_SHARED


def test_cffi_reads_the_header() -> None:
    from cffi import FFI

    ffi = FFI()
    ffi.cdef("\n".join(line for line in PROTOCOL.read_text().splitlines() if not line.startswith("#")))
    for name, (layout, _) in STRUCTS.items():
        assert ffi.sizeof(f"struct {name}") == layout.size
