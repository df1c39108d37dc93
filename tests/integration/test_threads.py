"""64 threads that compute, sleep and wait: neither the original nor the copy may notice anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Builder, Victims, ask, until
from helpers_copies import Copies
from helpers_threads import Threads64

from lazyrestore.kernel.tracee import Frozen

# The threads run on while /proc is read: their pending signals and masks inside ppoll are not still.
MOVING = ("tasks", "status")


@pytest.fixture
def threads(victims: Victims, build: Builder, run: Path) -> Threads64:
    return Threads64(victims, build, run / "threads")


def test_the_original_left_running(threads: Threads64, copies: Copies) -> None:
    for number in range(8):
        copies.snapshot(threads.victim.pid, f"x{number}")
        threads.moved_on(1)
    report = threads.finish()
    assert report.errors == 0, report.messages
    assert threads.victim.process.wait() == 0


def test_threads_that_end_meanwhile(victims: Victims, build: Builder) -> None:
    """One that is just ending cannot be attached to (EPERM); before, some five of 100 freezes failed with that."""
    victim = victims.start([build.c("churn")])
    for _ in range(200):
        with Frozen(victim.pid) as frozen:
            assert frozen.tids[0] == victim.pid
    victim.check()


def test_the_copy(threads: Threads64, copies: Copies) -> None:
    copy = copies.replace(threads.victim, ignore=MOVING)
    threads.process = copy
    threads.moved_on(3)
    report = threads.finish()
    assert report.errors == 0, report.messages
    assert copy.process.wait(60) == 0


def test_copies_of_copies(threads: Threads64, copies: Copies) -> None:
    """Three generations, and then the first snapshot once more."""
    first = copies.snapshot(threads.victim.pid, "g0", kill=True)
    threads.victim.gone()
    copy = copies.restore(first)
    for number in range(1, 3):
        threads.process = copy
        threads.moved_on(1)
        snapshot = copies.snapshot(copy.pid, f"g{number}", kill=True)
        until(lambda: copy.process.poll() is not None, "the end of the copy")  # noqa: B023
        copy = copies.restore(snapshot)
    threads.process = copy
    threads.moved_on()
    copy.kill()
    copy = copies.restore(first)
    threads.process = copy
    threads.moved_on()
    report = threads.finish()
    assert report.errors == 0, report.messages
    assert copy.process.wait(60) == 0


def test_locks_in_memory_that_only_the_kernel_needs(
    run: Path, victims: Victims, copies: Copies, build: Builder
) -> None:
    """A waiter's futex word has not arrived when the kernel reads it again: no wait may fail with EFAULT."""
    victim = victims.start([build.c("farlocks"), run / "control"])
    victim.listens(run / "control")

    def all_wait() -> bool:
        calls = [(task / "syscall").read_text().split()[0] for task in Path(f"/proc/{victim.pid}/task").iterdir()]
        return sorted(calls) == sorted(["43"] + ["202"] * 4)  # accept, futex

    victim.until(all_wait, "four waiting threads")
    copy = copies.replace(victim)
    copy.until(all_wait, "four waiting threads")  # one of the words does not change: who comes after the wake waits on
    assert ask(run / "control", "release") == "ok"
    assert copy.process.wait(60) == 0


def test_what_a_thread_leaves_when_it_ends(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    """Its robust locks and the word at its tid address have not arrived when the kernel writes them."""
    victim = victims.start([build.c("lastwords"), run / "control"])
    victim.listens(run / "control")
    copy = copies.replace(victim)
    assert ask(run / "control", "end") == "owner died, 8 locks; tid 0"
    assert copy.process.wait(60) == 0
    assert any(len(thread.last_words) > 8 for thread in copy.snapshot.manifest.threads)
