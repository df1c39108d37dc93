"""The doctor command: what it prints, and the exit status that follows from it."""

from __future__ import annotations

import json
import platform

import pytest
from click.testing import CliRunner

from lazyrestore.cli import doctor
from lazyrestore.errors import MissingFeature
from lazyrestore.kernel.features import Feature, Result, try_all


def feature(name: str, needed: bool, result: Result, detail: str = "") -> Feature:
    return Feature(name, f"use of {name}", needed, "tried", result, detail, f"loss of {name}", f"advice for {name}")


FINE = feature("fine", True, Result.WORKS, "7 bytes")
WISHED = feature("wished", False, Result.MISSING, "ioctl: Inappropriate ioctl for device")
ABSENT = feature("absent", False, Result.UNTRIED, "none free")
LACKING = feature("lacking", True, Result.MISSING, "clone3: Operation not permitted")


def run(monkeypatch: pytest.MonkeyPatch, found: list[Feature], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "try_all", lambda: found)
    result = CliRunner().invoke(doctor.doctor_command, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_all_that_is_needed_works(monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = run(monkeypatch, [FINE, WISHED, ABSENT])
    assert status == 0
    assert "use of fine (7 bytes)" in output
    assert "snapshot and restore will work" in output
    assert "loss of fine" not in output
    for name in ("wished", "absent"):
        assert f"loss of {name}" in output
        assert f"advice for {name}" in output


def test_something_needed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = run(monkeypatch, [FINE, LACKING, WISHED])
    assert status == MissingFeature.exit_status
    assert "clone3: Operation not permitted" in output
    assert "loss of lacking" in output
    assert "snapshot and restore will not work: lacking" in output


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = run(monkeypatch, [FINE, LACKING], "--json")
    report = json.loads(output)
    assert status == MissingFeature.exit_status
    assert (report["ok"], report["kernel"]) == (False, platform.release())
    assert report["features"][1] == {
        "name": "lacking",
        "purpose": "use of lacking",
        "needed": True,
        "how": "tried",
        "result": "missing",
        "detail": "clone3: Operation not permitted",
        "without": "loss of lacking",
        "advice": "advice for lacking",
    }


def test_this_machine() -> None:
    result = CliRunner().invoke(doctor.doctor_command, ["--json"])
    report = json.loads(result.output)
    assert report["ok"] is all(entry["result"] == "works" for entry in report["features"] if entry["needed"])
    assert result.exit_code == (0 if report["ok"] else MissingFeature.exit_status)
    assert [entry["name"] for entry in report["features"]] == [tried.name for tried in try_all()]
