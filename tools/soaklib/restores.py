"""usage: tools/soak restores [N [SEED]]: N restores through the library; what they leave behind must be nothing.

Threads restore clones at once; of the clones some are asked for a digest of all their memory, some are killed at once,
some while they are still being made; some restores are made to fail, some go through a pool, some through a snapshot
that is opened for just that one. At every checkpoint all clones are ended, and descriptors, threads, mappings,
processes, mounts, files and readers of the store must not be more than they were after the warm-up, nor may memory have
grown.

Exit status: 0 if nothing leaked and no answer was wrong.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "tests"), str(REPO / "tools")]

from helpers import Victims, children_of, in_threads  # noqa: E402
from helpers_fleet import report  # noqa: E402

import lazyrestore  # noqa: E402
from lazyrestore.errors import LazyrestoreError  # noqa: E402
from lazyrestore.fleet.pool import Pool  # noqa: E402
from soaklib.footprint import Footprint, files_in, leaks, lower_counts, mounts, of_process  # noqa: E402

THREADS = 4
WARM_UP = 60  # restores before the first checkpoint: every kind has happened by then
CHECKPOINTS = 10
OWN: dict[str, bool] = {"new_pid": True, "new_net": True}  # the victim listens
PATIENCE = 60.0  # seconds until what is left at a checkpoint is a leak


class Wrong(Exception):
    """A clone answered wrongly, or something is left."""


class FailsInTheMiddle:
    """Stands for a ReadySocket: its mount makes the restore program fail when the process exists already."""

    mounts = (("/does/not/exist", "/does/not/either"),)


class Soak:
    def __init__(self, run: Path, victims: Victims, store: lazyrestore.Store, seed: int) -> None:
        self.run, self.victims, self.store, self.seed = run, victims, store, seed
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.victim = victims.start([sys.executable, REPO / "tools" / "soaklib" / "victim.py", run, "2"])
        self.victim.until((run / "ready").exists, "a ready victim")
        self.digest = report(run, self.victim.pid)[1]
        store.snapshot(self.victim.pid, name="x").close()
        self.snapshot = store.get("x")
        self.kills = 0
        self._count = threading.Lock()

    # -- what a restore goes through -----------------------------------------------------------------------------------

    def restores(self, count: int) -> None:
        """`count` restores from several threads, while another one kills what it meets; returns when all are ended."""
        with self.snapshot.pool(1) as pool:
            self._restores(count, pool)

    def _restores(self, count: int, pool: Pool) -> None:
        left = iter(range(count))

        def work(number: int) -> None:
            generator = random.Random(f"{self.seed} {number} {sum(self.done.values())}")
            kinds: list[tuple[str, Callable[[], None]]] = [
                *[("asked for its digest", self.asked)] * 4,
                *[("killed at once", self.killed)] * 6,
                *[("through a snapshot of its own", self.from_another_snapshot)] * 2,
                ("of a taken process id", self.of_a_taken_pid),
                ("failing in the middle", self.failing),
                ("with a wrong descriptor", self.with_a_wrong_descriptor),
                ("through a pool", lambda: self.through_the(pool)),
            ]
            while True:
                with self._count:
                    if next(left, None) is None:
                        return
                kind, restore = generator.choice(kinds)
                try:
                    restore()
                except LazyrestoreError as error:  # the killer was there
                    with self._count:
                        self.errors[f"{type(error).__name__}: {error.step}: {error.reason}"] += 1
                with self._count:
                    self.done[kind] += 1

        stop = threading.Event()
        killer = threading.Thread(target=self._kill_some, args=(stop,))
        killer.start()
        try:
            in_threads(THREADS, work)
        finally:
            stop.set()
            killer.join()

    def asked(self) -> None:
        process = self.snapshot.restore(**OWN)
        try:
            self._ask(process.pid, process.poll)
        finally:
            process.kill()
            process.wait()

    def killed(self) -> None:
        process = self.snapshot.restore(**OWN)
        process.kill()
        process.wait()

    def from_another_snapshot(self) -> None:
        with self.store.get("x") as snapshot:
            process = snapshot.restore(**OWN)
            process.kill()
            process.wait()
            snapshot.pager_stats()

    def of_a_taken_pid(self) -> None:
        with suppress(lazyrestore.errors.PidTaken):
            self.snapshot.restore()
            raise Wrong("a process id was given twice")

    def failing(self) -> None:
        with suppress(lazyrestore.errors.RestoreError):
            self.snapshot.restore(**OWN, ready=FailsInTheMiddle())  # type: ignore[arg-type]
            raise Wrong("a mount of nothing")

    def with_a_wrong_descriptor(self) -> None:
        with suppress(lazyrestore.errors.RestoreError):
            self.snapshot.restore(**OWN, inherit_fd={77: 0})
            raise Wrong("a descriptor for nothing")

    def through_the(self, pool: Pool) -> None:
        with pool.take() as clone:
            self._ask(clone.pid, clone.process.poll)

    def _ask(self, pid: int, poll: Callable[[], int | None]) -> None:
        """Compare the clone's digest, unless it is killed meanwhile."""
        try:
            path = self.run / f"report-{os.stat(f'/proc/{pid}/ns/pid').st_ino}"
            path.unlink(missing_ok=True)
            os.kill(pid, signal.SIGUSR1)
        except (FileNotFoundError, ProcessLookupError):
            return
        while not path.exists():
            if poll() is not None:
                return
            time.sleep(0.001)
        if path.read_text().split()[1] != self.digest:
            raise Wrong(f"{pid} has another digest")
        path.unlink()

    def _kill_some(self, stop: threading.Event) -> None:
        """Now and then, kill a child of ours, clone or init, whatever it is at."""
        generator = random.Random(self.seed)
        while not stop.wait(generator.expovariate(25)):
            children = [pid for pid in children_of(os.getpid()) if pid != self.victim.pid]
            if children:
                self.kills += _kill_child(generator.choice(children))

    # -- what must be as before ----------------------------------------------------------------------------------------

    def footprints(self) -> dict[str, Footprint]:
        """Of this process, the pager, its keeper and the host, now that all clones are ended."""
        gc.collect()
        for leftover in self.run.glob("report-*"):  # of clones that were killed before it was read
            leftover.unlink()
        pager, keeper = self.snapshot._connect().pids()
        runtime, temporary = Path(os.environ["XDG_RUNTIME_DIR"]), Path(tempfile.gettempdir())
        return {
            "restorer": of_process(os.getpid()),
            "pager": of_process(pager),
            "keeper": of_process(keeper),
            "host": {
                "processes": len(children_of(os.getpid())) + len(set(self.victims.marked())),
                "readers": len(self.store._images._environment._env.readers().splitlines()),
                "mounts": mounts(),
                "files": files_in(runtime, temporary, Path("/dev/shm"), self.run),
            },
        }

    def checkpoint(self, before: dict[str, Footprint]) -> list[str]:
        """The leaks, once nothing changes any more that would mend them."""
        deadline = time.monotonic() + PATIENCE
        while (found := leaks(before, now := self.footprints())) and time.monotonic() < deadline:
            time.sleep(0.1)  # the pager notices the end of a process when it comes to it
        lower_counts(before, now)
        return found


