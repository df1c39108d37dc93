"""The story that tools/demo tells, by the command line only: start, warm, snapshot, kill, restore, answer, touch.

Everything it makes is in a temporary directory, which goes when it ends; so do the processes.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAZYRESTORE = ROOT / ".venv" / "bin" / "lazyrestore"
WORKER = ROOT / "examples" / "numpy_worker.py"
WARM_UP = 50  # requests
PR_SET_CHILD_SUBREAPER = 36
CLONES = 3  # restores in all


def say(text: str = "") -> None:
    print(text, flush=True)


def megabytes(count: float) -> str:
    return f"{count / (1 << 20):.0f} MiB"


def lazyrestore(folder: Path, *arguments: str) -> str:
    """Run the command line; returns its standard output. Exits with its message and status if it fails.

    Output goes to a file: a restored process inherits it, and would keep a pipe open.
    """
    say(f"$ lazyrestore {' '.join(arguments)}")
    with open(folder / "output", "w+b") as output:
        command = [str(LAZYRESTORE), "--store", str(folder / "store"), *arguments]
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, check=False).returncode
        output.seek(0)
        text = output.read().decode()
    if status:
        say(text)
        sys.exit(status)
    return text


def get(port: int, path: str) -> tuple[dict[str, Any], float]:
    """The worker's answer, and how long it took in ms."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer, (time.perf_counter() - began) * 1e3


def resident(pid: int) -> int:
    """Bytes of memory that the process holds for itself or shares (Rss in /proc/PID/smaps_rollup)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no Rss in /proc/{pid}/smaps_rollup")


@contextmanager
def worker() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The worker and its port, once it listens."""
    process = subprocess.Popen(
        [sys.executable, WORKER], cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline().split()
        if not ready:
            sys.exit(f"the worker did not start: exit status {process.wait()}")
        yield process, int(ready[1])
    finally:
        process.kill()
        process.wait()


@contextmanager
def restored(folder: Path) -> Iterator[tuple[int, float]]:
    """A restored worker: its process id, and the ms from the call to the running process. It is killed in the end."""
    report = json.loads(lazyrestore(folder, "restore", "worker", "--detach", "--json"))
    try:
        yield report["pid"], report["restore_ms"]
    finally:
        os.kill(report["pid"], signal.SIGKILL)
        os.waitpid(report["pid"], 0)  # until then its process id is in use


def adopt_orphans() -> None:
    """Become the parent of detached processes (prctl(2), PR_SET_CHILD_SUBREAPER), to be able to wait for their end."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def expect(condition: bool, what: str) -> None:
    if not condition:
        sys.exit(f"demo: {what}")


def main() -> None:
    adopt_orphans()
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="lazyrestore-demo-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)

        say("A Python worker with numpy and a data set, behind an HTTP server with threads:")
        began = time.perf_counter()
        process, port = stack.enter_context(worker())
        before, _ = get(port, "/")
        cold_ms = (time.perf_counter() - began) * 1e3
        for _ in range(WARM_UP):
            before, warm_ms = get(port, "/")
        everything, _ = get(port, "/touch")
        say(f"  process {process.pid}, first answer {cold_ms:.0f} ms after its start, {warm_ms:.1f} ms once warm")
        say(f"  {megabytes(resident(process.pid))} resident; result digest {before['digest']}\n")

        taken = json.loads(lazyrestore(folder, "snapshot", str(process.pid), "--name", "worker", "--kill", "--json"))
        say(f"  {taken['pages']} pages: {megabytes(taken['raw_bytes'])}, stored in {megabytes(taken['stored_bytes'])}")
        say(f"  (ratio {taken['ratio']:.2f}); stopped for {taken['pause_ms']:.0f} ms, {taken['seconds']:.2f} s in all")
        expect(process.wait() == -signal.SIGKILL, f"the worker ended with {process.returncode}")
        say(f"  process {process.pid} is gone: kill -9\n")

        for clone in range(1, CLONES + 1):
            began = time.perf_counter()
            with restored(folder) as (pid, restore_ms):
                after, first_ms = get(port, "/")
                total_ms = (time.perf_counter() - began) * 1e3
                say(f"  process {pid} runs again after {restore_ms:.1f} ms; it answers {first_ms:.1f} ms later")
                say(f"  ({total_ms:.0f} ms with the command line's own start)")
                expect(after["digest"] == before["digest"], f"a wrong answer: {after} after {before}")
                expect(after["served"] == before["served"] + 2, f"a wrong count: {after} after {before}")
                say(f"  the same result, {after['digest']}; request {after['served']} of its life")
                say(f"  {megabytes(resident(pid))} resident: what it touched\n")
                if clone < CLONES:
                    say("Killed, and once more from the same snapshot:")
                    continue
                touched, touch_ms = get(port, "/touch")
                expect(touched["digest"] == everything["digest"], f"wrong memory: {touched} after {everything}")
                say(f"Its whole data set read in {touch_ms:.0f} ms, digest as before: {touched['digest']}")
                say(f"  {megabytes(resident(pid))} resident\n")
                say(lazyrestore(folder, "stats", str(pid)).rstrip())


if __name__ == "__main__":
    main()
