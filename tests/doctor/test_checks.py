"""The project's own machinery: skips that become failures, and the check of import directions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK_IMPORTS = ROOT / "tools" / "check_imports.py"

SUITE = """
import pytest

@pytest.mark.requires("program:no-such-program")
def test_needs_a_program(): pass

@pytest.mark.requires("program:sh")
def test_has_its_program(): pass

@pytest.mark.skip(reason="by other means")
def test_skipped(): pass

@pytest.mark.xfail(reason="known")
def test_expected_failure(): assert False
"""


def outcome(folder: Path, **environment: str) -> tuple[int, str]:
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -ra --strict-markers\n")
    inherited = {name: value for name, value in os.environ.items() if name != "LAZYRESTORE_REQUIRE_ALL"}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", folder],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stdout


def test_what_the_machine_lacks_is_skipped_with_the_reason(tmp_path: Path) -> None:
    status, output = outcome(tmp_path)
    assert status == 0
    assert "1 passed, 2 skipped, 1 xfailed" in output
    assert "no no-such-program on PATH" in output


def test_one_variable_turns_every_skip_into_a_failure(tmp_path: Path) -> None:
    status, output = outcome(tmp_path, LAZYRESTORE_REQUIRE_ALL="1")
    assert status == 1
    assert "1 passed, 1 xfailed, 2 errors" in output
    assert "no no-such-program on PATH (LAZYRESTORE_REQUIRE_ALL is set)" in output


def imports(folder: Path, **files: str) -> tuple[int, str]:
    for name, text in files.items():
        path = folder / name.replace("__in__", "/")
        path = path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    ran = subprocess.run([sys.executable, CHECK_IMPORTS, folder], capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("store__in__reader", "from lazyrestore.kernel import procfs\n", "store may not import kernel"),
        ("store__in__reader", "import os\n\ndef f():\n    from ..snapshot import x\n", "store may not import snapshot"),
        ("kernel__in__ptrace", "import lazyrestore.resources.vma\n", "kernel may not import resources"),
        ("kernel__in__ptrace", "from lazyrestore import Store\n", "kernel may not import __init__"),
        ("snapshot", "from lazyrestore import restore\n", "snapshot may not import restore"),
        ("elsewhere", "import os\n", "elsewhere has no place in the architecture"),
    ],
)
def test_imports_against_the_direction(tmp_path: Path, file: str, text: str, problem: str) -> None:
    status, output = imports(tmp_path, **{file: text, "errors": ""})
    assert status == 1
    assert problem in output


def test_imports_in_the_direction(tmp_path: Path) -> None:
    status, output = imports(
        tmp_path,
        snapshot="from lazyrestore import errors\nfrom lazyrestore.store import A\nfrom .kernel import procfs\n",
        kernel__in__procfs="from lazyrestore._native import _core\nfrom . import other\n",
        errors="import os\n",
    )
    assert (status, output.strip()) == (0, "")
