"""usage: reader.py REQUESTS ANSWERS TEXT: for each line through the FIFO one line of the text, read with a buffer."""

# ruff: noqa: SIM115 (open for as long as the process lives)

import os
import sys

requests = open(os.open(sys.argv[1], os.O_RDWR), "rb", buffering=0)
answers = open(sys.argv[2], "a", buffering=1)
text = open(sys.argv[3])
again = os.dup(text.fileno())  # shares the offset
squares = {number: number * number for number in range(20_001)}


def lines():  # type: ignore[no-untyped-def]
    """A generator that is suspended in the middle when the snapshot comes."""
    for line in iter(text.readline, ""):
        word, number = line.split()
        yield f"{word} {number} {squares[int(number)]} {os.lseek(again, 0, os.SEEK_CUR)}"


found = lines()
print("ready", file=answers)
while request := requests.readline():
    print(f"{request.decode().strip()}: {next(found)}", file=answers)
