"""A function server: each request is answered by a fresh clone of a warm worker, which is thrown away afterwards.

The worker speaks HTTP on a listening socket, as numpy_worker.py does. When the server listens it prints one line:
"ready PORT". It needs uvicorn, the package's extra "examples".

    python examples/numpy_worker.py > worker.log &                          # wait for "ready"
    lazyrestore --store /tmp/store snapshot $! --name worker --kill
    python examples/function_server.py --store /tmp/store --port 8000 worker
    curl localhost:8000                                                     # "served" is 1, however often

No request sees what another one left behind: every one starts from the snapshot's state. A parked clone is handed out
in microseconds, so what a request costs beside its own work is a connection to the clone.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import ExitStack, suppress
from typing import Any

import uvicorn

import lazyrestore
from lazyrestore.fleet.pool import Pool

Headers = list[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HOP_BY_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
MOST_BYTES = 64 << 20  # of a request's body, which is held in memory


class TooLarge(Exception):
    """A request's body is longer than MOST_BYTES."""


class FunctionServer:
    """An ASGI application. https://asgi.readthedocs.io/en/latest/specs/www.html"""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        try:
            status, headers, body = await self._answer(scope, await read_body(receive))
        except TooLarge:
            status, headers, body = 413, [], b"the request is too large\n"
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            status, headers, body = 502, [], f"the worker gave no answer: {error}\n".encode()
        except lazyrestore.LazyrestoreError as error:
            status, headers, body = 503, [], f"no worker: {error}\n".encode()
        headers = [*end_to_end(headers), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope: MutableMapping[str, Any], body: bytes) -> tuple[int, Headers, bytes]:
        """(status, headers, body) from a clone of its own, which has ended when this returns, or is about to."""
        with await self.pool.take_async() as clone:
            reader, writer = await asyncio.open_connection(sock=clone.connect())
            try:
                writer.write(request_head(scope, len(body)) + body)
                await writer.drain()
                return parse(await reader.read())
            finally:
                writer.close()


async def read_body(receive: Receive) -> bytes:
    """All of a request's body. Raises TooLarge."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            raise TooLarge
        if not message.get("more_body"):
            return bytes(body)


def request_head(scope: MutableMapping[str, Any], length: int) -> bytes:
    """HTTP/1.0, so that the worker neither sends chunks nor keeps the connection."""
    target: bytes = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    lines = [scope["method"].encode() + b" " + target + b" HTTP/1.0"]
    lines += [name + b": " + value for name, value in end_to_end(scope["headers"])]
    lines += [b"content-length: " + str(length).encode()] if length else []
    return b"\r\n".join([*lines, b"connection: close", b"", b""])


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers that are not about one connection; the length is set anew."""
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP | {b"content-length"}]


def parse(response: bytes) -> tuple[int, Headers, bytes]:
    """(status, headers, body) of a whole HTTP response. ValueError."""
    head, separator, body = response.partition(b"\r\n\r\n")
    line, *fields = head.split(b"\r\n")
    if not separator or not line.startswith(b"HTTP/"):
        raise ValueError("it ended before its headers did")
    pairs = (field.split(b":", 1) for field in fields)
    return int(line.split()[1]), [(name.lower(), value.strip()) for name, value in pairs], body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="a snapshot of a worker")
    parser.add_argument("--store", metavar="DIR", default="/var/lib/lazyrestore", help="where it is (%(default)s)")
    parser.add_argument("--port", type=int, default=0, help="where to listen; 0 (the default): on a free one")
    parser.add_argument("--pool", metavar="SIZE", type=int, default=8, help="clones that wait (%(default)s)")
    arguments = parser.parse_args()
    try:
        serve(arguments)
    except (lazyrestore.LazyrestoreError, OSError) as error:
        parser.exit(1, f"function_server: {error}\n")


def serve(arguments: argparse.Namespace) -> None:
    """Until Ctrl-C. LazyrestoreError if there is no such snapshot; OSError if the port is taken."""
    with ExitStack() as owned:
        store = owned.enter_context(lazyrestore.Store.open(arguments.store, create=False))
        snapshot = owned.enter_context(store.get(arguments.name))
        pool = owned.enter_context(snapshot.pool(arguments.pool))
        listener = owned.enter_context(socket.create_server(("127.0.0.1", arguments.port)))
        print(f"ready {listener.getsockname()[1]}", flush=True)
        server = uvicorn.Server(uvicorn.Config(FunctionServer(pool), log_level="warning", lifespan="off"))
        with suppress(KeyboardInterrupt):  # uvicorn raises Ctrl-C once more when it has ended
            server.run(sockets=[listener])


if __name__ == "__main__":
    main()
