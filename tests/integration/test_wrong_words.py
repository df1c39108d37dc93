"""Words that cannot be understood, and output that cannot be written: one line, and an exit status."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers import Victims
from helpers_cli import MAIN, command, run_cli
from helpers_copies import Copies
from helpers_fleet import reporter

import lazyrestore
from lazyrestore import errors
from lazyrestore.cli import COMMANDS

NAMED = f"import sys; sys.argv[0] = 'lazyrestore'; {MAIN}"  # as in the shell, for what the help is called by
LOST = "lazyrestore: standard output: write: No space left on device; {}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["bogus"], "no such command 'bogus'; see `lazyrestore --help`"),
        (["restor", "x"], "no such command 'restor'; did you mean 'restore'? see `lazyrestore --help`"),
        ([""], "no such command ''; see `lazyrestore --help`"),
        (["a\nb"], r"no such command 'a\nb'; see `lazyrestore --help`"),
        ([b"\xff"], r"no such command '\udcff'; see `lazyrestore --help`"),
        (["--store", "/tmp"], "missing command; see `lazyrestore --help`"),
        (["--store"], "option '--store' requires an argument; see `lazyrestore --help`"),
        (["show"], "show: missing argument 'NAME'; see `lazyrestore show --help`"),
        (["snapshot", "1"], "snapshot: missing option '--name'; see `lazyrestore snapshot --help`"),
        (
            ["completion"],
            "completion: missing argument 'SHELL': one of bash, zsh, fish; see `lazyrestore completion --help`",
        ),
        (["ls", "a\nb"], r"ls: got unexpected extra argument (a\x0ab); see `lazyrestore ls --help`"),
        (
            ["ls", "--jso"],
            "ls: no such option '--jso'; did you mean one of: '--json', '--store'? see `lazyrestore ls --help`",
        ),
        (["restore", "x", "-n"], "restore: option '-n' requires an argument; see `lazyrestore restore --help`"),
        (
            ["restore", "x", "--pid", "old"],
            "restore: invalid value for '--pid': 'old' is not one of 'same', 'new'; see `lazyrestore restore --help`",
        ),
        (
            ["record", "x", "--for", "1", "--until-ready"],
            "record: --until-port, --until-ready and --for exclude each other; see `lazyrestore record --help`",
        ),
    ],
    ids=str,
)
def test_wrong_words_are_one_line(words: list[str | bytes], line: str) -> None:
    done = run_cli(None, *(os.fsdecode(word) for word in words), code=NAMED)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"lazyrestore: {line}\n")


def test_no_words_at_all_are_answered_with_help() -> None:
    done = run_cli(None)
    assert (done.returncode, done.stdout) == (2, "")
    assert all(f"\n  {name} " in done.stderr for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "status"), [([], 2), (["show"], 2), (["show", "x"], errors.SnapshotNotFound.exit_status)], ids=str
)
def test_the_exit_status_is_there_if_the_line_cannot_be(run: Path, words: list[str], status: int) -> None:
    lazyrestore.Store.open(run / "store").close()
    with open("/dev/full", "w") as sink:
        done = subprocess.run(command(run / "store" if words else None, *words), stderr=sink, check=False)
    assert done.returncode == status


def test_completion_that_cannot_be_written_is_one_line() -> None:
    asked = {"_LAZYRESTORE_COMPLETE": "bash_complete", "COMP_WORDS": "lazyrestore re", "COMP_CWORD": "1"}
    with open("/dev/full", "w") as sink:
        done = subprocess.run(
            command(None, code=NAMED),
            stdout=sink,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **asked},
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "lazyrestore: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("words", [["ls"], ["show", "x"], ["snapshot", "1", "--name", "x"]], ids=str)
def test_a_store_in_a_directory_that_was_removed(run: Path, words: list[str]) -> None:
    gone = str(run / "gone")
    removed = f"import os; os.mkdir({gone!r}); os.chdir({gone!r}); os.rmdir({gone!r})"
    done = run_cli("here", *words, code=f"{removed}\n{MAIN}")
    advice = "go to another one, or name the store from / on"
    line = f"lazyrestore: store here: open: the working directory was removed; {advice}\n"
    assert (done.returncode, done.stdout, done.stderr) == (errors.NotAStore.exit_status, "", line)


def test_a_store_with_odd_letters_is_one_line(run: Path) -> None:
    odd = run / "a\nb\x1b[31m"
    lazyrestore.Store.open(odd).close()
    assert run_cli(odd, "ls").stdout == f"no snapshots in {run}/a\\x0ab\\x1b[31m\n"
    assert run_cli(odd, "show", "x").stderr.count("\n") == 1


@pytest.mark.requires("root")
@pytest.mark.parametrize("more", [[], ["--json"]])
@pytest.mark.parametrize("closed", [False, True])
def test_rm_removes_all_though_it_cannot_say_so(
    run: Path, victims: Victims, copies: Copies, more: list[str], closed: bool
) -> None:
    """As rm(1) -v does; then it says what was lost, unless nobody reads it."""
    victim = reporter(run, victims)
    for name in ("a", "b"):
        copies.snapshot(victim.pid, name)
    words = command(run / "store", "rm", "a", "b", *more)
    reader, writer = os.pipe() if closed else (-1, os.open("/dev/full", os.O_WRONLY))
    if closed:
        os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "" if closed else LOST.format("2 snapshots removed"))
    assert not copies.store.names()
