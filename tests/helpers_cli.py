"""Run the command line under this test run's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

MAIN = "from lazyrestore.__main__ import entry; entry()"  # what the console script does
# For a run as somebody else: the interpreter itself may live where only root may read, so everything is imported first.
AS_NOBODY = """
import importlib, json, os, pkgutil, encodings.idna
import lazyrestore, lmdb, zstandard, blake3, msgspec, click
for module in pkgutil.walk_packages(lazyrestore.__path__, "lazyrestore."):
    importlib.import_module(module.name)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
from lazyrestore.__main__ import entry
entry()
"""


def command(store: str | os.PathLike[str] | None, *arguments: object, code: str = MAIN) -> list[str]:
    """The words that run `lazyrestore --store STORE ARGUMENTS`; None: without --store."""
    named = () if store is None else ("--store", os.fspath(store))
    return [sys.executable, "-c", code, *named, *map(str, arguments)]


def run_cli(
    store: str | os.PathLike[str] | None, *arguments: object, code: str = MAIN, pass_fds: Sequence[int] = ()
) -> subprocess.CompletedProcess[str]:
    """Run to the end; output captured."""
    return subprocess.run(
        command(store, *arguments, code=code),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        pass_fds=pass_fds,
    )
