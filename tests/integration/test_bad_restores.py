"""Restores that cannot be: a clear error with its own exit status, no process left, nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from helpers import GUARD_SECONDS, Builder, Victim, Victims, alive, ask, children_of, open_descriptors, until
from helpers_cli import MAIN, command, run_cli
from helpers_copies import Copies

import lazyrestore
from lazyrestore import errors, pid_namespace, restore, spawn
from lazyrestore.new_process import NewProcess
from lazyrestore.pager import PagerClient, launch
from lazyrestore.restore_plan import signature_of

Start = Callable[..., Victim]


@pytest.fixture
def start(run: Path, victims: Victims, build: Builder) -> Start:
    """Start a program that the test may change: a copy in the test's own directory."""

    def start() -> Victim:
        program = run / "small"
        shutil.copy2(build.c("small", "-lm"), program)
        victim = victims.start([program, run / "control"], cwd=run)
        victim.listens(run / "control")
        return victim

    return start


def refused(run: Path, victims: Victims, snapshot: lazyrestore.Snapshot, kind: type[errors.LazyrestoreError]) -> str:
    """The library raises `kind`; no process is left, not even one to be collected."""
    before = sorted(victims.marked()), children_of(os.getpid())
    with pytest.raises(kind) as caught:
        snapshot.restore()
    assert (sorted(victims.marked()), children_of(os.getpid())) == before
    return str(caught.value)


def refused_by_cli(run: Path, snapshot: lazyrestore.Snapshot, kind: type[errors.LazyrestoreError]) -> None:
    answer = run_cli(run / "store", "restore", snapshot.name, "--detach", "--json")
    assert answer.returncode == kind.exit_status, answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("new_pid", [False, True])
