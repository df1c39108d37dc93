"""Python's side of the pager: start it or find it, hand restored address spaces over to it, ask it how it is doing."""

from .client import (
    BACKING_HUGETLB,
    BACKING_SHARED,
    BACKING_TEMPLATE,
    Interval,
    PagerClient,
    PagerStats,
    Range,
    ServiceTimes,
    SpaceStats,
)
from .launch import StoredImage, connect_existing, connect_or_start, runtime_directory

__all__ = [
    "BACKING_HUGETLB",
    "BACKING_SHARED",
    "BACKING_TEMPLATE",
    "Interval",
    "PagerClient",
    "PagerStats",
    "Range",
    "ServiceTimes",
    "SpaceStats",
    "StoredImage",
    "connect_existing",
    "connect_or_start",
    "runtime_directory",
]
