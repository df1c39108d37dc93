"""usage: tools/soak storms [MINUTES [SEED]]: threads that move, resize, unmap, drop and fork memory of their own.

Of tests/victims/storm.c, in copies of ever new snapshots, with all mixes of calls, threads and shared memory in turn.
Prints what was wrong, and for each mix how many copies ran and how many of them found a wrong page.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "tests")]

from helpers_storm import ALL_CALLS, GROWTH, storms  # noqa: E402

import lazyrestore  # noqa: E402

COPIES = 10
MIXES = {  # threads (0: only the main one; -1: and others that come and go), calls, % shared, % forks, kinds
    "alone": (0, 1200, 0, 0, ALL_CALLS),
    "alone, shared memory, forks": (0, 1200, 30, 10, ALL_CALLS),
    "threads that come and go": (-1, 1200, 0, 0, ALL_CALLS),
    "one thread": (1, 1200, 0, 0, ALL_CALLS),
    "one thread, shared memory, forks": (1, 1200, 30, 10, ALL_CALLS),
    "4 threads, nothing grows": (4, 1200, 0, 0, ALL_CALLS & ~GROWTH),
    "4 threads, shared memory, forks, nothing grows": (4, 1200, 30, 5, ALL_CALLS & ~GROWTH),
    "4 threads": (4, 1200, 0, 0, ALL_CALLS),
    "8 threads, shared memory": (8, 400, 30, 0, ALL_CALLS),
}


def main() -> int:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    random.seed(int(sys.argv[2]) if len(sys.argv) > 2 else None)
    end = time.monotonic() + 60 * minutes
    counts: dict[str, Counter[int]] = {mix: Counter() for mix in MIXES}
    with tempfile.TemporaryDirectory(prefix="lr-") as folder, lazyrestore.Store.open(f"{folder}/store") as store:
        program, log = Path(folder, "storm"), Path(folder, "log")
        source = REPO / "tests/victims/storm.c"
        subprocess.run(["cc", "-O1", "-pthread", source, "-o", program], check=True)
        while time.monotonic() < end:
            for mix, arguments in MIXES.items():
                for (_, status), times in storms(program, store, log, arguments, COPIES).items():
                    counts[mix][status] += times
        for line in log.read_text().splitlines():
            if line != "ready":
                print(line)
    for mix, statuses in counts.items():
        copies, wrong = statuses.total(), statuses.total() - statuses[0]
        print(f"{mix}: {copies} copies, {wrong} of them wrong {dict(statuses) if wrong else ''}")
    return int(any(set(statuses) - {0} for statuses in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
