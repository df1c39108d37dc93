"""Just enough of a Redis client (RESP2) for the tests."""

from __future__ import annotations

import socket
from types import TracebackType

from helpers import GUARD_SECONDS

Reply = str | int | None | list["Reply"]


class RedisError(Exception):
    """The server's -ERR."""


class Redis:
    """One connection to a Unix socket (a path) or a loopback port (a number)."""

    def __init__(self, where: str | int) -> None:
        if isinstance(where, str):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(GUARD_SECONDS)
            self._socket.connect(where)
        else:
            self._socket = socket.create_connection(("127.0.0.1", where), timeout=GUARD_SECONDS)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Redis:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._socket.close()

    def __call__(self, *words: object) -> Reply:
        parts = [str(word).encode() for word in words]
        request = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self._socket.sendall(request)
        return self._reply()

    def _reply(self) -> Reply:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError(f"cut short: {line!r}")
        kind, rest = line[:1], line[1:-2].decode()
        if kind == b"+":
            return rest
        if kind == b"-":
            raise RedisError(rest)
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == "-1" else self._file.read(int(rest) + 2)[:-2].decode(errors="replace")
        return [self._reply() for _ in range(int(rest))]

    def info(self, section: str) -> dict[str, str]:
        text = self("INFO", section)
        assert isinstance(text, str)
        return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
