"""usage: tools/soak faults [ROUNDS [CLONES [SEED]]]: many clones fault at once; every thread must wake.

Each round starts a new pager with nothing filled, and CLONES processes (200) that map its template; then 8 threads of
each read all of it, in an order of their own, at once. Some clones are stopped for a while, some are killed, some drop
what they have and read zeros. Every answer is compared with the image. A thread that is still waiting for a page when
all others are done has missed its wake-up: it is shown with what it waits in.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "tests")]

from helpers_pager import CHUNK, Image, Victim, crc_of_pages, pages  # noqa: E402

from lazyrestore.pager.launch import connect_or_start  # noqa: E402

THREADS = 8
BASE = 0x10_0000_0000
CHUNKS = 48  # 3 MiB
PATIENCE = 300.0  # seconds for a round: a guard against waiting for ever


class LostWakeUp(Exception):
    pass


def main() -> int:
    rounds, clones = (int(word) for word in (*sys.argv[1:3], *("20", "200")[len(sys.argv) - 1 :]))
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else random.randrange(1 << 30)
    generator = random.Random(seed)
    print(f"soak: {rounds} rounds of {clones} clones with {THREADS} threads each, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="lr-") as folder:
        for number in range(1, rounds + 1):
            try:
                print(f"round {number}: {_round(Path(folder), number, clones, generator)}", flush=True)
            except (LostWakeUp, AssertionError) as error:
                print(f"soak: FAILED: {error}")
                return 1
    print("soak: every thread woke up, every byte was right")
    return 0


def _round(folder: Path, number: int, count: int, generator: random.Random) -> str:
    """One round; what it was like. Raises LostWakeUp, AssertionError."""
    # Zeros between the chunks, and different chunks each time.
    places = sorted(generator.sample(range(CHUNKS * 4 // 3), CHUNKS))
    chunks = {BASE + place * CHUNK: pages(generator.randrange(1 << 30)) for place in places}
    length = CHUNKS * 4 // 3 * CHUNK
    image = Image(folder / "data", chunks, key=f"soak {os.getpid()} {number}")
    expected = str(crc_of_pages(image.raw(BASE, length)))
    zeros = str(crc_of_pages(bytes(length)))
    runtime = folder / f"run{number}"
    runtime.mkdir(mode=0o700)
    client = connect_or_start(image, runtime_dir=runtime, linger_ms=0)
    victims: list[Victim] = []
    try:
        for _ in range(count):
            victims.append(Victim())
            victims[-1].clone(client, BASE, length, fill=generator.choice(("none", "none", "none", "idle")))
        began = time.monotonic()
        for victim in victims:
            victim.send("walk", THREADS, BASE, length, generator.randrange(1 << 30))
        stopped, killed = _disturb(victims, generator)
        alive = [victim for victim in victims if victim not in killed]
        deadline = began + PATIENCE
        for victim in alive:
            assert _answer(victim, deadline) == [expected] * THREADS, f"{victim.pid} read something else"
        again = generator.sample(alive, len(alive) // 5)
        for victim in again:
            assert victim.ask("dontneed", BASE, length) == "ok"
            victim.send("walk", THREADS, BASE, length, generator.randrange(1 << 30))
        for victim in again:
            assert _answer(victim, deadline) == [zeros] * THREADS, f"{victim.pid} read what it had dropped"
        seconds = time.monotonic() - began
        faults = client.stats().faults
        return f"{faults} faults in {seconds:.1f} s, {stopped} stopped for a while, {len(killed)} killed"
    finally:
        for victim in victims:
            victim.close()
        client.close()
        image.close()


def _disturb(victims: list[Victim], generator: random.Random) -> tuple[int, set[Victim]]:
    """Stop and continue some, and kill some, while they fault; how many were stopped, and who was killed."""
    stopped = generator.sample(victims, len(victims) // 10)
    killed = set(generator.sample(sorted(set(victims) - set(stopped), key=id), len(victims) // 20))
    for victim in stopped:
        os.kill(victim.pid, signal.SIGSTOP)
    for victim in killed:
        time.sleep(generator.expovariate(200))
        victim.process.kill()
    for victim in stopped:
        os.kill(victim.pid, signal.SIGCONT)
    return len(stopped), killed


def _answer(victim: Victim, deadline: float) -> list[str]:
    """The words of the next line. Raises LostWakeUp if it does not come."""
    assert victim.process.stdout
    if not select.select([victim.process.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
        raise LostWakeUp("\n".join([f"{victim.pid} waits:", *_waits(victim.pid)]))
    return victim.process.stdout.readline().split()


def _waits(pid: int) -> list[str]:
    """What its threads wait in."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [f"{task.name} {(task / 'wchan').read_text()} {(task / 'syscall').read_text().strip()}" for task in tasks]


if __name__ == "__main__":
    sys.exit(main())
