"""usage: notifier.py GO: once the file GO exists, it works on its data and says READY=1, as sd_notify does.

Before its work it sends another state; afterwards it waits.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time


def main() -> None:
    data = random.Random(7).randbytes(4 << 20)
    go = sys.argv[1]
    address = os.environ["NOTIFY_SOCKET"].replace("@", "\0")
    print("waits", flush=True)
    while not os.path.exists(go):
        time.sleep(0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(address)
        notify.send(b"STATUS=READY=1 comes later")
        pages = sum(data[::4096])
        notify.send(f"STATUS=all of its pages: {pages}\nREADY=1\n".encode())
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
