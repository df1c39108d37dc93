"""How a pager starts and ends, and what becomes of its processes when it is killed."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import open_descriptors, until
from helpers_pager import CHUNK, Image, Victim, await_end

from lazyrestore.errors import PagerError
from lazyrestore.pager import PagerClient, Range, connect_existing, connect_or_start, launch, wire

pytestmark = pytest.mark.requires("root")

BASE = 0x10_0000_0000
LENGTH = 2 << 20

Start = Callable[..., PagerClient]
MakeVictim = Callable[[], Victim]


@pytest.fixture
def image(make_image: Callable[..., Image]) -> Image:
    return make_image()


def sockets(runtime: Path) -> list[Path]:
    return list(runtime.glob("*.sock"))


def open_fds(pid: int) -> list[str]:
    return sorted(os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())


def test_one_that_does_not_answer_is_passed_over(make_image: Callable[..., Image], start: Start, runtime: Path) -> None:
    """Who asks all pagers is not held up by one that is stopped, or whose keeper waits for what a debugger holds."""
    stopped, other = start(make_image()), start(make_image(key="other"))
    pager, _ = stopped.pids()
    os.kill(pager, signal.SIGSTOP)
    found = [client.pids() for _, client in launch.connect_all(runtime_dir=runtime, patience=0.2)]
    os.kill(pager, signal.SIGCONT)
    assert found == [other.pids()]
    assert len(list(launch.connect_all(runtime_dir=runtime))) == 2


def test_an_interrupt_as_the_template_is_closed(image: Image, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes as the call returns (Ctrl-C in a restore); what is closed by then is not closed again."""
    before = open_descriptors()
    connecting = launch.begin(image, runtime_dir=runtime, linger_ms=0)
    close = os.close

    def interrupted(descriptor: int) -> None:
        close(descriptor)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        connecting.close()
    monkeypatch.undo()
    connecting.close()
    assert open_descriptors() == before
    until(lambda: not sockets(runtime), "the end of the pager")


def test_killed_pager_takes_its_processes_along(
    image: Image, start: Start, runtime: Path, make_victim: MakeVictim
) -> None:
    client = start(image)
    clones = [make_victim(), make_victim()]
    for clone in clones:
        clone.clone(client, BASE, LENGTH)
    child = clones[0].fork()
    bystander = make_victim()
    pager, keeper = client.pids()
    os.kill(pager, signal.SIGKILL)
    # Each either dies first, or waits for its memory until it dies. None reads a zero.
    for clone in clones:
        assert clone.ask("crc", BASE, LENGTH) == ""
        assert clone.process.wait() == -signal.SIGKILL
    await_end(child)
    await_end(keeper)
    assert bystander.ask("uffd")
    assert not sockets(runtime)


def test_waiting_thread_dies_with_the_pager(image: Image, start: Start, make_victim: MakeVictim) -> None:
    """A fault that the pager never sees (it is stopped) waits; kill -9 then ends the process, not the wait."""
    client = start(image)
    clone = make_victim()
    clone.clone(client, BASE, LENGTH)
    pager, _ = client.pids()
    os.kill(pager, signal.SIGSTOP)
    clone.send("crc", BASE, LENGTH)
    os.kill(pager, signal.SIGKILL)
    assert clone.process.stdout
    assert clone.process.stdout.readline() == ""
    assert clone.process.wait() == -signal.SIGKILL


def test_killed_keeper_is_replaced(image: Image, start: Start, make_victim: MakeVictim) -> None:
    client = start(image)
    clone = make_victim()
    clone.clone(client, BASE, LENGTH)
    for _ in range(2):
        pager, keeper = client.pids()
        os.kill(keeper, signal.SIGKILL)
        await_end(keeper)
        while client.pids() == (pager, keeper):
            os.sched_yield()
    assert clone.ask("crc", BASE, LENGTH) == str(zlib.crc32(image.raw(BASE, LENGTH)))
    pager, keeper = client.pids()
    os.kill(pager, signal.SIGKILL)
    assert clone.process.wait() == -signal.SIGKILL
    await_end(keeper)


def test_exits_after_the_last_space_and_removes_the_socket(
    image: Image, start: Start, runtime: Path, make_victim: MakeVictim
) -> None:
    client = start(image, linger_ms=1)
    clone = make_victim()
    clone.clone(client, BASE, LENGTH)
    child = clone.fork()
    pager, keeper = client.pids()
    client.close()
    assert sockets(runtime)
    clone.kill()
    with connect_existing(image.key, image.name, runtime_dir=runtime) or pytest.fail("left too early"):
        pass
    os.kill(child, signal.SIGKILL)
    await_end(pager)
    await_end(keeper)
    assert not sockets(runtime)
    assert connect_existing(image.key, image.name, runtime_dir=runtime) is None


