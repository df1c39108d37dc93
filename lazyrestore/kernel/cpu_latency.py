"""Keeps idle CPUs awake while a process is restored: restorer, new process and pager wake each other some dozen times.

The facts and figures stand in _native/pager/latency.h; the pager goes on with it while the process faults.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

DEVICE = "/dev/cpu_dma_latency"
SWITCH = "LAZYRESTORE_CPU_LATENCY"  # set to "off" in the environment: nothing is asked for
_AWAKE = bytes(4)  # an int32_t: microseconds that waking up may take


def wanted() -> bool:
    """Whether nobody has switched it off."""
    return os.environ.get(SWITCH) != "off"


def request() -> int:
    """An open file: as long as it is, no CPU sleeps. Raises OSError."""
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(device, _AWAKE)
    except BaseException:
        os.close(device)
        raise
    return device


@contextmanager
def awake() -> Iterator[None]:
    """As long as it lasts, if this host has the device, and nobody has switched it off."""
    device = -1
    with suppress(OSError):
        if wanted():
            device = request()
    try:
        yield
    finally:
        if device >= 0:
            os.close(device)
