"""What a process that runs the command line imports, and how it ends. Times are the benchmark's business."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Victims, alive, until

import lazyrestore
from lazyrestore.cli import COMMANDS
from lazyrestore.errors import NotAStore

ENTRY = "from lazyrestore.__main__ import entry; entry()"  # what the console script does
# For people only, for writing only, or for one command only.
RICH = {"rich", "json", "shutil", "pathlib", "subprocess", "ctypes", "importlib.metadata", "logging", "asyncio"}
# For what click and msgspec can do and no command wants.
REPLACED = {"inspect", "ast", "dis", "gettext", "locale", "platform", "datetime", "selectors", "msgspec.inspect"}
STORE = {"lmdb", "msgspec", "dataclasses", "lazyrestore.api", "lazyrestore.store"}
PROCESSES = {"lazyrestore._native", "lazyrestore.kernel", "lazyrestore.manifest", "lazyrestore.resources", "socket"}
WRITING = {"blake3", "zstandard", "concurrent.futures", "lazyrestore.snapshot", "lazyrestore.store.writer"}
SURVEY = {"lazyrestore.kernel.fdinfo", "lazyrestore.kernel.unix_diag", "lazyrestore.kernel.features"}


def imports(*arguments: object) -> tuple[set[str], str]:
    """The modules that one run of the command line imports, and its standard output; it must succeed."""
    words = [sys.executable, "-X", "importtime", "-c", ENTRY, *map(str, arguments)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)), done.stdout


def test_help_imports_click_and_nothing_of_its_own() -> None:
    modules, text = imports("--help")
    assert text.startswith("Usage:")
    own = {module for module in modules if module.startswith("lazyrestore")}
    assert own == {"lazyrestore", "lazyrestore.__main__", "lazyrestore.cli", "lazyrestore.stand_ins"}
    assert not modules & (RICH | REPLACED | STORE | PROCESSES | WRITING)


def test_ls_knows_no_process(run: Path) -> None:
    lazyrestore.Store.open(run / "store").close()
    modules, text = imports("--store", run / "store", "ls")
    assert text.startswith("no snapshots in ")
    assert "lmdb" in modules
    assert not modules & (RICH | REPLACED | PROCESSES | WRITING | {"lazyrestore.api", "dataclasses"})


@pytest.mark.requires("root")
def test_restore_imports_nothing_of_the_snapshotter(run: Path, victims: Victims) -> None:
    victim = victims.start(["sleep", "1000"])
    victim.until(lambda: Path(f"/proc/{victim.pid}/comm").read_text() == "sleep\n", "the program")
    victim.quiet()
    with lazyrestore.Store.open(run / "store") as store:
        store.snapshot(victim.pid, name="x", kill=True).close()
    victim.gone()
    modules, text = imports("--store", run / "store", "restore", "x", "--detach", "--pid", "same")
    pid = victim.pid
    assert text == f"{pid}\n"
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "the end of the copy")
    assert not modules & (RICH | REPLACED | SURVEY | WRITING | {"dataclasses", "hashlib"})


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_the_same_with_stand_ins(command: list[str]) -> None:
    plain = "from lazyrestore.cli import main; main(prog_name='lazyrestore')"
    ours, clicks = (
        subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, check=True).stdout
        for code in (f"import sys; sys.argv[0] = 'lazyrestore'; {ENTRY}", plain)
    )
    assert ours == clicks


def test_stand_ins_are_gone_afterwards_and_pass_on_what_they_lack() -> None:
    """In a process of its own, because they take no place that is taken."""
    code = """
import sys
from lazyrestore.stand_ins import StandIn, bring
assert not {"inspect", "gettext", "platform", "datetime", "typing_extensions"} & set(sys.modules)
for library in ("click", "msgspec"):
    bring(library)
    assert not [name for name, module in sys.modules.items() if module is None or isinstance(module, StandIn)]
import click.core, inspect, datetime, msgspec
assert isinstance(click.core.inspect, StandIn) and isinstance(msgspec.json, StandIn)
assert click.core.inspect.signature is inspect.signature
assert datetime.datetime is sys.modules["_datetime"].datetime
assert msgspec.json.encode({"when": datetime.date(2026, 11, 23)}) == b'{"when":"2026-11-23"}'
assert click.DateTime(["%Y"]).convert("2026", None, None) == datetime.datetime(2026, 1, 1)
text = "  a\\n\\n    b\\tc\\n      d\\n \\n"
assert click.core.inspect.cleandoc(text) == inspect.cleandoc(text), click.core.inspect.cleandoc(text)
assert bring("enum") is None  # was there already
try:
    bring("no_such_library")
except ModuleNotFoundError as error:
    assert error.name == "no_such_library"
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("columns", ["30", "66", "200", "wide", ""])
def test_help_is_as_wide_as_click_has_it(columns: str) -> None:
    environment = {**os.environ, "COLUMNS": columns}
    code = "import click; from lazyrestore.cli import LazyGroup, main; "
    plain = f"{code} LazyGroup.make_context = click.Group.make_context; main(prog_name='lazyrestore')"
    ours, clicks = (
        subprocess.run([sys.executable, "-c", program, "--help"], env=environment, capture_output=True, check=True)
        for program in (f"{code} main(prog_name='lazyrestore')", plain)
    )
    assert ours.stdout == clicks.stdout


def test_the_end_keeps_output_and_status(run: Path) -> None:
    """The process ends without taking the interpreter apart: nothing is lost in a pipe, and every status arrives."""

    def status(*arguments: object) -> tuple[int, str]:
        words = [sys.executable, "-c", ENTRY, *map(str, arguments)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert status("--store", run / "missing", "ls")[0] == NotAStore.exit_status
    assert status("bogus")[0] == 2
    lazyrestore.Store.open(run / "store").close()
    code, text = status("--store", run / "store", "ls", "--json")
    assert (code, json.loads(text)) == (0, [])
    with open("/dev/full", "w") as sink:
        words = [sys.executable, "-c", ENTRY, "--store", str(run / "store"), "ls"]
        full = subprocess.run(words, stdout=sink, stderr=subprocess.PIPE, check=False)
    assert full.returncode != 0
    assert full.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["ls", "--help"], ["completion", "bash"]])
def test_output_that_cannot_be_written_is_one_line(words: list[str], unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as sink:
        command = [sys.executable, "-c", ENTRY, *words]
        done = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"lazyrestore: .*No space left on device\n", done.stderr)


def test_a_closed_standard_output_is_no_error(run: Path) -> None:
    lazyrestore.Store.open(run / "store").close()
    command = f"exec {sys.executable} -c '{ENTRY}' --store {run / 'store'} ls >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_before_there_is_a_command_is_one_line() -> None:
    interrupting = (
        "import sys\nclass Finder:\n def find_spec(self, name, *_):\n"
        "  if name == 'lazyrestore.cli': raise KeyboardInterrupt\nsys.meta_path.insert(0, Finder())\n"
    )
    done = subprocess.run([sys.executable, "-c", interrupting + ENTRY], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "lazyrestore: interrupted\n")
