"""A warm worker: loads a data set into numpy arrays, then answers HTTP requests from many threads.

When it listens it prints one line: "ready PORT".

    /         a small computation on the data set, and its digest
    /touch    reads the whole data set, and answers its digest
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

COLUMNS = 256  # numbers of eight bytes per row


class DataSet:
    """A table of readings, an index that sorts its rows, and a dictionary of names: a few arrays, many objects."""

    def __init__(self, megabytes: int) -> None:
        rows = megabytes * (1 << 20) // (COLUMNS * 8)
        generator = np.random.default_rng(seed=20)
        self.table = generator.normal(size=(rows, COLUMNS)).round(3)
        self.order = np.argsort(self.table.sum(axis=1))
        self.names = {f"sensor-{row}": row for row in range(rows)}

    def result(self) -> list[float]:
        """The means of the eight rows with the greatest sums: a little of the data, in eight places."""
        return [round(float(self.table[row].mean()), 6) for row in self.order[-8:]]

    def digest(self) -> str:
        """Of every byte of the arrays and of every name."""
        whole = hashlib.blake2b(self.table.data, digest_size=8)
        whole.update(self.order.data)
        whole.update("".join(self.names).encode())
        return whole.hexdigest()


class Server(ThreadingHTTPServer):
    """Holds what all requests share."""

    daemon_threads = True

    def __init__(self, port: int, data: DataSet) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.data = data
        self.served = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.served += 1
        if self.path == "/touch":
            answer: dict[str, object] = {"digest": self.server.data.digest(), "bytes": self.server.data.table.nbytes}
        else:
            result = self.server.data.result()
            digest = hashlib.blake2b(repr(result).encode(), digest_size=8).hexdigest()
            answer = {"result": result, "digest": digest, "served": self.server.served}
        body = json.dumps(answer).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="where to listen; 0 (the default): on a free one")
    parser.add_argument("--megabytes", metavar="SIZE", type=int, default=120, help="of the data set (%(default)s)")
    arguments = parser.parse_args()
    with Server(arguments.port, DataSet(arguments.megabytes)) as server:
        print(f"ready {server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
