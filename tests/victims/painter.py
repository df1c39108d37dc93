"""usage: painter.py DIRECTORY [MEGABYTES]: on SIGUSR1 it paints its memory, on SIGUSR2 it tells what it finds.

It paints all of its data, a page at a time, with the inode of its PID namespace, which no other clone has. Either way
it writes DIRECTORY/painter-INODE: a digest of the data as it was before it did anything.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys

PAGE = 4096


def main() -> None:
    directory = sys.argv[1]
    data = bytearray(random.Random(7).randbytes(int(sys.argv[2]) << 20 if len(sys.argv) > 2 else 8 << 20))
    waited = {signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    open(f"{directory}/ready", "w").close()
    while True:
        number = signal.sigwait(waited)
        digest = hashlib.blake2b(data).hexdigest()
        inode = os.stat("/proc/self/ns/pid").st_ino
        if number == signal.SIGUSR1:
            page = inode.to_bytes(8, "little") * (PAGE // 8)
            for start in range(0, len(data), PAGE):
                data[start : start + PAGE] = page
        name = f"{directory}/painter-{inode}"
        with open(name + ".part", "w") as report:
            report.write(digest)
        os.rename(name + ".part", name)


if __name__ == "__main__":
    main()
