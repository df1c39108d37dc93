"""The Unix socket by which a test talks to a Python victim: one line in, the answer out, close."""

from __future__ import annotations

import socket
from collections.abc import Callable


def serve(path: str, answer: Callable[[str], str]) -> None:
    """Answer one request after the other, for ever; the socket listens when the victim is ready."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(16)
    while True:
        connection, _ = listener.accept()
        with connection:
            request = b""
            while not request.endswith(b"\n"):
                request += connection.recv(4096)
            connection.sendall(answer(request.decode().strip()).encode())
