"""usage: reporter.py DIRECTORY [MEGABYTES]: on SIGUSR1 it writes DIRECTORY/report-N, N the inode of its PID namespace.

A report is "COUNT DIGEST PID": how many it has written, a digest of all its data, its process id as it sees it. It
writes "ready" when it waits. On SIGTERM it ends with 7, on SIGINT with 8; SIGUSR2 lets an orphan be born.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys


def main() -> None:
    directory = sys.argv[1]
    data = bytearray(random.Random(7).randbytes(int(sys.argv[2]) << 20 if len(sys.argv) > 2 else 8 << 20))
    waited = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    open(f"{directory}/ready", "w").close()
    count = 0
    while True:
        number = signal.sigwait(waited)
        if number in (signal.SIGTERM, signal.SIGINT):
            sys.exit(7 if number == signal.SIGTERM else 8)
        if number == signal.SIGUSR2:
            if os.fork() == 0:
                if os.fork() == 0:
                    while True:
                        signal.pause()
                os._exit(0)
            os.wait()
        count += 1
        name = f"{directory}/report-{os.stat('/proc/self/ns/pid').st_ino}"
        with open(name + ".part", "w") as report:
            report.write(f"{count} {hashlib.blake2b(data).hexdigest()} {os.getpid()}")
        os.rename(name + ".part", name)


if __name__ == "__main__":
    main()
