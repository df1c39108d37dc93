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
from helpers_cli import MAIN
from hypothesis import given
from hypothesis import strategies as st

import lazyrestore
from lazyrestore.cli import COMMANDS, main
from lazyrestore.commands import default_store, plain, to_json
from lazyrestore.errors import NotAStore

# What plain words are told from others by.
WITHOUT_CLICK = (".commands", ".commands.plain", ".commands.words", ".errors")
# For people only, for writing only, or for one command only.
RICH = {"rich", "json", "shutil", "pathlib", "subprocess", "ctypes", "importlib.metadata", "logging", "asyncio"}
# For what click and msgspec can do and no command wants.
REPLACED = {
    "inspect",
    "ast",
    "dis",
    "gettext",
    "locale",
    "platform",
    "datetime",
    "selectors",
    "msgspec.inspect",
    "decimal",
    "numbers",
}
STORE = {"lmdb", "msgspec", "dataclasses", "lazyrestore.api", "lazyrestore.store"}
PROCESSES = {"lazyrestore._native", "lazyrestore.kernel", "lazyrestore.manifest", "lazyrestore.resources", "socket"}
WRITING = {"blake3", "zstandard", "concurrent.futures", "lazyrestore.snapshot", "lazyrestore.store.writer"}
RESOURCES = {  # what makes plans
    "lazyrestore.manifest",
    "lazyrestore.program",
    "lazyrestore.restore_program",
    "lazyrestore.resources.descriptors",
    "lazyrestore.resources.vma",
    "lazyrestore.kernel.tracee",
}
SURVEY = {"lazyrestore.kernel.fdinfo", "lazyrestore.kernel.unix_diag", "lazyrestore.kernel.features"}


def imports(*arguments: object) -> tuple[set[str], str]:
    """The modules that one run of the command line imports, and its standard output; it must succeed."""
    words = [sys.executable, "-X", "importtime", "-c", MAIN, *map(str, arguments)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)), done.stdout


def test_help_imports_click_and_nothing_of_its_own() -> None:
    modules, text = imports("--help")
    assert text.startswith("Usage:")
    own = {module for module in modules if module.startswith("lazyrestore")}
    assert own == {f"lazyrestore{name}" for name in ("", ".__main__", ".cli", ".stand_ins", *WITHOUT_CLICK)}
    assert not modules & (RICH | REPLACED | STORE | PROCESSES | WRITING)


def test_ls_knows_no_process(run: Path) -> None:
    lazyrestore.Store.open(run / "store").close()
    modules, text = imports("--store", run / "store", "ls")
    assert text.startswith("no snapshots in ")
    assert "lmdb" in modules
    assert not modules & (RICH | REPLACED | PROCESSES | WRITING | {"lazyrestore.api", "dataclasses", "click"})


@pytest.mark.parametrize("words", ["ls --json", "verify", "stats --json"])
def test_plain_commands_need_neither_click_nor_json(run: Path, words: str) -> None:
    lazyrestore.Store.open(run / "store").close()
    modules, _ = imports("--store", run / "store", *words.split())
    assert not modules & {"click", "json", "msgspec.json", "inspect", "lazyrestore.api"}


@pytest.mark.requires("root")
def test_restore_imports_nothing_of_the_snapshotter(run: Path, victims: Victims) -> None:
    victim = victims.start(["sleep", "1000"])
    victim.until(lambda: Path(f"/proc/{victim.pid}/comm").read_text() == "sleep\n", "the program")
    victim.quiet()
    with lazyrestore.Store.open(run / "store") as store:
        store.snapshot(victim.pid, name="x", kill=True).close()
    victim.gone()
    pid = victim.pid
    without_click = {"click", "msgspec.json", "re"} | RESOURCES
    for more, unwanted in (([], without_click), (["--pid", "same"], RESOURCES), (["--pid", "new"], set())):
        modules, text = imports("--store", run / "store", "restore", "x", "--detach", *more)
        assert text == f"{pid}\n" or more == ["--pid", "new"]
        os.kill(int(text), signal.SIGKILL)
        until(lambda: not alive(int(text)), "the end of the copy")  # noqa: B023
        assert not modules & (RICH | REPLACED | SURVEY | WRITING | unwanted | {"dataclasses", "hashlib"})


