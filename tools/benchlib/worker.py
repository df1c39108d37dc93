"""The benchmark's victim: a CPython + numpy HTTP worker with a data set, as a service that is slow to start would be.

usage: worker.py SOCKET [MEGABYTES]        SOCKET: a TCP port on the loopback, or the path of a Unix socket

The benchmark uses a Unix socket: CRIU 4.1.1 cannot dump an Internet socket on Linux 6.16 and later, where getsockopt
refuses SO_PASSCRED on them (kernel commit 7d8d93fdde50; CRIU issue 2718).

It prints one line ("ready") when it listens. GET / answers with a digest that touches a small part of the data set;
GET /all with one of the whole (the oracle of a restore); GET /empty touches none of it; GET /fork is answered by a
forked child, which lives until the caller closes the connection. The data set is computed with a fixed seed, so the
digests are the same in every run.
"""

from __future__ import annotations

import decimal
import email.mime.multipart
import hashlib
import http.server
import json
import multiprocessing.connection
import os
import signal
import socket
import socketserver
import sqlite3
import ssl
import sys
import unicodedata
import xml.etree.ElementTree
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.fft
import numpy.linalg
import numpy.polynomial
import numpy.random

ROWS_TOUCHED = 64
VOCABULARY = 60_000
IMPORTED = (decimal, email.mime.multipart, multiprocessing.connection, sqlite3, ssl, unicodedata, xml.etree.ElementTree)


class DataSet:
    """About `megabytes` MiB of float32 blocks, and a dictionary of words: arrays beside many small objects."""

    def __init__(self, megabytes: int) -> None:
        generator = np.random.Generator(np.random.PCG64(7))
        self.blocks: list[np.ndarray] = []
        for _ in range(megabytes):
            small = generator.integers(0, 1000, size=(1024, 256), dtype=np.int32)
            self.blocks.append(small.astype(np.float32) / np.float32(8))
        self.words = {f"word-{i:06d}": (i, i * 0.5, str(i)) for i in range(VOCABULARY)}

    def part(self) -> str:
        """Digest of one row in each of a few blocks and of a few words."""
        digest = hashlib.sha256()
        for i in range(0, min(ROWS_TOUCHED, len(self.blocks)), 8):
            digest.update((self.blocks[i][i] * 2).tobytes())
        for i in range(0, VOCABULARY, VOCABULARY // ROWS_TOUCHED):
            digest.update(repr(self.words[f"word-{i:06d}"]).encode())
        return digest.hexdigest()

    def whole(self) -> str:
        """Digest of everything."""
        digest = hashlib.sha256()
        for block in self.blocks:
            digest.update(block.tobytes())
        for word, value in self.words.items():
            digest.update(f"{word}{value}".encode())
        return digest.hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    data: DataSet

    def do_GET(self) -> None:
        if self.path == "/fork":
            if os.fork():
                return
            try:
                self.reply(self.data.part())
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.recv(1)
            finally:
                os._exit(0)
        answers: dict[str, Callable[[], str]] = {"/all": self.data.whole, "/empty": str}
        self.reply(answers.get(self.path, self.data.part)())

    def reply(self, digest: str) -> None:
        body = json.dumps({"digest": digest}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(http.server.HTTPServer):
    def __init__(self, address: str) -> None:
        if address.isdigit():
            super().__init__(("127.0.0.1", int(address)), Handler)
        else:
            self.address_family = socket.AF_UNIX
            super().__init__(address, Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind, without the name look-up that http.server makes of an Internet address."""
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, _ = super().get_request()
        return connection, ("client", 0)

    def shutdown_request(self, request: Any) -> None:
        """Only close: a shutdown would end the connection of a forked child too."""
        self.close_request(request)


def main() -> None:
    megabytes = int(sys.argv[2]) if len(sys.argv) > 2 else 70
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    Handler.data = DataSet(megabytes)
    server = Server(sys.argv[1])
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
