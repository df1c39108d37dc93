"""Completion on the command line, as bash calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Victims
from helpers_cli import MAIN

import lazyrestore

# `compopt` works only while bash completes; what it is asked for is the answer then.
SCRIPT = """
compopt() { printf 'compopt %s %s\\n' "$@"; }
source <(lazyrestore completion bash)
complete -p lazyrestore
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
_lazyrestore_completion lazyrestore "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def path(run: Path) -> str:
    """With a `lazyrestore` of this test run's interpreter."""
    script = run / "bin" / "lazyrestore"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\n{MAIN}\n")
    script.chmod(0o755)
    return f"{script.parent}:{os.environ['PATH']}"


def completed(path: str, *words: object) -> list[str]:
    """What bash offers for the last of the words behind `lazyrestore`."""
    environment = {**os.environ, "PATH": path}
    script = ["bash", "--norc", "-c", SCRIPT, "-", "lazyrestore", *map(str, words)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    first, *rest = done.stdout.splitlines()
    assert first == "complete -o nosort -F _lazyrestore_completion lazyrestore"
    return rest


def test_commands_options_and_choices(path: str) -> None:
    assert completed(path, "re") == ["restore", "record"]
    assert completed(path, "restore", "x", "--de") == ["--detach", "--debug"]
    assert completed(path, "restore", "x", "--pid", "") == ["same", "new"]
    assert completed(path, "completion", "") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("words", [["--store", "/"], ["ls", "--store", "/"]])
def test_a_store_is_a_folder(path: str, words: list[str]) -> None:
    assert completed(path, *words) == ["compopt -o dirnames", ""]


@pytest.mark.requires("root")
def test_names_of_snapshots(run: Path, path: str, victims: Victims) -> None:
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    with lazyrestore.Store.open(run / "store") as store:
        for name in ("warm", "worker"):
            store.snapshot(victim.pid, name=name).close()
    for words in (["show"], ["restore"], ["record"], ["verify"], ["rm"], ["rm", "warm"]):
        assert completed(path, "--store", run / "store", *words, "w") == ["warm", "worker"]
    assert completed(path, "show", "--store", run / "store", "wo") == ["worker"]
    assert completed(path, "--store", run / "none", "show", "") == [""]