@pytest.mark.requires("root")
def test_snapshot_needs_neither_click_nor_dataclasses(run: Path, victims: Victims) -> None:
    victim = victims.start(["sleep", "1000"])
    victim.until(lambda: Path(f"/proc/{victim.pid}/comm").read_text() == "sleep\n", "the program")
    modules, text = imports("--store", run / "store", "snapshot", victim.pid, "--name", "x")
    assert text.startswith("x: ")
    assert "concurrent.futures._base" in modules
    assert not modules & {"click", "dataclasses", "inspect", "logging", "platform", "selectors"}


PLAIN = (
    "snapshot 42 --name x",
    "snapshot --name x 42 --kill --json",
    "--store S snapshot --replace 42 --name x",
    "restore x",
    "restore --detach x",
    "restore x --detach --json",
    "--store S restore --json x",
    "ls",
    "--store S ls --json",
    "show x",
    "show --json x",
    "rm x",
    "rm x y --json z",
    "verify",
    "verify --json",
    "--store S verify x",
    "stats",
    "stats --json",
)
NOT_PLAIN = (
    "",
    "restore",
    "restore x y",
    "restore --help",
    "restore x --pid new",
    "restore x -n 2",
    "restore --detach -- x",
    "restore x --store S",
    "--store= restore x",
    "--store --debug restore x",
    "--store S --store T restore x",
    "--debug restore x",
    "-h restore x",
    "ls x",
    "ls --detach",
    "show",
    "show x y",
    "rm",
    "rm --json",
    "rm x -y",
    "verify x y",
    "stats 42",
    "doctor",
    "completion bash",
    "snapshot restore x",
    "snapshot 42",
    "snapshot x --name x",
    "snapshot 0 --name x",
    "snapshot --name 42",
    "snapshot 42 --name",
    "snapshot 42 x",
    "snapshot 42 --name --kill x",
    "snapshot 42 --name x --name y",
    "snapshot 42 --name x --level 3",
    "snapshot 42 --name=x",
    "restore x --det",
    "restore -x",
)


@pytest.mark.parametrize("words", PLAIN)
@pytest.mark.parametrize("store", [None, "", "/of/the/environment"])
def test_plain_words_are_read_as_click_reads_them(
    words: str, store: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAZYRESTORE_STORE", raising=False)
    if store is not None:
        monkeypatch.setenv("LAZYRESTORE_STORE", store)
    read = plain.read(words.split())
    assert read is not None
    with main.make_context("lazyrestore", words.split()) as outer:
        outer.obj = outer.params["store"] or default_store()
        name, command, rest = main.resolve_command(outer, [*outer._protected_args, *outer.args])
        assert command is not None
        with command.make_context(name, rest, parent=outer) as inner:
            chosen = {key: value for key, value in inner.params.items() if value}
            assert (read.command, read.store) == (name, inner.obj)
            named = chosen.pop("name", None)
            process = chosen.pop("pid", None)
            assert read.names == chosen.pop("names", tuple(str(each) for each in (process, named) if each))
            flags = {f"--{flag}": chosen.pop(flag, False) for flag in ("detach", "kill", "replace")}
            flags["--json"] = chosen.pop("json_output", False)
            assert read.flags == {flag for flag, is_given in flags.items() if is_given}
            assert chosen in ({}, {"net": "same", "fill": "none"}, {"level": 1})  # what they are by default


@pytest.mark.parametrize("words", NOT_PLAIN)
def test_other_words_are_clicks(words: str) -> None:
    assert plain.read(words.split()) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
)


@given(JSON)
def test_json_is_that_of_the_json_module(value: object) -> None:
    assert to_json(value) == json.dumps(value)


def test_completion_is_clicks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_LAZYRESTORE_COMPLETE", "bash_complete")
    assert plain.read(["restore", "x"]) is None


@pytest.mark.parametrize("words", ["restore x", "restore x --detach --json", "ls", "show x", "rm x y", "verify x"])
def test_errors_of_plain_words_are_clicks(run: Path, words: str) -> None:
    """The same line and status, with or without click."""
    found = []
    for store in (["--store", str(run / "none")], [f"--store={run / 'none'}"]):
        assert (plain.read([*store, *words.split()]) is None) == (len(store) == 1)
        command = [sys.executable, "-c", MAIN, *store, *words.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found.append((done.returncode, done.stdout, done.stderr))
    assert found[0] == found[1]
    assert found[0][0] == NotAStore.exit_status


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_the_same_with_stand_ins(command: list[str]) -> None:
    without = "from lazyrestore.cli import main; main(prog_name='lazyrestore')"
    ours, clicks = (
        subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, check=True).stdout
        for code in (f"import sys; sys.argv[0] = 'lazyrestore'; {MAIN}", without)
    )
    assert ours == clicks


