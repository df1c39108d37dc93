"""The pool: clones that do not notice that they were parked, each fresh, ended in time, and none left behind."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from helpers import Victims, alive, in_threads, until
from helpers_fleet import descriptors, init_of, report, reporter

import lazyrestore
from lazyrestore import fleet
from lazyrestore._native import _core
from lazyrestore.errors import PoolClosed, RestoreError
from lazyrestore.fleet.pool import Clone, Limits, Pool
from lazyrestore.kernel import procfs
from lazyrestore.pager import launch

STOPPED = 0x7F  # a wait status
OWNER = """
import sys, time, lazyrestore
with lazyrestore.Store.open(sys.argv[1]) as store, store.get("x") as snapshot, snapshot.pool(3) as pool:
    taken = pool.take()
    pool.wait_until_full()
    print("full", flush=True)
    time.sleep(1000)
"""


def listening(run: Path, victims: Victims, kind: str = "tcp") -> int:
    """A server that counts its answers; its process id."""
    victim = victims.python("listener.py", run, kind)
    victim.until((run / "address").exists, "the address")
    victim.until(lambda: "S (" in Path(f"/proc/{victim.pid}/status").read_text(), "a waiting server")
    return victim.pid


def ask(clone: Clone) -> str:
    with clone.connect(timeout=60) as connection:
        connection.sendall(b"once")
        return connection.makefile().readline().strip()


def state(pid: int) -> dict[str, str]:
    return procfs.parse_status(Path(f"/proc/{pid}/status").read_bytes())


def report_of(run: Path, pid: int) -> str | None:
    """What a reporter wrote that was signalled while it was parked, or before."""
    path = run / f"report-{os.stat(f'/proc/{pid}/ns/pid').st_ino}"
    return path.read_text() if path.exists() else None


def end_of_tracee(pid: int) -> None:
    """Let a process that we trace, and somebody has killed, end."""
    status = _core.ffi.new("int32_t *")
    while os.WIFSTOPPED(status[0] or STOPPED):
        assert _core.lib.lr_continue(pid, 0) in (0, -errno.ESRCH)
        if _core.lib.lr_wait(pid, status) < 0:
            break


def test_a_parked_clone_runs_nothing_and_sees_nothing(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    expected = report(run, victim.pid)
    with store.snapshot(victim.pid, name="x") as snapshot, snapshot.pool(2) as pool:
        assert pool.wait_until_full(60)
        parked = [clone.pid for clone in pool._parked]
        until(lambda: all(state(pid)["State"][0] == "T" for pid in parked), "two stopped clones")
        assert [report_of(run, pid) for pid in parked] == [None, None]
        with pool.take() as clone:
            until(lambda: state(clone.pid)["State"][0] == "S", "a clone that waits for its signals")
            now, original = state(clone.pid), state(victim.pid)
            for name in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"):
                assert now[name] == original[name], name
            assert report(run, clone.pid) == ["2", *expected[1:]]
            with pytest.raises(KeyError, match="no listening socket"):
                clone.connect()
        assert clone.pid in parked


@pytest.mark.parametrize("kind", ["tcp", "unix", "epoll"])
def test_every_clone_is_fresh_and_to_be_reached(
    run: Path, victims: Victims, store: lazyrestore.Store, kind: str
) -> None:
    pid = listening(run, victims, kind)
    with store.snapshot(pid, name="x") as snapshot:
        with snapshot.pool(1) as pool, pool.take() as clone:
            assert ask(clone) == f"1 {pid}"
        before = descriptors()
        with snapshot.pool(3) as pool:
            for _ in range(8):
                with pool.take() as clone:
                    assert ask(clone) == f"1 {pid}"
                    assert ask(clone) == f"2 {pid}"
        assert descriptors() == before
    assert set(victims.marked()) == {pid}


def test_the_place_of_a_clone_handed_out_is_held(
    run: Path, victims: Victims, store: lazyrestore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = listening(run, victims)
    monkeypatch.setattr(fleet.pool, "HOLD_SECONDS", 1e6)
    with store.snapshot(pid, name="x") as snapshot, snapshot.pool(2) as pool:

        def restores() -> tuple[int, int]:
            with pool._changed:
                return pool._starting + pool._started, max(0, pool._wanted() - pool._starting)

        assert pool.wait_until_full(60)
        first, second = pool.take(), pool.take()
        assert restores() == (2, 0)  # none begun, none due
        with pool.take(60) as third:  # but somebody waits
            assert ask(third) == f"1 {pid}"
        first.give_back()
        second.give_back()
        assert pool.wait_until_full(60)
        monkeypatch.setattr(fleet.pool, "HOLD_SECONDS", 0.001)
        with pool.take():  # kept for longer than that
            assert pool.wait_until_full(60)


def test_from_many_threads(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    pid = listening(run, victims)
    with store.snapshot(pid, name="x") as snapshot, snapshot.pool(4) as pool:
        seen: list[int] = []

        def work(_: int) -> None:
            for _ in range(5):
                with pool.take(60) as clone:
                    seen.append(clone.pid)
                    assert ask(clone) == f"1 {pid}"

        in_threads(8, work)
        assert len(seen) == 40
        stats = pool.stats()
        assert (stats.idle, stats.taken) == (0, 0)
        assert stats.retired == 40
    assert set(victims.marked()) == {pid}


def test_a_clone_that_dies_while_it_is_parked_is_replaced(
    run: Path, victims: Victims, store: lazyrestore.Store
) -> None:
    pid = listening(run, victims)
    with store.snapshot(pid, name="x") as snapshot:
        with snapshot.pool(1) as pool, pool.take() as clone:
            assert ask(clone) == f"1 {pid}"
        before = descriptors()
        with snapshot.pool(3) as pool:
            assert pool.wait_until_full(60)
            dead = list(pool._parked)[:2]
            for clone in dead:
                os.kill(clone.pid, signal.SIGKILL)
            until(lambda: pool.stats().died == 2, "two deaths that were noticed, with nobody asking")
            assert pool.wait_until_full(60)
            assert not set(dead) & set(pool._parked)
            stats = pool.stats()
            assert (stats.parked, stats.started, stats.retired) == (3, 5, 0)
            for count in range(1, 4):  # asked for as soon as it is dead, whether that was noticed or not
                (first, *_) = (clone.pid for clone in pool._parked)
                os.kill(first, signal.SIGKILL)
                until(lambda first=first: not alive(first), "its end")  # type: ignore[misc]
                with pool.take(60) as clone:
                    assert clone.process.poll() is None
                    assert ask(clone) == f"1 {pid}"
                until(lambda count=count: pool.stats().died == 2 + count, "its death")  # type: ignore[misc]
                assert pool.wait_until_full(60)
            assert pool.stats().retired == 3
        assert descriptors() == before
    assert set(victims.marked()) == {pid}


def test_a_clone_that_dies_while_it_is_restored_is_not_handed_out(
    run: Path, victims: Victims, store: lazyrestore.Store
) -> None:
    pid = listening(run, victims)
    with store.snapshot(pid, name="x") as snapshot, snapshot.pool(1) as source:
        ended = 0

        def start() -> Clone:
            nonlocal ended
            clone = source._start()
            if ended < 2:
                ended += 1
                clone.process.kill()
                until(lambda: not alive(clone.pid), "its end")
            return clone

        with Pool(start, 1, Limits()) as pool, pool.take(60) as clone:
            assert ask(clone) == f"1 {pid}"
            stats = pool.stats()
            assert (stats.died, stats.taken) == (2, 1)


def test_killed_pagers_leave_no_descriptors(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    pid = listening(run, victims)
    with store.snapshot(pid, name="x") as snapshot, snapshot.pool(1) as pool:
        counts = []
        for _ in range(4):
            assert pool.wait_until_full(60)
            counts.append(descriptors())
            (parked,) = pool._parked
            os.kill(snapshot._connect().pids()[0], signal.SIGKILL)
            until(lambda parked=parked: parked not in pool._parked, "the end of the clone")  # type: ignore[misc]
        assert pool.wait_until_full(60)
        assert descriptors() == counts[-1] == counts[1]


def test_limits(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    pid = listening(run, victims)
    with store.snapshot(pid, name="x") as snapshot:
        with snapshot.pool(1, max_requests=3) as pool:
            answers = []
            for _ in range(7):
                with pool.take() as clone:
                    answers.append(ask(clone).split()[0])
            assert answers == ["1", "2", "3", "1", "2", "3", "1"]
            with pytest.raises(ZeroDivisionError), pool.take() as clone:
                ask(clone)
                raise ZeroDivisionError
            with pool.take() as clone:
                assert ask(clone) == f"1 {pid}"
        for limits in ({"max_seconds": 0.0}, {"max_bytes": 0}):
            with snapshot.pool(1, max_requests=None, **limits) as pool:  # type: ignore[arg-type]
                for _ in range(2):
                    with pool.take() as clone:
                        assert ask(clone) == f"1 {pid}"
        with snapshot.pool(1, max_requests=None, max_seconds=1000.0, max_bytes=1 << 30) as pool:
            for count in range(1, 4):
                with pool.take() as clone:
                    assert ask(clone) == f"{count} {pid}"
            clone.process.kill()  # while it is idle: the next taker gets another one
            until(lambda: clone.process.poll() is not None, "the end of the clone")
            with pool.take() as other:
                assert ask(other) == f"1 {pid}"


@pytest.mark.parametrize("limit", [{"requests": 0}, {"seconds": -0.1}, {"bytes_written": -1}])
def test_limits_that_are_none(limit: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least|not negative"):
        Limits(**limit)


def test_close_ends_them_all(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    pid = listening(run, victims)
    with store.snapshot(pid, name="x") as snapshot:
        pool = snapshot.pool(3)
        taken = pool.take()
        assert pool.wait_until_full(60)
        assert len(set(victims.marked())) == 5
        pool.close()
        assert set(victims.marked()) == {pid}
        assert taken.process.poll() == -signal.SIGKILL
        taken.give_back()
        pool.close()
        with pytest.raises(PoolClosed):
            pool.take()


def test_death_of_the_owner_ends_them_all(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    store.snapshot(victim.pid, name="x").close()
    owner = subprocess.Popen([sys.executable, "-c", OWNER, run / "store"], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "full\n"
    assert len(set(victims.marked())) == 5
    owner.kill()
    owner.communicate()
    until(lambda: set(victims.marked()) == {victim.pid}, "the end of all clones")


def test_asyncio(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    pid = listening(run, victims)

    async def one(pool: Pool) -> str:
        with await pool.take_async() as clone:
            return await asyncio.to_thread(ask, clone)

    async def main(pool: Pool) -> list[str]:
        hurried = [asyncio.create_task(pool.take_async()) for _ in range(6)]
        await asyncio.sleep(0)
        for task in hurried:
            task.cancel()
        for clone in await asyncio.gather(*hurried, return_exceptions=True):
            if isinstance(clone, Clone):
                clone.give_back()
        return await asyncio.gather(*(one(pool) for _ in range(12)))

    with store.snapshot(pid, name="x") as snapshot, snapshot.pool(2) as pool:
        assert asyncio.run(main(pool)) == [f"1 {pid}"] * 12
        assert pool.stats().taken == 0
    assert set(victims.marked()) == {pid}


def test_a_timeout_and_a_failure(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    pid = listening(run, victims)
    with store.snapshot(pid, name="x") as snapshot, snapshot.pool(1) as source:
        gate, failing = threading.Event(), threading.Event()

        def start() -> Clone:
            gate.wait()
            if failing.is_set():
                raise RestoreError("no luck")
            return source._start()

        with Pool(start, 1, Limits()) as pool:
            with pytest.raises(TimeoutError):
                pool.take(0.01)
            failing.set()
            gate.set()
            with pytest.raises(RestoreError, match="no luck"):
                pool.take(60)
            failing.clear()
            with pool.take(60) as clone:
                assert ask(clone) == f"1 {pid}"


def test_pager_killed_during_a_refill(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """Its keeper kills the clones, but one that is being restored ends only by its tracer, which must hear of it."""
    pid = listening(run, victims)
    with store.snapshot(pid, name="x") as snapshot, snapshot.pool(2) as pool:
        assert pool.wait_until_full(60)
        parked = list(pool._parked)
        pager, _ = snapshot._connect().pids()
        os.kill(pager, signal.SIGSTOP)
        pool.take().give_back()
        waits = [Path(f"/proc/self/task/{thread.native_id}/wchan") for thread in pool._threads]
        until(lambda: any("skb_wait" in wait.read_text() for wait in waits), "a thread that waits for the pager")
        os.kill(pager, signal.SIGKILL)
        until(lambda: all(clone.process.poll() is not None for clone in parked), "the end of the clones")
        with pool.take(60) as clone:
            assert ask(clone) == f"1 {pid}"
    assert set(victims.marked()) == {pid}


def test_pager_killed_while_a_debugger_holds_a_clone(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """Which stops once more before it ends: the others end all the same."""
    pid = listening(run, victims)
    with store.snapshot(pid, name="x") as snapshot, snapshot.pool(3) as pool:
        assert pool.wait_until_full(60)
        held, *others = sorted(pool._parked, key=lambda clone: clone.pid)
        assert _core.lib.lr_seize(held.pid, _core.lib.PTRACE_O_TRACEEXIT) == 0
        os.kill(snapshot._connect().pids()[0], signal.SIGKILL)
        until(lambda: all(clone.process.poll() is not None for clone in others), "the end of the others")
        end_of_tracee(held.pid)
    assert set(victims.marked()) == {pid}


def test_pager_killed_before_it_accepts(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """Who waits in its queue may be the tracer of a process that its keeper ends, and hears of it all the same."""
    pid = listening(run, victims)
    with store.snapshot(pid, name="x") as snapshot, snapshot.pool(1) as pool:
        assert pool.wait_until_full(60)
        held = pool._parked[0]
        assert _core.lib.lr_seize(held.pid, _core.lib.PTRACE_O_TRACEEXIT) == 0
        pager, _ = snapshot._connect().pids()
        os.kill(pager, signal.SIGSTOP)
        until(lambda: state(pager)["State"][0] == "T", "a stopped pager")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as queued:
            queued.settimeout(60)
            queued.connect(launch.socket_path(snapshot._image.key))
            os.kill(pager, signal.SIGKILL)
            try:
                assert queued.recv(1) == b""
            finally:
                end_of_tracee(held.pid)
        with pool.take(60) as clone:
            assert ask(clone) == f"1 {pid}"
    assert set(victims.marked()) == {pid}


def test_pager_killed_while_it_is_asked_for_its_working_set(
    run: Path, victims: Victims, store: lazyrestore.Store
) -> None:
    """What was sent and never read makes the end of a connection an error (unix(7), ECONNRESET), and no end of file."""
    victim = reporter(run, victims)
    with store.snapshot(victim.pid, name="x") as snapshot, snapshot.restore(new_pid=True) as process:
        client = snapshot._connect()
        helpers = client.pids()
        for helper in helpers:
            os.kill(helper, signal.SIGSTOP)
            until(lambda helper=helper: state(helper)["State"][0] == "T", "a stopped helper")  # type: ignore[misc]
        process.kill()
        answers: list[bytes] = []
        asker = threading.Thread(target=lambda: answers.append(client.filled_working_set()))
        asker.start()
        wait = Path(f"/proc/self/task/{asker.native_id}/wchan")
        until(lambda: "skb_wait" in wait.read_text(), "a thread that waits for the pager")
        for helper in reversed(helpers):  # in this order nobody shuts the connection down
            os.kill(helper, signal.SIGKILL)
        asker.join()
        assert answers == [b""]
        with snapshot.pool(1) as pool, pool.take(60) as clone:
            assert report(run, clone.pid)[0] == "1"


def interrupted(step: int, work: Callable[[], object]) -> bool:
    """Do the work, with a Ctrl-C where its `step`-th Python function, counted from 0, begins or ends; False: there are
    fewer."""
    left = step

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal left
        frame.f_trace_lines = False
        if event in ("call", "return"):
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        work()
    except KeyboardInterrupt:
        return True
    except TimeoutError:
        pass
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("timeout", [60, 0])
def test_an_interrupt_anywhere(run: Path, victims: Victims, store: lazyrestore.Store, timeout: float) -> None:
    """Whoever comes next gets a clone, and none is left behind."""
    victim = reporter(run, victims)
    with store.snapshot(victim.pid, name="x") as snapshot:
        with snapshot.pool(1) as pool:
            step = 0
            while interrupted(step, lambda: pool.take(timeout).give_back()):
                in_threads(1, lambda _: pool.take(60).give_back())
                step += 1
            assert step > 10
        assert set(victims.marked()) == {victim.pid}


def test_a_forked_child_has_no_pool(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    pid = listening(run, victims)
    with store.snapshot(pid, name="x") as snapshot, snapshot.pool(2) as pool:
        taken = pool.take()
        assert pool.wait_until_full(60)
        child = os.fork()
        if not child:
            status = 1
            try:
                taken.give_back()
                with pytest.raises(PoolClosed), pool:
                    pool.take(60)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0) == (child, 0)
        assert ask(taken) == f"1 {pid}"
        with pool.take(60) as other:
            assert ask(other) == f"1 {pid}"


def test_who_would_notice_is_not_parked(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    for number, line in enumerate(
        ("signal.signal(signal.SIGCONT, print)", "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCONT})")
    ):
        code = f"import signal, sys; {line}; open(sys.argv[1], 'w').close(); signal.pause()"
        ready = run / f"ready{number}"
        victim = victims.start([sys.executable, "-c", code, ready])
        victim.until(ready.exists, "the victim")
        with (
            store.snapshot(victim.pid, name=f"x{number}") as snapshot,
            pytest.raises(RestoreError, match=r"park.*SIGCONT"),
        ):
            snapshot.pool(1)


def test_children_end_when_a_clone_is_given_back(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    victim = reporter(run, victims)
    with store.snapshot(victim.pid, name="x") as snapshot, snapshot.pool(1) as pool:
        with pool.take() as clone:
            report(run, clone.pid, signal.SIGUSR2)
            namespace = os.stat(f"/proc/{clone.pid}/ns/pid").st_ino
            members = [pid for pid in victims.marked() if os.stat(f"/proc/{pid}/ns/pid").st_ino == namespace]
            assert len(members) == 2
            init = init_of(clone.process)  # type: ignore[arg-type]
        until(lambda: not any(map(alive, [*members, init])), "the end of all in the namespace")
