"""A function server: each request is answered by a fresh clone of a warm worker, which is thrown away afterwards.

The worker speaks HTTP on a listening socket, as numpy_worker.py does. When the server listens it prints one line:
"ready PORT". It needs uvicorn, the package's extra "examples".

    python examples/numpy_worker.py > worker.log &                          # wait for "ready"
    lazyrestore --store /tmp/store snapshot $! --name worker --kill
    python examples/function_server.py --store /tmp/store --port 8000 worker
    curl localhost:8000                                                     # "served" is 1, however often

No request sees what another one left behind: every one starts from the snapshot's state. A parked clone is handed out
in microseconds, so what a request costs beside its own work is a connection to the clone. An answer that is no HTTP, or
not whole, becomes a 502; none within --seconds a 504, and its clone ends.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import ExitStack, suppress
from typing import Any

import h11
import uvicorn

import lazyrestore
from lazyrestore.fleet.pool import Pool

Headers = list[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HOP_BY_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
GRACE = 5  # seconds that requests may still take when the server is to end
MOST_BYTES = 64 << 20  # of a request's body, which is held in memory


class TooLarge(Exception):
    """A request's body is longer than MOST_BYTES."""


class FunctionServer:
    """An ASGI application. https://asgi.readthedocs.io/en/latest/specs/www.html"""

    def __init__(self, pool: Pool, seconds: float) -> None:
        """seconds: that a request may take, with waiting for a clone."""
        self.pool, self.seconds = pool, seconds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        try:
            body = await read_body(receive)
            async with asyncio.timeout(self.seconds):
                status, headers, body = await self._answer(scope, body)
        except TooLarge:
            status, headers, body = 413, [], b"the request is too large\n"
        except h11.LocalProtocolError as error:
            status, headers, body = 400, [], f"no request to hand on: {error}\n".encode()
        except TimeoutError:
            status, headers, body = 504, [], f"the worker gave no answer within {self.seconds} s\n".encode()
        except (OSError, h11.RemoteProtocolError) as error:
            status, headers, body = 502, [], f"the worker gave no answer: {error}\n".encode()
        except lazyrestore.LazyrestoreError as error:
            status, headers, body = 503, [], f"no worker: {error}\n".encode()
        headers = [*end_to_end(headers), *length_of(scope["method"], headers, body)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: MutableMapping[str, Any], body: bytes) -> tuple[int, Headers, bytes]:
        """(status, headers, body) from a clone of its own, which has ended when this returns, or is about to."""
        with await self.pool.take_async() as clone:
            reader, writer = await asyncio.open_connection(sock=clone.connect())
            try:
                return await exchange(reader, writer, request_for(scope, len(body)), body)
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


def request_for(scope: MutableMapping[str, Any], length: int) -> h11.Request:
    """What the worker is asked, on a connection for this one request. h11.LocalProtocolError."""
    target: bytes = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    headers = [*end_to_end(scope["headers"]), (b"connection", b"close")]
    if length:
        headers.append((b"content-length", str(length).encode()))
    if all(name != b"host" for name, _ in headers):  # HTTP/1.0 knows none
        headers.append((b"host", b"localhost"))
    return h11.Request(method=scope["method"], target=target, headers=headers)


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: h11.Request, body: bytes
) -> tuple[int, Headers, bytes]:
    """(status, headers, body) of the whole answer. h11.RemoteProtocolError if it is none, OSError."""
    http = h11.Connection(h11.CLIENT)
    writer.write(b"".join(http.send(event) or b"" for event in (request, h11.Data(data=body), h11.EndOfMessage())))
    await writer.drain()
    status, headers, content = 0, Headers(), bytearray()
    while not isinstance(event := http.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(1 << 16))
        elif isinstance(event, h11.Response):
            status, headers = event.status_code, list(event.headers)
        elif isinstance(event, h11.Data):
            content += event.data
        elif not isinstance(event, h11.InformationalResponse):
            raise h11.RemoteProtocolError("it goes over to another protocol")
    return status, headers, bytes(content)


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers that are not about one connection; the length is set anew."""
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP | {b"content-length"}]


def length_of(method: str, headers: Headers, body: bytes) -> Headers:
    """The content-length to send: of the body, or what it would be of."""
    if method == "HEAD":
        return [(name, value) for name, value in headers if name == b"content-length"]
    return [(b"content-length", str(len(body)).encode())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="a snapshot of a worker")
    parser.add_argument("--store", metavar="DIR", default="/var/lib/lazyrestore", help="where it is (%(default)s)")
    parser.add_argument("--port", type=int, default=0, help="where to listen; 0 (the default): on a free one")
    parser.add_argument("--pool", metavar="SIZE", type=int, default=8, help="clones that wait (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="that a request may take (%(default)s)")
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
        application = FunctionServer(pool, arguments.seconds)
        config = uvicorn.Config(application, log_level="warning", lifespan="off", timeout_graceful_shutdown=GRACE)
        server = uvicorn.Server(config)
        with suppress(KeyboardInterrupt):  # uvicorn raises Ctrl-C once more when it has ended
            server.run(sockets=[listener])


if __name__ == "__main__":
    main()
