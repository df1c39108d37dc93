"""examples/function_server.py: every request meets a fresh worker, and all workers end with the server."""

from __future__ import annotations

import http.client
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


ANSWERS = {  # what a worker sends before it closes the connection, and the status that the front makes of it
    "/nothing": (b"", 502),
    "/half": (b"HTTP/1.0 200 OK\r\nContent-Length: 8\r\n\r\nhalf", 502),
    "/half-a-chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhalf", 502),
    "/no-status": (b"HTTP/1.0\r\n\r\n", 502),
    "/no-number": (b"HTTP/1.0 1000 OK\r\n\r\n", 502),
    "/no-name": (b"HTTP/1.0 200 OK\r\na b: c\r\n\r\n", 502),
    "/other-protocol": (b"HTTP/1.1 101 OK\r\nUpgrade: x\r\n\r\n", 502),
    "/chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", 200),
    "/until-the-end": (b"HTTP/1.0 200 OK\r\n\r\nbody", 200),
}
WORKER = f"""
import socket, time
listener = socket.create_server(("127.0.0.1", 0))
print("ready", listener.getsockname()[1], flush=True)
while True:
    connection, _ = listener.accept()
    with connection:
        path = connection.recv(65536).split()[1].decode()
        while path == "/hangs":
            time.sleep(1)
        connection.sendall({ {path: answer for path, (answer, _) in ANSWERS.items()}!r}[path])
"""


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


def test_answers_that_are_none(run: Path, victims: Victims, store: lazyrestore.Store) -> None:
    """They are told from answers, and cost neither the front nor later requests anything."""
    worker = victims.start([sys.executable, "-c", WORKER])
    worker.until(lambda: ready(worker.log), "the worker")
    worker.quiet()
    store.snapshot(worker.pid, name="worker", kill=True).close()
    worker.gone()
    serve = [sys.executable, EXAMPLES / "function_server.py", "--store", run / "store", "--pool", "2", "worker"]
    server, hasty = victims.start(serve), victims.start([*serve, "--seconds", "0.1"])
    front = server.until(lambda: ready(server.log), "the function server")
    for path, (_, status) in ANSWERS.items():
        found, body = fetch(front, path)
        assert found == status, path
        assert status != 200 or body == b"body", path
    assert fetch(hasty.until(lambda: ready(hasty.log), "a hasty server"), "/hangs")[0] == 504
    for each in (server, hasty):
        each.process.send_signal(signal.SIGINT)
        each.process.wait(60)
        assert "Traceback" not in each.log.read_text()
    until(lambda: not set(victims.marked()), "the end of all workers")


def fetch(port: int, path: str) -> tuple[int, bytes]:
    """(status, body)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
