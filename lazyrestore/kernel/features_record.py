"""What trying a kernel feature is: the attempt with its meaning for the user (Probe), and what came of it (Feature)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from lazyrestore._native import _core


class Result(StrEnum):
    """works: tried and seen to work; missing: tried and failed; untried: nothing to try it with."""

    WORKS = "works"
    MISSING = "missing"
    UNTRIED = "untried"


class Untried(Exception):
    """Raised by an attempt that has nothing to try with; the argument says what is not there."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One feature: how it is tried, and what it means.

    purpose: what lazyrestore uses it for; needed: snapshot and restore do not work without it; how: what `attempt`
    does; without: what stops working; advice: what to do. attempt returns a detail ("" if there is nothing to add), and
    raises OSError (filename: the step that failed) or Untried.
    """

    name: str
    purpose: str
    needed: bool
    how: str
    without: str
    advice: str
    attempt: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Feature:
    """A tried Probe. detail: the step and error that it failed with, what is not there, or what was found."""

    name: str
    purpose: str
    needed: bool
    how: str
    result: Result
    detail: str
    without: str
    advice: str

    @property
    def ok(self) -> bool:
        """Whether snapshot and restore can do without more: it works, or is not needed."""
        return self.result is Result.WORKS or not self.needed


def attempt(probe: Probe) -> Feature:
    """Try it now. Raises nothing that an attempt may raise."""
    try:
        result, detail = Result.WORKS, probe.attempt()
    except OSError as error:
        result, detail = (
            Result.MISSING,
            f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror),
        )
    except Untried as error:
        result, detail = Result.UNTRIED, str(error)
    return Feature(probe.name, probe.purpose, probe.needed, probe.how, result, detail, probe.without, probe.advice)


def native(function: str, *arguments: int) -> None:
    """Call `lr_try_<function>` of features.h. Raises OSError: the errno it returns; filename: the failed step."""
    step = _core.ffi.new("char const **")
    number = getattr(_core.lib, f"lr_try_{function}")(*arguments, step)
    if number:
        name = _core.ffi.string(step[0]).decode() if step[0] != _core.ffi.NULL else function
        raise OSError(number, os.strerror(number), name)


def trying(function: str, *arguments: int) -> Callable[[], str]:
    """An attempt that calls `lr_try_<function>`, and has nothing to add when it works."""

    def run() -> str:
        native(function, *arguments)
        return ""

    return run
