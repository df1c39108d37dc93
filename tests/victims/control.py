"""The Unix socket by which a test talks to a Python victim: one line in, the answer out, close."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable


def serve(path: str, answer: Callable[[str], str]) -> None:
    """Answer one request after the other, for ever; `path` appears when the victim is ready."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path + ".new")
    listener.listen(16)
    os.rename(path + ".new", path)
    while True:
        connection, _ = listener.accept()
        with connection:
            request = b""
            while not request.endswith(b"\n"):
                request += connection.recv(4096)
            connection.sendall(answer(request.decode().strip()).encode())
