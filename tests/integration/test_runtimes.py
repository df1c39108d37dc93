"""Node.js, a JVM and Go: JIT-compiled code, garbage collectors, their threads, timers and event loops."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import VICTIMS, Builder, Victims, http_get, in_threads
from helpers_copies import Copies
from helpers_facts import descriptors

RUNNING = ("mappings", "flags", "tasks", "status")  # their threads allocate, come and go while /proc is read


def lasting(pid: int) -> dict[int, tuple[str, str, str]]:
    """Descriptors without those by which a JVM looks at its cgroup's memory and the like, now and then."""
    return {number: about for number, about in descriptors(pid).items() if not about[0].startswith(("/proc/", "/sys/"))}


@pytest.mark.requires("program:node")
def test_node(run: Path, victims: Victims, copies: Copies) -> None:
    victim = victims.start(["node", VICTIMS / "node_server.js", run / "port"])
    port = victim.until(lambda: int((run / "port").read_text()), "the port")
    expected = [http_get(port, f"/mix?n={n}") for n in range(200)]
    digest = http_get(port, "/digest")
    http_get(port, "/garbage?n=100000")
    http_get(port, "/zip?n=1000")
    http_get(port, "/file")
    ticks, served = int(http_get(port, "/ticks")), int(http_get(port, "/served"))
    victim.quiet()

    copy = copies.replace(victim, ignore=RUNNING)
    assert int(http_get(port, "/served")) == served + 1
    assert http_get(port, "/digest") == digest

    def load(thread: int) -> None:
        for n in range(thread, 200, 8):
            assert http_get(port, f"/mix?n={n}") == expected[n]
        assert http_get(port, "/zip?n=5000") == b"lazy" * 5000
        assert int(http_get(port, "/file")) == len((VICTIMS / "node_server.js").read_text())
        http_get(port, "/garbage?n=300000")
        assert int(http_get(port, "/evaluate?n=1000")) == 499500

    in_threads(8, load)
    assert http_get(port, "/digest") == digest
    copy.until(lambda: int(http_get(port, "/ticks")) > ticks + 5, "timers that go on")
    copy.process.terminate()
    assert copy.process.wait(60) == -15


@pytest.mark.requires("program:javac")
@pytest.mark.parametrize("collector", ["-XX:+UseSerialGC", "-XX:+UseG1GC", "-XX:+UseParallelGC"])
def test_jvm(run: Path, victims: Victims, copies: Copies, build: Builder, collector: str) -> None:
    command: list[str | Path] = ["java", collector, "-Xmx256m", "-cp", build.java("Server"), "Server", run / "port"]
    victim = victims.start(command)
    port = victim.until(lambda: int((run / "port").read_text()), "the port")
    expected = [http_get(port, f"/mix?n={n}") for n in range(200)]
    garbage = http_get(port, "/garbage?n=64")
    digest = http_get(port, "/digest")
    ticks = int(http_get(port, "/ticks"))
    victim.quiet()

    before = lasting(victim.pid)
    copy = copies.replace(victim, ignore=(*RUNNING, "descriptors"))
    assert lasting(copy.pid) == before
    assert http_get(port, "/digest") == digest

    def load(thread: int) -> None:
        for n in range(thread, 200, 8):
            assert http_get(port, f"/mix?n={n}") == expected[n]
            assert n % 5 or http_get(port, f"/thread?n={n}") == expected[n]
        assert http_get(port, "/garbage?n=64") == garbage

    in_threads(8, load)
    assert http_get(port, "/digest") == digest
    copy.until(lambda: int(http_get(port, "/ticks")) > ticks + 5, "a sleeping thread that goes on")
    copy.process.terminate()
    assert copy.process.wait(60) == 143


@pytest.mark.requires("program:go")
def test_go(run: Path, victims: Victims, copies: Copies, build: Builder) -> None:
    victim = victims.start([build.go("goserver"), run / "port"])
    port = victim.until(lambda: int((run / "port").read_text()), "the port")
    expected = [http_get(port, f"/mix?n={n}") for n in range(200)]
    garbage = http_get(port, "/garbage?n=64")
    digest = http_get(port, "/digest")
    ticks, served = int(http_get(port, "/ticks")), int(http_get(port, "/served"))
    victim.quiet()

    copy = copies.replace(victim, ignore=RUNNING)
    assert int(http_get(port, "/served")) == served + 1

    def load(thread: int) -> None:
        for n in range(thread, 200, 8):
            assert http_get(port, f"/mix?n={n}") == expected[n]
        assert http_get(port, "/garbage?n=64") == garbage

    in_threads(8, load)
    assert http_get(port, "/digest") == digest
    copy.until(lambda: int(http_get(port, "/ticks")) > ticks + 5, "a timer that goes on")
    copy.process.terminate()
    assert copy.process.wait(60) == -15
