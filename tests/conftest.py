"""What a test needs of the machine: `@pytest.mark.requires("set-tid", "program:java", "root")`.

Names are those of `lazyrestore doctor`; "program:NAME" is a program on PATH, "root" the user. A test whose needs are
not met is skipped with the reason. With LAZYRESTORE_REQUIRE_ALL set, everything that would be skipped, by whatever
means, fails instead.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Generator
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

REQUIRE_ALL = "LAZYRESTORE_REQUIRE_ALL"

# How long an example takes is a matter of how busy the machine is.
settings.register_profile("patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@cache
def lacking(need: str) -> str:
    """Why a need is not met, "" if it is. Raises KeyError for a feature that no probe is named for."""
    kind, _, name = need.partition(":")
    if kind == "program":
        return "" if shutil.which(name) else f"no {name} on PATH"
    if need == "root":
        return "" if os.geteuid() == 0 else "not root"
    from lazyrestore.kernel.features import Result, try_one

    feature = try_one(need)
    return "" if feature.result is Result.WORKS else f"{need}: {feature.detail}; {feature.advice}"


def pytest_configure(config: pytest.Config) -> None:
    # A shell without job control ignores it in what "&" starts, and that is inherited: no Ctrl-C of a test would work.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "requires(*needs): features by doctor's names, program:NAME, root")


def pytest_runtest_setup(item: pytest.Item) -> None:
    reasons = [lacking(need) for mark in item.iter_markers("requires") for need in mark.args]
    if any(reasons):
        pytest.skip("; ".join(filter(None, reasons)))


def fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """With REQUIRE_ALL, turn a skip (but no expected failure) into a failure that gives the same reason."""
    if os.environ.get(REQUIRE_ALL) and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason} ({REQUIRE_ALL} is set)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_if_skipped(report)
    return report
