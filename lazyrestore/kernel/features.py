"""What this kernel and these privileges allow, found by trying.

Facts. A kernel version says little: distributions switch features off, containers filter system calls, sysctls and
security modules forbid what the kernel could do, and capabilities come one by one.
Consequence. Nothing here compares versions; each feature is used once, the way lazyrestore uses it.
Choice. One table of probes (features_lazy, features_process), tried on demand; results are not cached beyond a call.
Cost. All together about 50 ms.
"""

from __future__ import annotations

from collections.abc import Iterable

from lazyrestore.errors import MissingFeature
from lazyrestore.kernel import features_lazy, features_process
from lazyrestore.kernel.features_record import Feature, Probe, Result, attempt

__all__ = ["PROBES", "Feature", "Probe", "Result", "require", "try_all", "try_one", "usable"]

PROBES: tuple[Probe, ...] = (*features_lazy.PROBES, *features_process.PROBES)


def try_one(name: str) -> Feature:
    """Try the feature of that name. Raises KeyError if there is none."""
    for probe in PROBES:
        if probe.name == name:
            return attempt(probe)
    raise KeyError(name)


def try_all() -> list[Feature]:
    """Try every feature, in the table's order."""
    return [attempt(probe) for probe in PROBES]


def usable(features: Iterable[Feature]) -> bool:
    """Whether snapshot and restore will work, going by these features."""
    return all(feature.ok for feature in features)


def require(name: str) -> None:
    """Raises MissingFeature with the reason and the advice, unless the feature works."""
    feature = try_one(name)
    if feature.result is not Result.WORKS:
        raise MissingFeature(feature.name, feature.how, feature.detail, feature.advice)
