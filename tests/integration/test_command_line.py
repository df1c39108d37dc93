"""What the command line tells a person, and a script that reads its output."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import Victims, alive, until
from helpers_cli import MAIN, command, run_cli
from helpers_copies import Copies
from helpers_fleet import reporter

import lazyrestore
from lazyrestore import errors
from lazyrestore.kernel import capabilities

# As root with the capabilities of an ordinary container, in which there are processes that have all.
WITHOUT_CAPABILITIES = """
import ctypes, re, struct
held = int(re.search(r"CapPrm:\\s*(\\w+)", open("/proc/self/status").read())[1], 16)
kept = held & ~(1 << 0 | 1 << 19 | 1 << 21)  # CHOWN, SYS_PTRACE, SYS_ADMIN; <linux/capability.h>
low, high = kept & 0xffffffff, kept >> 32
header, data = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", low, low, 0, high, high, 0)
assert ctypes.CDLL(None).syscall(126, header, data) == 0  # capset
from lazyrestore.__main__ import entry; entry()
"""

IN_A_USER_NAMESPACE = """
import ctypes
assert ctypes.CDLL(None).unshare(0x10000000) == 0  # CLONE_NEWUSER
open("/proc/self/uid_map", "w").write("0 0 1")
from lazyrestore.__main__ import entry; entry()
"""


@pytest.fixture
def pid(victims: Victims, copies: Copies) -> int:
    """The process id of the snapshot "x"; it is free."""
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    return victim.pid


# Ctrl-C when the function that is named has done its work, in the writer or its environment.
INTERRUPTED_AFTER = """
import os, signal
from lazyrestore.store import environment, writer
owner = environment.Environment if {name!r} in ("update", "sync") else writer.ImageWriter
whole = getattr(owner, {name!r})
def interrupted(*arguments, **more):
    result = whole(*arguments, **more)
    os.kill(os.getpid(), signal.SIGINT)
    return result
setattr(owner, {name!r}, interrupted)
from lazyrestore.__main__ import entry; entry()
"""


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize(("name", "is_stored"), [("_sorted", False), ("sync", True), ("_finish", True)])
def test_ctrl_c_near_the_commit(run: Path, victims: Victims, name: str, is_stored: bool, kill: bool) -> None:
    """The snapshot is stored and that is said, and the process ended if it was to be, or none of it."""
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    words = ["snapshot", victim.pid, "--name", "x", *(["--kill"] if kill else [])]
    answer = run_cli(run / "store", *words, code=INTERRUPTED_AFTER.format(name=name))
    with lazyrestore.Store.open(run / "store") as store:
        assert store.names() == (["x"] if is_stored else [])
    if is_stored:
        assert (answer.returncode, answer.stderr) == (0, "")
        assert answer.stdout.startswith("x: ")
    else:
        assert (answer.returncode, answer.stdout, answer.stderr) == (130, "", "lazyrestore: interrupted\n")
    assert alive(victim.pid) != (kill and is_stored)


@pytest.mark.parametrize("kib", [0, 100, 100_000])
def test_limit_on_file_sizes_is_one_line_with_advice(run: Path, victims: Victims, pid: int, kib: int) -> None:
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    for words in (["snapshot", str(victim.pid), "--name", "y"], ["restore", "x", "--detach"]):
        limited = ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "-", *command(run / "store", *words)]
        answer = subprocess.run(limited, capture_output=True, text=True, check=False)
        if kib == 100_000 and answer.returncode == 0:
            if words[0] == "restore":  # the pager may raise limits
                end(int(answer.stdout))
            continue
        assert answer.returncode in {"snapshot": [24], "restore": [1, 35]}[words[0]], answer.stderr
        assert re.fullmatch(r"lazyrestore: .*ulimit -f unlimited.*\n", answer.stderr)


NO_MEMORY = f"""
from lazyrestore.store.compressor import Compressor
def compress(*_):
    raise MemoryError
