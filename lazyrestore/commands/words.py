"""How numbers and tables are written for people, and how process ids are read."""

from __future__ import annotations

from collections.abc import Sequence

from lazyrestore.errors import ESCAPED

LARGEST_PID = (1 << 31) - 1  # a C int


def is_process_id(word: str) -> bool:
    """Whether the word can be one."""
    return word.isascii() and word.isdigit() and 0 < int(word) <= LARGEST_PID


def size(count: float) -> str:
    """Bytes in binary units: "12.3 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def columns(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Rows of words as aligned lines, control characters escaped; the columns in `right` are aligned to the right."""
    rows = [[word.translate(ESCAPED) for word in row] for row in rows]
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            word.rjust(width) if index in right else word.ljust(width)
            for index, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def counted(count: int, noun: str) -> str:
    """ "1 chunk", "2 chunks"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