def test_exec_ends_an_address_space(image: Image, start: Start, make_victim: MakeVictim) -> None:
    client = start(image, linger_ms=1)
    clone = make_victim()
    clone.clone(client, BASE, LENGTH)
    assert len(client.stats().spaces) == 1
    clone.send("exec")
    while client.stats().spaces:
        os.sched_yield()
    assert clone.process.poll() is None


def test_lingers_and_serves_the_next(image: Image, start: Start, runtime: Path) -> None:
    first = start(image, linger_ms=3_600_000)
    pids = first.pids()
    first.close()
    with connect_or_start(image, runtime_dir=runtime) as second:
        assert second.pids() == pids
        second.stop()


def test_who_only_connects_does_not_keep_it(make_image: Callable[..., Image], start: Start, runtime: Path) -> None:
    """As other pagers do, which look whose sockets nobody listens at. Such a connection is held for a linger, which a
    second pager measures. When it ends, the pager leaves at once: before a third one, which was used until then and
    lingers half as long."""
    linger_ms = 2000
    client = start(make_image(), linger_ms=linger_ms)
    (path,) = sockets(runtime)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
        visitor.connect(str(path))
        client.close()
        with start(make_image(key="before"), linger_ms=linger_ms) as before:
            pager, _ = before.pids()
        await_end(pager)
        assert path.exists()
        later = make_image(key="later")
        with start(later, linger_ms=linger_ms // 2) as used:
            pids = used.pids()
    until(lambda: not path.exists(), "the end of the pager")
    with connect_existing(later.key, later.name, runtime_dir=runtime) or pytest.fail("it left earlier") as found:
        assert found.pids() == pids
        found.stop()


def test_a_child_that_cannot_be_served_never_runs_on_zeros(
    image: Image, start: Start, make_victim: MakeVictim, runtime: Path
) -> None:
    """It waits, as for a thread that cannot be started, and is killed when the pager leaves."""
    client = start(image, linger_ms=1)
    clone = make_victim()
    clone.clone(client, BASE, LENGTH)
    pager, _ = client.pids()
    limit = resource.prlimit(pager, resource.RLIMIT_AS)
    resource.prlimit(pager, resource.RLIMIT_AS, (1 << 20, limit[1]))
    clone.fork()
    until(lambda: "cannot be served" in (runtime / "pager.log").read_text(), "the child, and no thread for it")
    resource.prlimit(pager, resource.RLIMIT_AS, limit)
    clone.send_child("crc", BASE, LENGTH)
    clone.kill()
    client.close()
    assert clone.answer_of_child() == ""
    await_end(pager)


def test_many_start_at_once_and_find_one_pager(image: Image, start: Start, runtime: Path) -> None:
    start(image)
    found: list[tuple[int, int]] = []
    clients: list[PagerClient] = []

    def connect() -> None:
        client = connect_or_start(image, runtime_dir=runtime)
        clients.append(client)
        found.append(client.pids())

    threads = [threading.Thread(target=connect) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        client.close()
    assert len(found) == 16
    assert len(set(found)) == 1


def test_connect_races_with_exit(image: Image, runtime: Path) -> None:
    """A pager that leaves at once is met while it leaves: every connection still reaches one that answers."""
    pagers = set()
    for _ in range(60):
        with connect_or_start(image, runtime_dir=runtime, linger_ms=0) as client:
            assert client.stats().chunks_total == image.n_chunks
            pagers.add(client.pids()[0])
    for pager in pagers:
        await_end(pager)
    assert not sockets(runtime)


def test_stale_socket_is_replaced(image: Image, start: Start, runtime: Path) -> None:
    path = launch._socket_path(runtime, image.key)
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(os.fspath(path))
    stale.close()
    assert start(image).stats().chunks_total == image.n_chunks


def test_leavings_of_the_killed_are_removed(make_image: Callable[..., Image], start: Start, runtime: Path) -> None:
    """By a pager that leaves; but not what belongs to one that runs, or to somebody who is about to start one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(runtime / "1111111111111111.sock"))
    for name in ("1111111111111111.lock", "2222222222222222.lock", "3333333333333333.lock", "other"):
        (runtime / name).touch()
    with launch._locked(str(runtime / "3333333333333333.sock")):
        other = start(make_image(key="another"), linger_ms=3_600_000)
        mine = start(make_image())
        pager, _ = mine.pids()
        mine.close()
        await_end(pager)
        path = launch.socket_path("another", runtime_dir=runtime)
        expected = {"3333333333333333.lock", "other", "pager.log", Path(path).name, Path(path).stem + ".lock"}
        assert {entry.name for entry in runtime.iterdir()} == expected
    assert other.pids()
    other.stop()


def test_pager_holds_only_what_it_needs(image: Image, start: Start, make_victim: MakeVictim) -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    client = start(image)
    pager, keeper = client.pids()
    os.close(write_end)
    assert os.read(read_end, 1) == b""  # nobody else has the other end
    os.close(read_end)
    before = open_fds(pager)
    assert open_fds(keeper) == before
    assert not any("lazyrestore-image" in link for link in before)
    clone = make_victim()
    clone.clone(client, BASE, LENGTH)
    clone.fork()
    assert open_fds(pager).count("anon_inode:[userfaultfd]") == 2
    clone.kill()
    clone.end_child()
    until(lambda: open_fds(pager) == before, "closed descriptors")  # after the space is gone from the statistics


def test_bad_image(image: Image, runtime: Path) -> None:
    image.index_offset = 1 << 40
    with pytest.raises(PagerError, match="ended at once"):
        connect_or_start(image, runtime_dir=runtime)
    assert "index beyond the data file" in (runtime / "pager.log").read_text()
    assert not sockets(runtime)


@pytest.mark.parametrize(
    ("ranges", "complaint"),
    [
        ([Range(BASE + 1, BASE + CHUNK, BASE)], "not aligned"),
        ([Range(BASE + CHUNK, BASE, BASE)], "not sorted"),
        ([Range(BASE, BASE + CHUNK, BASE), Range(BASE, BASE + CHUNK, BASE)], "not sorted"),
        ([Range(BASE, BASE + CHUNK, (1 << 47) - 4096)], "beyond its backing"),
        ([Range(BASE, BASE + CHUNK, BASE, 1)], "unknown backing"),
        ([Range(BASE + (1 << 30), BASE + (1 << 30) + CHUNK, BASE)], "UFFDIO_REGISTER"),
        ([], "number of ranges"),
    ],
)
def test_bad_ranges(image: Image, start: Start, make_victim: MakeVictim, ranges: list[Range], complaint: str) -> None:
    client = start(image)
    victim = make_victim()
    victim.map(BASE, LENGTH, victim.open(f"/proc/{os.getpid()}/fd/{client.template_fd}"), BASE)
    with pytest.raises(PagerError, match=complaint) as caught:
        victim.attach(client, ranges)
    assert caught.value.errno
    assert not client.stats().spaces
    victim.attach(client, [Range(BASE, BASE + LENGTH, BASE)])
    assert victim.ask("crc", BASE, CHUNK) == str(zlib.crc32(image.raw(BASE, CHUNK)))


def test_other_protocol_version_is_refused(image: Image, start: Start) -> None:
    client = start(image)
    request = wire.REQUEST.pack(wire.STATS, wire.VERSION + 1, 0, 0, 0, *[0] * wire.MAX_SHARED)
    with pytest.raises(PagerError, match="protocol version"):
        client._ask(request)


STRANGER = """
import os, socket, sys
user, request = int(sys.argv[1]), bytes.fromhex(sys.argv[2])
os.setresuid(user, user, user)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect(sys.argv[3])
    try:
        connection.sendall(request)
        print(len(connection.recv(4096)))
    except ConnectionError:
        print(0)
"""


@pytest.mark.parametrize("user", [0, 65534])
def test_another_user_is_refused(image: Image, start: Start, runtime: Path, user: int) -> None:
    """By its credentials, where it gets at the socket."""
    start(image)
    (path,) = sockets(runtime)
    runtime.chmod(0o711)
    path.chmod(0o777)
    request = wire.REQUEST.pack(wire.STATS, wire.VERSION, 0, 0, 0, *[0] * wire.MAX_SHARED)
    # From within the directory: those above it may be root's alone.
    words = [sys.executable, "-c", STRANGER, str(user), request.hex(), path.name]
    answer = subprocess.run(words, cwd=runtime, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert (int(answer.stdout) > 0) == (user == 0)
    refused = "another user was refused"
    until(lambda: user == 0 or refused in (runtime / "pager.log").read_text(), "a line in the log")


def test_runtime_directory_must_be_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = Path(launch.runtime_directory())
    assert path == tmp_path / "lazyrestore"
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o755)
    with pytest.raises(PagerError, match="not a private directory"):
        launch.runtime_directory()