Compressor.compress = compress
{MAIN}
"""


def test_no_memory_is_one_line_with_advice(run: Path, victims: Victims) -> None:
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    answer = run_cli(run / "store", "snapshot", victim.pid, "--name", "x", "--kill", code=NO_MEMORY)
    assert answer.returncode == lazyrestore.errors.OutOfMemory.exit_status
    assert re.fullmatch(r"lazyrestore: .*memory.*ulimit -v unlimited\n", answer.stderr), answer.stderr
    assert alive(victim.pid)


@pytest.mark.parametrize(
    "words", [["--debug", "show", "nope"], ["show", "nope", "--debug"], ["show", "--debug", "nope"]]
)
def test_debug_before_or_after_the_command(run: Path, words: list[str]) -> None:
    lazyrestore.Store.open(run / "store").close()
    answer = run_cli(run / "store", *words)
    assert answer.returncode == errors.SnapshotNotFound.exit_status
    assert answer.stderr.startswith("Traceback") and answer.stderr.endswith("shows what there is\n")


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "the end of the copy")


def test_detach_prints_the_bare_process_id_to_a_script(run: Path, pid: int) -> None:
    answer = run_cli(run / "store", "restore", "x", "--detach")
    end(pid)
    assert answer.stdout == f"{pid}\n"


def test_detach_prints_a_sentence_to_a_terminal(run: Path, pid: int) -> None:
    ours, theirs = pty.openpty()
    subprocess.run(
        command(run / "store", "restore", "x", "--detach"), stdin=subprocess.DEVNULL, stdout=theirs, check=True
    )
    text = os.read(ours, 1000).decode()
    end(pid)
    os.close(ours)
    os.close(theirs)
    assert text.startswith(f"x: process {pid}, restored in ")


def test_rm_is_all_or_nothing(run: Path, store: lazyrestore.Store, victims: Victims, copies: Copies) -> None:
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    for name in "ab":
        copies.snapshot(victim.pid, name).close()
    for names, kind in ((["a", "c"], errors.SnapshotNotFound), (["a", "no name"], errors.BadSnapshotName)):
        answer = run_cli(run / "store", "rm", *names)
        assert (answer.returncode, answer.stdout) == (kind.exit_status, "")
        assert names[1] in answer.stderr
        assert store.names() == ["a", "b"]
    answer = run_cli(run / "store", "rm", "a", "b", "a")
    assert answer.returncode == 0, answer.stderr
    assert [line.partition(":")[0] for line in answer.stdout.splitlines()] == ["a", "b"]
    assert store.names() == []


def test_stats_show_processes_of_removed_snapshots(run: Path, pid: int) -> None:
    run_cli(run / "store", "restore", "x", "--detach")
    try:
        assert run_cli(run / "store", "rm", "x").returncode == 0
        plain = run_cli(run / "store", "stats")
        fields = json.loads(run_cli(run / "store", "stats", "--json").stdout)
        lazyrestore.Store.open(run / "other").close()
        other = run_cli(run / "other", "stats")
    finally:
        end(pid)
    head, _, row = plain.stdout.splitlines()[:3]
    assert head.startswith("(removed): ")
    assert row.split()[0] == str(pid)
    assert [(each["snapshot"], each["processes"][0]["pid"]) for each in fields] == [("(removed)", pid)]
    first, hint = other.stdout.splitlines()
    assert first == "no restored process of this store runs"
    assert "of other stores" in hint


def test_the_name_is_looked_at_before_what_the_process_holds(
    run: Path, store: lazyrestore.Store, victims: Victims, copies: Copies, pid: int
) -> None:
    victim = victims.python("unsupported.py", run / "control", "inotify", cwd=run)
    victim.listens(run / "control")
    for name, kind in (("no name", errors.BadSnapshotName), ("x", errors.SnapshotExists)):
        with pytest.raises(kind):
            store.snapshot(victim.pid, name=name)
    with pytest.raises(errors.UnsupportedResources):
        store.snapshot(victim.pid, name="x", replace=True)


def test_the_capabilities_that_are_missing(run: Path, victims: Victims) -> None:
    victim = victims.start(["sleep", "1000000"])
    answer = run_cli(run / "store", "snapshot", victim.pid, "--name", "x", code=WITHOUT_CAPABILITIES)
    assert answer.returncode == errors.NotPermitted.exit_status, answer.stderr
    assert "lack: CAP_CHOWN, CAP_SYS_PTRACE, CAP_SYS_ADMIN; run with CAP_SYS_PTRACE" in answer.stderr


def test_a_process_of_an_outer_user_namespace(run: Path, victims: Victims) -> None:
    """Root, with all capabilities, but not there."""
    victim = victims.start(["sleep", "1000000"])
    answer = run_cli(run / "store", "snapshot", victim.pid, "--name", "x", code=IN_A_USER_NAMESPACE)
    assert answer.returncode == errors.NotPermitted.exit_status, answer.stderr
    assert "a user namespace guards it, in spite of your CAP_SYS_PTRACE" in answer.stderr


def test_names_of_capabilities_are_the_kernels() -> None:
    header = Path("/usr/include/linux/capability.h")
    if not header.exists():
        pytest.skip("no kernel headers")
    found = re.findall(r"^#define (CAP_[A-Z_]+)\s+(\d+)$", header.read_text(), re.MULTILINE)
    for name, number in found:
        assert capabilities.names(1 << int(number)) == [name]
    assert len(found) > 37


def test_the_store_may_be_named_behind_the_command(run: Path, pid: int) -> None:
    for command_line in (
        ["ls", "--json", "--store", run / "store"],
        ["show", "x", f"--store={run / 'store'}", "--json"],
    ):
        answer = run_cli(run / "elsewhere", *command_line)
        assert answer.returncode == 0, answer.stderr
        assert '"x"' in answer.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["snapshot", "redis", "--name", "x"], "'redis' is not a process id; `pidof redis`"),
        (["snapshot", "0", "--name", "x"], "'0' is not a process id"),
        (["snapshot", "99999999999999", "--name", "x"], "is not a process id"),
        (["snapshot", "-1", "--name", "x"], "no such option"),
        (["stats", "redis"], "'redis' is not a process id; `lazyrestore stats` shows all"),
    ],
)
def test_a_word_that_is_no_process_id(run: Path, words: list[str], said: str) -> None:
    answer = run_cli(run / "store", *words)
    assert answer.returncode == 2
    assert said in " ".join(answer.stderr.split())


def test_a_default_store_that_was_not_made_yet(run: Path) -> None:
    """Is as good as empty; what names a snapshot says how there would be one."""
    code = (
        "import os; os.environ.pop('LAZYRESTORE_STORE', None); import lazyrestore.commands as commands; "
        f"commands.default_store = lambda: {str(run / 'none')!r}; from lazyrestore.__main__ import entry; entry()"
    )
    for words in (["ls"], ["stats"], ["verify"]):
        answer = run_cli(None, *words, code=code)
        assert answer.returncode == 0, answer.stderr
    for words in (["show", "x"], ["restore", "x"], ["record", "x"], ["rm", "x"], ["verify", "x"]):
        answer = run_cli(None, *words, code=code)
        assert answer.returncode == errors.NotAStore.exit_status
        assert f"{run / 'none'}: open: it does not exist; no snapshot was taken into it yet" in answer.stderr


def test_a_store_without_a_name_is_not_the_default_store(run: Path) -> None:
    """As `rm --store "$UNSET" x`."""
    for answer in (run_cli("", "rm", "x"), run_cli(None, "rm", "x", "--store", "")):
        assert answer.returncode == 2
        assert "'--store': it is empty" in answer.stderr


def test_what_was_mistyped_is_guessed(run: Path, pid: int) -> None:
    for words, guess in ((["restor", "x"], "did you mean 'restore'?"), (["show", "X"], "did you mean x?")):
        answer = run_cli(run / "store", *words)
        assert answer.returncode != 0
        assert guess in answer.stderr
    assert "`lazyrestore ls` shows" in run_cli(run / "store", "show", "worker").stderr


def test_ls_and_show_know_one_time(run: Path, pid: int) -> None:
    (listed,) = json.loads(run_cli(run / "store", "ls", "--json").stdout)
    assert listed["created"] == json.loads(run_cli(run / "store", "show", "x", "--json").stdout)["created"]


def test_a_request_goes_to_a_port(run: Path, pid: int) -> None:
    answer = run_cli(run / "store", "record", "x", "--request", "GET / HTTP/1.0")
    assert answer.returncode == 2
    assert "--until-port, which is missing" in answer.stderr


def test_record_says_at_once_that_nothing_listens(run: Path, pid: int) -> None:
    words = command(run / "store", "record", "x", "--until-port", 1)
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as recorder:
        assert recorder.stderr
        said = recorder.stderr.readline()
        recorder.terminate()
    assert "x listens on TCP ports: none; waiting for it to answer on 1" in said
    assert not alive(pid)


def test_doctor_keeps_the_names_whole_in_a_narrow_window(run: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 40))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command(None, "doctor"), stdin=subprocess.DEVNULL, stdout=theirs, env=environment) as doctor:
        os.close(theirs)
        text = b""
        with suppress(OSError):  # EIO: the last writer has gone
            while part := os.read(ours, 65536):
                text += part
    os.close(ours)
    assert doctor.returncode == 0
    for name in (b"uffd-missing-hugetlb", b"uffd-copy-on-write"):
        assert b"\n" + name + b" " in text
    assert not re.search(rb" +\r\n", text.split(b"\n", 2)[2])  # behind the headings


def test_a_store_whose_path_is_not_utf8(run: Path, victims: Victims) -> None:
    """Its bytes reach the pager and what it starts; to say them no encoding is needed."""
    store = os.fsdecode(os.fsencode(run) + b"/\xff")
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    taken = run_cli(store, "snapshot", victim.pid, "--name", "x", "--kill")
    assert taken.returncode == 0, taken.stderr
    victim.gone()
    recorded = run_cli(store, "record", "x", "--for", "0")
    assert (recorded.returncode, recorded.stderr) == (0, "")
    removed, listed = run_cli(store, "rm", "x"), run_cli(store, "ls")
    assert (removed.returncode, listed.returncode) == (0, 0), removed.stderr
    assert listed.stdout == f"no snapshots in {run}/\\udcff\n"


@pytest.mark.parametrize("words", [["ls"], ["ls", "--debug"]])
def test_what_an_encoding_lacks_is_written_in_escapes(run: Path, words: list[str]) -> None:
    lazyrestore.Store.open(run / "dépôt").close()
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command(run / "dépôt", *words), capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == f"no snapshots in {run}/d\\xe9p\\xf4t\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize(
    ("words", "status"), [("doctor", 0), ("show nope", errors.SnapshotNotFound.exit_status), ("show", 2)]
)
def test_closed_standard_streams(run: Path, words: str, status: int, closed: str) -> None:
    """What is to be said there is lost, and nothing else; an error does not go to the output of the others."""
    lazyrestore.Store.open(run / "store").close()
    script = ["bash", "-c", f'exec "$@" {closed}', "-", *command(run / "store", *words.split())]
    done = subprocess.run(script, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert (done.stdout == "") == (">&-" in closed.split() or words != "doctor")
    assert (done.stderr == "") == ("2>&-" in closed or words == "doctor")


def test_the_exit_statuses_are_documented() -> None:
    """docs/exit-statuses.md: one row for each class, in the order of errors.py."""
    text = (Path(__file__).parents[2] / "docs" / "exit-statuses.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert rows == [(str(kind.exit_status), kind.__name__) for kind in kinds]
    assert len({kind.exit_status for kind in kinds}) == len(kinds)


def test_output_that_cannot_be_written_is_named_with_what_was_done(run: Path, victims: Victims) -> None:
    victim = reporter(run, victims)
    snapshot = ["snapshot", str(victim.pid), "--name", "x", "--json"]
    lost = "lazyrestore: standard output: write: No space left on device; {}\n"
    for words, left in (
        (snapshot, "snapshot x is stored"),
        (["ls"], "send it to another file"),
        (["rm", "x"], "1 snapshot removed"),
        ([*snapshot, "--kill"], "snapshot x is stored and the process ended"),
        (["rm", "x", "--json"], "1 snapshot removed"),
        (["doctor", "--json"], "send it to another file"),
    ):
        with open("/dev/full", "w") as sink:
            done = subprocess.run(
                command(run / "store", *words), stdout=sink, stderr=subprocess.PIPE, text=True, check=False
            )
        assert (done.returncode, done.stderr) == (1, lost.format(left))


def test_show_escapes_what_a_terminal_would_obey(run: Path, victims: Victims, copies: Copies) -> None:
    odd = run / "a\nb\x1b[31m"
    code = "import sys, time\nfile = open(sys.argv[1], 'w')\nwhile True: time.sleep(100)"
    victim = victims.start([sys.executable, "-c", code, odd])
    victim.until(odd.exists, "its file")
    copies.snapshot(victim.pid, "x")
    shown = run_cli(run / "store", "show", "x").stdout
    assert "\x1b" not in shown
    assert f"(file {run}/a\\x0ab\\x1b[31m)\n" in shown
    assert "-c import sys, time\\x0afile = open" in shown
    assert str(odd) in "".join(json.loads(run_cli(run / "store", "show", "x", "--json").stdout)["descriptors"])
