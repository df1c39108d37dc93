"""Random calls of several threads in random interleavings, on a model of the kernel's side, and the pager's own window.

window_model.c compares the map with the truth whenever the window closes. What the kernel tells does not always decide
which history is true: how many of so many programs end with a wrong page stands here, measured, and must not grow.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "lazyrestore/_native"
PROGRAMS = 4000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "window_model"
    names = ("window", "apply", "callers", "history", "scene", "pieces", "interval_map")
    sources = [HERE / "window_model.c", *(NATIVE / "pager" / f"{name}.c" for name in names)]
    flags = ["-O1", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-pthread"]
    subprocess.run(["cc", *flags, "-iquote", NATIVE, *sources, "-o", path], check=True)
    return path


@pytest.mark.parametrize(
    ("threads", "calls", "blocks", "forks", "wrong"),
    [(1, 30, 5, 50, 0), (2, 3, 2, 0, 1), (3, 6, 3, 0, 3), (2, 3, 2, 100, 3), (3, 8, 4, 50, 4)],
)
def test_the_map_is_the_truth(model: Path, threads: int, calls: int, blocks: int, forks: int, wrong: int) -> None:
    arguments = map(str, (1, PROGRAMS, threads, calls, blocks, forks))
    done = subprocess.run([model, *arguments], check=False, capture_output=True, text=True)
    assert not done.stderr
    *what, last = done.stdout.splitlines()
    assert last.endswith(" failed")
    assert int(last.split()[0]) <= wrong, what