@pytest.mark.parametrize("step", ["run_to_end", "let_go"])
def test_failure_when_threads_are_there(
    victims: Victims, copies: Copies, monkeypatch: pytest.MonkeyPatch, step: str, new_pid: bool
) -> None:
    """The leader of a traced process ends only after its threads have been collected."""
    code = "import threading\nfor _ in range(4): threading.Thread(target=threading.Event().wait).start()"
    victim = victims.start([sys.executable, "-c", code])
    victim.until(lambda: len(os.listdir(f"/proc/{victim.pid}/task")) == 5, "its threads")
    victim.quiet()
    snapshot = end(victim, copies)
    original = getattr(NewProcess, step)

    def fails(child: object, **options: bool) -> None:
        if step == "run_to_end":
            original(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(NewProcess, step, fails)
    raised: list[BaseException] = []

    def attempt() -> None:
        try:
            snapshot.restore(new_pid=new_pid)
        except BaseException as error:
            raised.append(error)

    attempting = threading.Thread(target=attempt, daemon=True)
    before = children_of(os.getpid())
    attempting.start()
    attempting.join(GUARD_SECONDS)
    assert [type(error) for error in raised] == [KeyboardInterrupt]
    assert (list(victims.marked()), children_of(os.getpid())) == ([], before)


def end(victim: Victim, copies: Copies) -> lazyrestore.Snapshot:
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    return snapshot


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rebuild(path: Path) -> None:
    """Another build of the same size and time: only the build id tells."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[data.index(b"GNU\0", data.index(b"\x14\0\0\0\x03\0\0\0GNU\0")) + 4] ^= 0xFF
    path.unlink()
    path.write_bytes(data)
    path.chmod(0o755)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


class Interrupting:
    """Another object but for one function: an interrupt that came while it ran is raised as soon as it has returned."""

    def __init__(self, real: object, name: str) -> None:
        self.real, self.name = real, name

    def __getattr__(self, name: str) -> object:
        function = getattr(self.real, name)
        if name != self.name:
            return function

        def interrupted(*arguments: object, **more: object) -> None:
            function(*arguments, **more)
            raise KeyboardInterrupt

        return interrupted


@pytest.mark.requires("root")
@pytest.mark.parametrize(
    ("where", "owner", "name"),
    [
        (spawn, "lib", "lr_spawn"),
        (restore, "spawn", "start"),
        (restore, "run", "__call__"),
        (pid_namespace, "spawn", "start"),
        (pid_namespace, "new_namespace", "__call__"),
    ],
)
def test_interrupted_as_a_step_returns(
    run: Path, start: Start, copies: Copies, monkeypatch: pytest.MonkeyPatch, where: object, owner: str, name: str
) -> None:
    """Ctrl-C drops what a function has just returned; the new process must not outlive it."""
    victim = start()
    snapshot = copies.snapshot(victim.pid, "s", kill=True)
    victim.gone()
    before = children_of(os.getpid())
    interrupting = Interrupting(getattr(where, owner), name)
    with monkeypatch.context() as patch:
        patch.setattr(where, owner, interrupting if name != "__call__" else getattr(interrupting, name))
        with pytest.raises(KeyboardInterrupt):
            snapshot.restore(new_pid=where is pid_namespace)
    assert not alive(victim.pid)
    assert children_of(os.getpid()) == before
    copy = snapshot.restore()
    assert ask(run / "control", "hello")
    copy.kill()
    copy.wait()


def test_a_pager_whose_template_is_another(
    run: Path, start: Start, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than the one that the new process has mapped meanwhile, as if it was replaced: the restore begins anew."""
    victim = start()
    snapshot = end(victim, copies)
    real = launch.Connecting.answered
    others: list[PagerClient] = []

    def answered(connecting: launch.Connecting) -> PagerClient:
        client = real(connecting)
        if others:
            return client
        client.close()
        with launch.begin(snapshot._image, runtime_dir=run / "other") as another:
            others.append(real(another))
        return others[0]

    monkeypatch.setattr(launch.Connecting, "answered", answered)
    copy = copies.restore(snapshot)
    assert not others[0].stats().spaces
    assert ask(run / "control", "0") == "1001\n"
    copy.check()


def test_a_process_that_cannot_be_started() -> None:
    """The error names the step, and all that was opened for it is closed once."""
    spawn.executable()  # made once, and kept
    before = children_of(os.getpid()), open_descriptors()
    with pytest.raises(OSError) as caught:
        spawn.start([(-1, 100)])
    assert (caught.value.errno, caught.value.filename) == (errno.EBADF, "dup3")
    assert (children_of(os.getpid()), open_descriptors()) == before


def make_fifo(path: Path) -> None:
    """What waits for ever if it is opened."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [grow, rebuild, Path.unlink, make_fifo])
def test_changed_program(
    run: Path, victims: Victims, copies: Copies, start: Start, damage: Callable[[Path], None]
) -> None:
    victim = start()
    ask(run / "control", "5")
    snapshot = end(victim, copies)
    shutil.copy2(run / "small", run / "kept")
    os.rename(run / "small", run / "original")
    shutil.copy2(run / "kept", run / "small")
    damage(run / "small")
    message = refused(run, victims, snapshot, errors.FileChanged)
    assert str(run / "small") in message
    refused_by_cli(run, snapshot, errors.FileChanged)
    os.rename(run / "original", run / "small")
    copies.restore(snapshot)
    assert ask(run / "control", "0") == "1002\n"


def test_unchanged_files_are_known_by_their_signature(copies: Copies, start: Start) -> None:
    """So that a first restore need not read them."""
    snapshot = copies.snapshot(start().pid, "x")
    files = snapshot.manifest.files
    assert files and all(identity.seen == signature_of(os.stat(identity.path)) for identity in files)


def test_vanished_or_shortened_open_file(run: Path, victims: Victims, copies: Copies) -> None:
    """Or one that is shorter than what was read of it. The message is one line, whatever the file is called."""
    text = run / "a\ntext"
    text.write_text("text")
    with text.open() as opened:
        opened.seek(3)
        victim = victims.start(["sleep", "1000000"], stdin=opened.fileno())
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    snapshot = end(victim, copies)
    os.rename(text, run / "away")
    assert f"{run}/a\\x0atext" in refused(run, victims, snapshot, errors.FileChanged)
    refused_by_cli(run, snapshot, errors.FileChanged)
    text.write_text("te")
    assert "is 2 bytes long now" in refused(run, victims, snapshot, errors.FileChanged)
    os.rename(run / "away", text)
    copies.restore(snapshot)


def test_vanished_working_directory(run: Path, victims: Victims, copies: Copies) -> None:
    (run / "place").mkdir()
    victim = victims.start(["sleep", "1000000"], cwd=run / "place")
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    snapshot = end(victim, copies)
    (run / "place").rmdir()
    message = refused(run, victims, snapshot, errors.FileChanged)
    assert f"working directory {run / 'place'}: " in message and "; make it again" in message
    (run / "place").mkdir()
    copies.restore(snapshot)


def test_a_limit_that_may_not_be_raised(run: Path, victims: Victims, copies: Copies) -> None:
    """Without CAP_SYS_RESOURCE, and with a hard limit below the snapshot's: what is missing is said."""
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    end(victim, copies)
    unprivileged = (
        "import ctypes, os, resource, sys; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
        "assert ctypes.CDLL(None).prctl(24, 24, 0, 0, 0) == 0; os.execv(sys.argv[1], sys.argv[1:])"
    )  # PR_CAPBSET_DROP, CAP_SYS_RESOURCE
    words = command(run / "store", "restore", "x", "--detach")
    answer = subprocess.run([sys.executable, "-c", unprivileged, *words], capture_output=True, text=True, check=False)
    assert answer.returncode == errors.RestoreError.exit_status
    assert answer.stderr.startswith("lazyrestore: resource limits: prlimit64 (RLIMIT_CORE): ")
    assert "hard limit (ulimit -H)" in answer.stderr
    assert list(victims.marked()) == []


def test_pid_taken_by_the_original(run: Path, victims: Victims, copies: Copies, start: Start) -> None:
    victim = start()
    snapshot = copies.snapshot(victim.pid, "x")
    with pytest.raises(errors.PidTaken) as caught:
        snapshot.restore()
    assert str(victim.pid) in str(caught.value)
    refused_by_cli(run, snapshot, errors.PidTaken)
    assert ask(run / "control", "0") == "1001\n"
    victim.kill()
    copies.restore(snapshot)
    assert ask(run / "control", "0") == "1001\n"


def test_another_vdso(run: Path, victims: Victims, copies: Copies, start: Start) -> None:
    snapshot = end(start(), copies)
    host = msgspec.structs.replace(snapshot.manifest.host, vdso_hash="0" * 64)
    snapshot.manifest = msgspec.structs.replace(snapshot.manifest, host=host)
    refused(run, victims, snapshot, errors.KernelMismatch)


def test_a_lesser_cpu(run: Path, victims: Victims, copies: Copies, start: Start) -> None:
    snapshot = end(start(), copies)
    host = snapshot.manifest.host
    host = msgspec.structs.replace(host, cpu_flags=[*host.cpu_flags, "avx9000"], xfeatures=host.xfeatures | 1 << 40)
    snapshot.manifest = msgspec.structs.replace(snapshot.manifest, host=host)
    refused(run, victims, snapshot, errors.CpuMismatch)


def test_names(run: Path, victims: Victims, copies: Copies, start: Start) -> None:
    victim = start()
    for name in ("", ".", "..", "a/b", "-x", "a b", "ä", "x\n", "x" * 500):
        with pytest.raises(errors.BadSnapshotName):
            copies.store.snapshot(victim.pid, name=name)
    answer = run_cli(run / "store", "snapshot", victim.pid, "--name", "a/b")
    assert answer.returncode == errors.BadSnapshotName.exit_status
    assert copies.store.names() == []
    copies.snapshot(victim.pid, "x")
    with pytest.raises(errors.SnapshotExists):
        copies.snapshot(victim.pid, "x", kill=True)
    assert alive(victim.pid)
    answer = run_cli(run / "store", "snapshot", victim.pid, "--name", "x")
    assert answer.returncode == errors.SnapshotExists.exit_status
    answer = run_cli(run / "store", "snapshot", victim.pid, "--name", "x", "--replace", "--json")
    assert answer.returncode == 0, answer.stderr
    answer = run_cli(run / "store", "restore", "y")
    assert answer.returncode == errors.SnapshotNotFound.exit_status
    assert copies.store.names() == ["x"]
    assert ask(run / "control", "0") == "1001\n"


def test_full_store(run: Path, victims: Victims, build: Builder) -> None:
    """A store on a file system of 1 MiB: the target runs on, the store is as it was."""
    small = run / "full"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    try:
        victim = victims.start([build.c("memzoo"), run / "control"], cwd=run)
        victims.leftovers.append("/dev/shm/lazyrestore-zoo-{pid}")
        victim.listens(run / "control")
        with lazyrestore.Store.open(small / "store") as store:
            with pytest.raises(errors.StoreFull):
                store.snapshot(victim.pid, name="x", kill=True)
            assert store.names() == []
        assert ask(run / "control", "write") == "ok"
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


@pytest.mark.parametrize("damaged", [True, False])
def test_sigbus_in_the_foreground_is_explained(run: Path, victims: Victims, copies: Copies, damaged: bool) -> None:
    code = "import os, sys, time\nwhile True: os.makedirs(sys.argv[1], exist_ok=True); time.sleep(0.01)"
    victim = victims.start([sys.executable, "-c", code, run / "runs"])
    victim.until((run / "runs").exists, "its heap")
    snapshot = copies.snapshot(victim.pid, "s", kill=True)
    victim.gone()
    (run / "runs").rmdir()
    if damaged:
        image = snapshot._image
        memory = snapshot.manifest.attributes.memory
        n_damaged = 0
        with (run / "store" / "data.mdb").open("r+b") as file:
            for address, _, pack, offset, stored in map(image.entry, range(image.n_chunks)):
                if memory.start_brk <= address < memory.brk:
                    file.seek(image.packs[pack][0] + offset)
                    file.write(bytes(stored))
                    n_damaged += 1
        assert n_damaged
    restoring = subprocess.Popen(
        command(run / "store", "restore", "s"), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if not damaged:
        until((run / "runs").exists, "a copy that runs")
        os.kill(victim.pid, signal.SIGBUS)
    _, said = restoring.communicate(timeout=GUARD_SECONDS)
    assert restoring.returncode == 128 + signal.SIGBUS, said
    assert ("verify s" in said) == damaged, said


def test_a_lock_that_another_holds(run: Path, victims: Victims, copies: Copies) -> None:
    """As every second clone does of a process that has locked a file."""
    code = "import fcntl, os, sys; file = open('locked', 'w'); {}; os.mkdir('ready'); sys.stdin.read()"
    for take in ("fcntl.flock(file, 2)", "fcntl.lockf(file, 2)"):
        reader, writer = os.pipe()
        victim = victims.start([sys.executable, "-c", code.format(take)], cwd=run, stdin=reader)
        victim.until((run / "ready").exists, "the lock")
        (run / "ready").rmdir()
        snapshot = copies.snapshot(victim.pid, "x")
        with pytest.raises(errors.RestoreError, match=r"locked.*lock.*end the process that holds the lock"):
            snapshot.restore(new_pid=True)
        victim.kill()
        copies.store.remove("x")
        os.close(reader)
        os.close(writer)


@pytest.mark.requires("root")
@pytest.mark.parametrize(("limit", "new_pid"), [(100, False), (100, True), (8192, False), (8192, True)])
def test_a_limit_on_the_size_of_files(run: Path, victims: Victims, copies: Copies, limit: int, new_pid: bool) -> None:
    """It counts for memory files, too, and a write up to it succeeds in part. The pager is there already."""
    victim = victims.start(["sleep", "1000000"])
    victim.until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith("sleep"), "exec")
    snapshot = end(victim, copies)
    other = snapshot.restore(new_pid=True)
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {MAIN}"
    words = ["--pid", "new"] if new_pid else []
    answer = run_cli(run / "store", "restore", snapshot.name, "--detach", *words, code=limited)
    other.kill()
    other.wait()
    assert answer.returncode == errors.RestoreError.exit_status, answer.stderr
    assert "ulimit -f" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    assert not alive(victim.pid)


def test_the_proc_of_another_pid_namespace(run: Path, victims: Victims, copies: Copies, start: Start) -> None:
    """Process ids mean other processes there: neither may be touched."""
    victim = start()
    copies.snapshot(victim.pid, "x")
    for words in (["snapshot", str(victim.pid), "--name", "y"], ["restore", "x", "--detach"]):
        answer = subprocess.run(
            ["unshare", "--pid", "--fork", *command(run / "store", *words)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert answer.returncode == errors.MissingFeature.exit_status, answer.stderr
        assert "/proc" in answer.stderr
        assert len(answer.stderr.strip().splitlines()) == 1
    victim.check()
    assert copies.store.names() == ["x"]


NO_USERFAULTFD = """import struct
words = [(0x20, 0, 0, 0), (0x15, 0, 1, 323), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *each) for each in words))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(struct.pack("<HxxxxxxQ", 4, ctypes.addressof(code)))) == 0"""
# What a restorer may be confined to, by code that it runs first; the error's class, and what it says.
CONFINED = {
    "write xor execute": (
        "assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0",  # PR_SET_MDWE
        errors.RestoreError, "PR_SET_MDWE",
    ),
    "no userfaultfd": (
        NO_USERFAULTFD,
        errors.RestoreError, "lazy memory: userfaultfd: Operation not permitted",
    ),
    "8 GiB of address space": (
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))", errors.RestoreError, "ulimit -v",
    ),
    "32 descriptors": (
        "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))", errors.MissingFeature, "ulimit -Hn",
    ),
    "one process": (
        "resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))", errors.RestoreError, "RLIMIT_NPROC",
    ),
}  # fmt: skip


@pytest.mark.requires("root")
@pytest.mark.parametrize("kind", CONFINED)
def test_a_confined_restorer(run: Path, victims: Victims, copies: Copies, kind: str) -> None:
    """Without CAP_SYS_RESOURCE, so that no limit can be raised again. The process has 16 GiB of address space."""
    confine, error, said = CONFINED[kind]
    reserve = "import mmap, time; m = mmap.mmap(-1, 16 << 30, 0x4022); open('ready', 'w'); time.sleep(1e6)"
    victim = victims.start([sys.executable, "-c", reserve], cwd=run)
    victim.until((run / "ready").exists, "its memory")
    snapshot = end(victim, copies)
    code = f"import ctypes, resource\nassert ctypes.CDLL(None).prctl(24, 24, 0, 0, 0) == 0\n{confine}\n{MAIN}"
    answer = run_cli(run / "store", "restore", snapshot.name, "--detach", code=code)
    assert (answer.returncode, said in answer.stderr) == (error.exit_status, True), answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    assert not alive(victim.pid)
    assert list(victims.marked()) == []


@pytest.mark.requires("root")
def test_a_restorer_with_few_descriptors(run: Path, victims: Victims, copies: Copies, start: Start) -> None:
    """Whatever it lacks one for first."""
    snapshot = end(start(), copies)
    for limit in range(7, 20):
        few = "import ctypes, resource\nassert ctypes.CDLL(None).prctl(24, 24, 0, 0, 0) == 0\nimport lazyrestore.cli\n"
        code = f"{few}resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n{MAIN}"
        answer = run_cli(run / "store", "restore", snapshot.name, "--detach", code=code)
        assert answer.returncode != 0 and "ulimit -" in answer.stderr, (limit, answer.stderr)
        assert len(answer.stderr.strip().splitlines()) == 1, (limit, answer.stderr)
        assert list(victims.marked()) == []
