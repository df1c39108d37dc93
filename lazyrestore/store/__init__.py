"""Snapshots on disk: an LMDB environment of packs, chunk indexes and manifests. Knows no process.

Names are imported when they are first used: a restore needs neither the writer nor `verify`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazyrestore.store.check import Damage, Report
    from lazyrestore.store.format import CHUNK, HUGE_CHUNK
    from lazyrestore.store.garbage import Freed
    from lazyrestore.store.image import StoredImage
    from lazyrestore.store.parent import Parent, Reference
    from lazyrestore.store.report import Sharing, Summary, Totals
    from lazyrestore.store.store import ImageStore
    from lazyrestore.store.writer import ImageWriter

__all__ = [
    "CHUNK",
    "HUGE_CHUNK",
    "Damage",
    "Freed",
    "ImageStore",
    "ImageWriter",
    "Parent",
    "Reference",
    "Report",
    "Sharing",
    "StoredImage",
    "Summary",
    "Totals",
]

_HOMES = {
    "CHUNK": "format",
    "Damage": "check",
    "Freed": "garbage",
    "HUGE_CHUNK": "format",
    "ImageStore": "store",
    "ImageWriter": "writer",
    "Parent": "parent",
    "Reference": "parent",
    "Report": "check",
    "Sharing": "report",
    "StoredImage": "image",
    "Summary": "report",
    "Totals": "report",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