def _kill_child(pid: int) -> bool:
    """Kill it if it is still ours: its number may have gone to somebody else since it was read."""
    with suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            if pid in children_of(os.getpid()):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                return True
        finally:
            os.close(pidfd)
    return False


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # its victims end with it
    warm_up = max(WARM_UP, count // CHECKPOINTS)
    faulthandler.register(signal.SIGQUIT)  # a soak that hangs is asked where
    print(f"soak: {count} restores after {warm_up}, seed {seed}", flush=True)
    with ExitStack() as owned:
        run = Path(owned.enter_context(tempfile.TemporaryDirectory(prefix="lr-", dir="/tmp")))
        for name in ("run", "tmp"):
            (run / name).mkdir(mode=0o700)
        os.environ["XDG_RUNTIME_DIR"], os.environ["TMPDIR"] = str(run / "run"), str(run / "tmp")
        tempfile.tempdir = None
        victims = Victims(run)
        owned.callback(victims.end)
        store = owned.enter_context(lazyrestore.Store.open(run / "store"))
        soak = Soak(run, victims, store, seed)
        owned.callback(soak.snapshot.close)
        soak.restores(warm_up)
        before = soak.footprints()
        show(warm_up, before)
        found: list[str] = []
        for number in range(1, CHECKPOINTS + 1):
            soak.restores(count * number // CHECKPOINTS - count * (number - 1) // CHECKPOINTS)
            found = soak.checkpoint(before)
            show(warm_up + count * number // CHECKPOINTS, soak.footprints())
            if soak.errors.total() > soak.kills * THREADS:  # one that the pool's clone ends reaches all who wait for it
                found.append(f"{soak.errors.total()} restores failed, but only {soak.kills} times something was killed")
            if found:
                break
    for kind, times in [*soak.done.most_common(), *soak.errors.most_common()]:
        print(f"{times:7} {kind}")
    print(f"{soak.kills:7} killed by the way")
    print("\n".join(f"soak: FAILED: {leak}" for leak in found) or "soak: nothing leaked, every answer was right")
    return 1 if found else 0


def show(restored: int, footprints: dict[str, Footprint]) -> None:
    words = [f"{who} " + " ".join(f"{what}={value}" for what, value in f.items()) for who, f in footprints.items()]
    print(f"{restored:7} " + " | ".join(words), flush=True)


if __name__ == "__main__":
    sys.exit(main())
