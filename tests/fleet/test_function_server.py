"""examples/function_server.py: every request meets a fresh worker, and all workers end with the server."""

from __future__ import annotations

import json
import re
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers import VICTIMS, Victims, http_get, in_threads, until

import lazyrestore

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install lazyrestore[examples]")
EXAMPLES = VICTIMS.parent.parent / "examples"


def ready(log: Path) -> int:
    """The port in the line that both examples print."""
    found = re.search(r"^ready (\d+)$", log.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def test_no_request_sees_anothers_state(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    worker = victims.start([sys.executable, EXAMPLES / "numpy_worker.py", "--megabytes", "8"])
    port = worker.until(lambda: ready(worker.log), "the worker")
    warm = json.loads(http_get(port, "/"))
    digest = http_get(port, "/touch")
    worker.quiet()
    store.snapshot(worker.pid, name="worker", kill=True).close()
    worker.gone()
    server = victims.start(
        [sys.executable, EXAMPLES / "function_server.py", "--store", run / "store", "--pool", "3", "worker"],
    )
    front = server.until(lambda: ready(server.log), "the function server")

    def ask(_: int) -> None:
        for _ in range(4):
            assert json.loads(http_get(front, "/")) == {**warm, "served": 3}
            assert http_get(front, "/touch") == digest

    in_threads(6, ask)
    with urllib.request.urlopen(f"http://127.0.0.1:{front}/?a=%20b", timeout=60) as response:
        assert json.loads(response.read())["served"] == 3
    with pytest.raises(
        urllib.error.HTTPError, match="501"
    ):  # the worker's own answer to a method that it does not know
        urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{front}/", b"x" * 100, method="PUT"), timeout=60
        )
    server.process.send_signal(signal.SIGINT)
    server.process.wait(60)
    assert "Traceback" not in server.log.read_text()
    until(lambda: not set(victims.marked()), "the end of all workers")