def test_stand_ins_are_gone_afterwards_and_pass_on_what_they_lack() -> None:
    """In a process of its own, because they take no place that is taken."""
    code = """
import sys
from lazyrestore.stand_ins import StandIn, bring
assert not {"inspect", "gettext", "platform", "datetime", "typing_extensions", "re", "logging"} & set(sys.modules)
for library in ("msgspec", "concurrent.futures.thread", "click"):
    bring(library)
    assert not [name for name, module in sys.modules.items() if module is None or isinstance(module, StandIn)]
import click.core, inspect, datetime, logging, msgspec, re, typing
from concurrent.futures import _base
assert not isinstance(_base.LOGGER, logging.Logger) and _base.LOGGER.isEnabledFor(logging.CRITICAL)
try:
    msgspec.convert("b", typing.Annotated[str, msgspec.Meta(pattern="^a$")])
except msgspec.ValidationError as error:
    assert "regex" in str(error)
assert re.match("a+", "aab")[0] == "aa"
assert isinstance(click.core.inspect, StandIn) and isinstance(msgspec.json, StandIn)
assert click.core.inspect.signature is inspect.signature
assert datetime.datetime is sys.modules["_datetime"].datetime
assert msgspec.json.encode({"when": datetime.date(2026, 11, 23)}) == b'{"when":"2026-11-23"}'
assert typing.ForwardRef("int").__forward_arg__ == "int"
class Linked(msgspec.Struct):
    next: "Linked | None"
assert msgspec.json.decode(b'{"next": {"next": null}}', type=Linked) == Linked(Linked(None))
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
    without = f"{code} LazyGroup.make_context = click.Group.make_context; main(prog_name='lazyrestore')"
    ours, clicks = (
        subprocess.run([sys.executable, "-c", program, "--help"], env=environment, capture_output=True, check=True)
        for program in (f"{code} main(prog_name='lazyrestore')", without)
    )
    assert ours.stdout == clicks.stdout


def test_the_end_keeps_output_and_status(run: Path) -> None:
    """The process ends without taking the interpreter apart: nothing is lost in a pipe, and every status arrives."""

    def status(*arguments: object) -> tuple[int, str]:
        words = [sys.executable, "-c", MAIN, *map(str, arguments)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert status("--store", run / "missing", "ls")[0] == NotAStore.exit_status
    assert status("bogus")[0] == 2
    lazyrestore.Store.open(run / "store").close()
    code, text = status("--store", run / "store", "ls", "--json")
    assert (code, json.loads(text)) == (0, [])
    with open("/dev/full", "w") as sink:
        words = [sys.executable, "-c", MAIN, "--store", str(run / "store"), "ls"]
        full = subprocess.run(words, stdout=sink, stderr=subprocess.PIPE, check=False)
    assert full.returncode != 0
    assert full.stderr


WRITTEN = [["--help"], ["--version"], ["ls", "--help"], ["doctor", "--help"], ["completion", "bash"]]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", WRITTEN)
def test_output_that_cannot_be_written_is_one_line(words: list[str], unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as sink:
        command = [sys.executable, "-c", MAIN, *words]
        done = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr == "lazyrestore: standard output: write: No space left on device; send it to another file\n"


def test_a_closed_standard_output_is_no_error(run: Path) -> None:
    lazyrestore.Store.open(run / "store").close()
    command = f"exec {sys.executable} -c '{MAIN}' --store {run / 'store'} ls >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_before_there_is_a_command_is_one_line() -> None:
    interrupting = (
        "import sys\nclass Finder:\n def find_spec(self, name, *_):\n"
        "  if name == 'lazyrestore.cli': raise KeyboardInterrupt\nsys.meta_path.insert(0, Finder())\n"
    )
    done = subprocess.run([sys.executable, "-c", interrupting + MAIN], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "lazyrestore: interrupted\n")
