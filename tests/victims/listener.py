"""usage: listener.py DIRECTORY (tcp | tcp6 | unix | epoll): a server that answers each connection.

The answer is a line, "COUNT PID": how many it has answered, its process id as it sees it. A client that sends "stay"
first gets more lines for more words. DIRECTORY/address tells where it listens (a port or a path) and its socket's
number. "epoll": TCP, waiting by epoll with a non-blocking listener, and the same socket under two numbers.
"""

from __future__ import annotations

import os
import select
import socket
import sys


def main() -> None:
    directory, kind = sys.argv[1:]
    if kind == "unix":
        listener = socket.socket(socket.AF_UNIX)
        address = f"{directory}/listener"
        listener.bind(address)
    else:
        listener = socket.socket(socket.AF_INET6 if kind == "tcp6" else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::1" if kind == "tcp6" else "127.0.0.1", 0))
        address = str(listener.getsockname()[1])
    listener.listen(16)
    poller = select.epoll()
    if kind == "epoll":
        os.dup2(listener.fileno(), 40)
        listener.setblocking(False)
        poller.register(listener.fileno(), select.EPOLLIN)
    with open(f"{directory}/address.part", "w") as file:
        file.write(f"{address} {listener.fileno()}")
    os.rename(f"{directory}/address.part", f"{directory}/address")
    count = 0
    while True:
        if kind == "epoll":
            poller.poll()
        connection, _ = listener.accept()
        with connection:
            connection.setblocking(True)
            word = connection.recv(100)
            while True:
                count += 1
                connection.sendall(f"{count} {os.getpid()}\n".encode())
                if word != b"stay" or not connection.recv(100):
                    break


if __name__ == "__main__":
    main()
