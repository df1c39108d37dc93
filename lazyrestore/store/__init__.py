"""Snapshots on disk: an LMDB environment of packs, chunk indexes and manifests. Knows no process."""

from lazyrestore.store.check import Damage, Report
from lazyrestore.store.format import CHUNK, HUGE_CHUNK
from lazyrestore.store.garbage import Freed
from lazyrestore.store.image import StoredImage
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
    "Report",
    "Sharing",
    "StoredImage",
    "Summary",
    "Totals",
]
