"""Idle CPUs are kept awake while a process faults, and not for longer."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import until
from helpers_pager import CHUNK, Image, Victim

from lazyrestore.kernel import cpu_latency
from lazyrestore.pager import PagerClient

pytestmark = pytest.mark.requires("root", "cpu-latency")

BASE = 0x10_0000_0000
LENGTH = 2 << 20


def microseconds() -> int:
    """How long a wake-up may take now, by all who have asked."""
    with open(cpu_latency.DEVICE, "rb", buffering=0) as device:
        return int.from_bytes(device.read(4), "little")


def has_device(pid: int) -> bool:
    """Whether one of a process's descriptors is the device; the one that lists them is gone by the time it is read."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(entry))
    return cpu_latency.DEVICE in found


def test_awake_while_it_faults_and_asleep_once_it_is_quiet(
    make_image: Callable[..., Image], start: Callable[..., PagerClient], make_victim: Callable[[], Victim]
) -> None:
    usual = microseconds()
    victim = make_victim()
    client = start(make_image())
    victim.clone(client, BASE, LENGTH)
    assert has_device(client.pids()[0])
    seen = set()
    for address in range(BASE, BASE + LENGTH, CHUNK):
        victim.ask("crc", address, 4096)
        seen.add(microseconds())
    assert 0 in seen
    until(lambda: microseconds() == usual, "the request was given back")


def test_it_can_be_switched_off(
    make_image: Callable[..., Image], start: Callable[..., PagerClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu_latency.SWITCH, "off")
    assert not has_device(start(make_image()).pids()[0])
    with cpu_latency.awake():
        assert not has_device(os.getpid())


def test_the_restorer_asks_as_long_as_it_restores() -> None:
    with cpu_latency.awake():
        assert has_device(os.getpid())
        assert microseconds() == 0
    assert not has_device(os.getpid())
