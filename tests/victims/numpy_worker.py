"""A warm worker: numpy arrays loaded from files, answered from by a threaded HTTP server.

usage: numpy_worker.py DATA_DIRECTORY PORT_FILE
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np

directory, port_file = Path(sys.argv[1]), Path(sys.argv[2])
ARRAYS = 8
arrays = {name: np.load(directory / f"{name}.npy") for name in map(str, range(ARRAYS))}
mapped = np.load(directory / "0.npy", mmap_mode="r")
generator = np.random.default_rng(7)
table = {f"key{i}": (i, str(i) * 3) for i in range(20_000)}
lock = threading.Lock()
served = 0


def digest() -> str:
    """All arrays, the mapped one, and the Python objects."""
    total = hashlib.blake2b()
    for name in sorted(arrays):
        total.update(arrays[name].tobytes())
    total.update(mapped.tobytes())
    total.update(repr(sorted(table.items())).encode())
    return total.hexdigest()


def compute(seed: int) -> str:
    """A product of two slices: all BLAS threads at work."""
    array = arrays[str(seed % ARRAYS)]
    rows = array[seed % 512 : seed % 512 + 128]
    return hashlib.blake2b(np.ascontiguousarray(rows @ rows.T).tobytes()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        global served
        url = urlsplit(self.path)
        argument = int(parse_qs(url.query).get("n", ["0"])[0])
        with lock:
            served += 1
        if url.path == "/small":
            text = f"{arrays['3'][5, 5]:.17g}"
        elif url.path == "/digest":
            text = digest()
        elif url.path == "/compute":
            text = compute(argument)
        elif url.path == "/random":
            with lock:
                text = " ".join(map(str, generator.integers(0, 1 << 62, argument)))
        elif url.path == "/allocate":
            text = str(int(np.arange(argument, dtype=np.int64).sum()))
        else:
            text = str(served)
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
temporary = port_file.with_suffix(".new")
temporary.write_text(str(server.server_port))
os.rename(temporary, port_file)
server.serve_forever()
