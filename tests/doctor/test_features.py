"""The probes notice what is taken away, agree with the kernel's own view, and leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazyrestore.errors import MissingFeature
from lazyrestore.kernel import features, features_lazy, features_process
from lazyrestore.kernel.features_record import Probe, Result, Untried, attempt

DENIED = Path(__file__).with_name("denied.py")

# _IOWR(type, number, size) of the ioctls: UFFDIO_* has type 0xAA, PAGEMAP_SCAN 'f'.
CONTINUE, ZEROPAGE, POISON, PAGEMAP_SCAN = 0xC020AA07, 0xC020AA04, 0xC020AA08, 0xC0606610
PTRACE_GETREGSET = 0x4204
IOCTL, PTRACE, KCMP, PIDFD_GETFD, CLONE3, MEMFD_CREATE, EXECVEAT = 16, 101, 312, 438, 435, 319, 322
PRCTL, MREMAP, PRLIMIT64, USERFAULTFD = 157, 25, 302, 323


def doctor_after(**wish: int) -> tuple[int, dict[str, Any]]:
    """Exit status and report of a doctor from whom something was taken: see denied.py."""
    ran = subprocess.run([sys.executable, DENIED, json.dumps(wish)], capture_output=True, text=True, check=False)
    assert not ran.stderr
    return ran.returncode, json.loads(ran.stdout)


def not_working(report: dict[str, Any]) -> set[str]:
    return {feature["name"] for feature in report["features"] if feature["result"] != "works"}


@pytest.fixture(scope="module")
def usual() -> set[str]:
    """What does not work on this machine anyway."""
    return not_working(doctor_after()[1])


@pytest.mark.requires("userfaultfd", "uffd-event-fork")
@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"number": KCMP}, {"kcmp"}),
        ({"number": PIDFD_GETFD}, {"pidfd-getfd", "uffd-event-fork"}),
        ({"number": CLONE3}, {"set-tid", "pid-namespace"}),
        ({"number": EXECVEAT}, {"memfd-exec"}),
        ({"number": PRCTL}, {"mm-map", "exe-link"}),
        ({"number": MREMAP}, {"uffd-event-remap", "vdso-move"}),
        ({"number": PRLIMIT64}, {"prlimit", "sparse-memfd"}),
        ({"number": IOCTL, "argument": 1, "value": PAGEMAP_SCAN}, {"pagemap-scan"}),
        ({"number": IOCTL, "argument": 1, "value": POISON}, {"uffd-poison"}),
        ({"number": IOCTL, "argument": 1, "value": ZEROPAGE}, {"uffd-missing-shmem", "uffd-event-remove"}),
        (
            {"number": IOCTL, "argument": 1, "value": CONTINUE},
            {"uffd-minor-shmem", "uffd-kernel-faults", "uffd-copy-on-write", "uffd-event-remap"},
        ),
        ({"number": PTRACE, "argument": 0, "value": PTRACE_GETREGSET}, {"ptrace", "ptrace-stranger", "xstate"}),
        (
            {"number": PTRACE},
            {"ptrace", "ptrace-stranger", "xstate", "ptrace-rseq", "proc-mem-write", "seccomp-suspend"},
        ),
        ({"file_size": 1 << 40}, {"sparse-memfd"}),
    ],
    ids=str,
)
def test_what_is_taken_away_is_missed(wish: dict[str, int], expected: set[str], usual: set[str]) -> None:
    _, report = doctor_after(**wish)
    # A tracer that is itself under a filter may not suspend another's (ptrace(2), PTRACE_O_SUSPEND_SECCOMP).
    filtered = {"seccomp-suspend"} if "number" in wish else set()
    # Huge pages are tried with CONTINUE only where some are free.
    extra = {"uffd-minor-hugetlb", "uffd-missing-hugetlb"} if wish.get("value") == CONTINUE else set()
    assert expected <= not_working(report)
    assert not_working(report) <= expected | usual | filtered | extra


@pytest.mark.requires("userfaultfd")
def test_a_missing_memfd_is_named_as_the_step() -> None:
    status, report = doctor_after(number=MEMFD_CREATE)
    memfd = next(feature for feature in report["features"] if feature["name"] == "memfd")
    assert (status, report["ok"]) == (MissingFeature.exit_status, False)
    assert memfd["result"] == "missing"
    assert memfd["detail"] == "memfd_create: Function not implemented"
    assert {"memfd-exec", "sparse-memfd", "uffd-minor-shmem"} <= not_working(report)


@pytest.mark.requires("userfaultfd-device", "userfaultfd", "uffd-event-fork")
def test_the_device_stands_in_for_the_call(usual: set[str]) -> None:
    _, report = doctor_after(number=USERFAULTFD)
    works = {feature["name"] for feature in report["features"]} - not_working(report)
    assert "userfaultfd" not in works
    assert "userfaultfd-device" in works


@pytest.mark.requires("root")
def test_without_privileges() -> None:
    status, report = doctor_after(user=65534)
    missing = {feature["name"]: feature["detail"] for feature in report["features"] if feature["result"] == "missing"}
    assert status == MissingFeature.exit_status
    assert missing["set-tid"] == "clone3 with set_tid: Operation not permitted"
    assert missing["exe-link"] == "PR_SET_MM_MAP: Operation not permitted"
    assert "memfd" not in missing


ALL_AT_ONCE = """
import os
from concurrent.futures import ThreadPoolExecutor
from lazyrestore.kernel import features

def results(_=None):
    return [feature.result for feature in features.try_all()]

def left():
    with open("/proc/self/maps") as maps:
        return sorted(os.listdir("/proc/self/fd")), maps.read().count("lazyrestore-doctor")

expected, before = results(), left()
with ThreadPoolExecutor(4) as pool:
    for found in pool.map(results, range(8)):
        assert found == expected, (found, expected)
assert left() == before, (left(), before)
assert before[1] == 0
try:
    child = os.waitpid(-1, os.WNOHANG | 0x40000000)  # __WALL: also children without an end signal
except ChildProcessError:
    child = None
assert child is None, child
"""


@pytest.mark.requires("userfaultfd", "set-tid")
def test_all_at_once_in_many_threads_and_nothing_is_left() -> None:
    """In a process of its own, in which there are no descriptors and children of others."""
    ran = subprocess.run([sys.executable, "-c", ALL_AT_ONCE], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


MAPPING_AT_ONCE = """
from concurrent.futures import ThreadPoolExecutor
from lazyrestore.kernel import features

names = ["uffd-missing-shmem", "uffd-minor-shmem", "uffd-event-remove", "uffd-event-remap", "uffd-event-unmap"]
with ThreadPoolExecutor(4) as pool:
    for feature in pool.map(features.try_one, names * 4000):
        assert feature.ok, feature
"""


@pytest.mark.requires("userfaultfd", "uffd-event-remap", "uffd-event-unmap")
def test_what_a_probe_unmapped_belongs_to_other_threads() -> None:
    """A probe that unmaps what it gave up takes away what another thread has mapped there by then."""
    ran = subprocess.run([sys.executable, "-c", MAPPING_AT_ONCE], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_vdso_as_its_elf_header_says() -> None:
    start, end = features_process.vdso_range()
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        code = os.pread(memory.fileno(), end - start, start)
    assert code[:4] == b"\x7fELF"
    tail = features_process.vdso_tail()
    assert code[-tail:] == bytes(tail)
    assert code[-tail - 1] != 0


def test_cpu_state_as_the_kernel_lists_it() -> None:
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    state = features_process.cpu_state()
    assert ("AVX" in state) == ("avx" in flags)
    assert ("AVX-512 ZMM_Hi256" in state) == ("avx512f" in flags)
    assert ("PKRU" in state) == ("ospke" in flags)
    assert ("x87" in state) == ("xsave" in flags)


def test_huge_pages_as_meminfo_counts_them() -> None:
    def counted() -> tuple[int, int]:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["Hugepagesize"].split()[0]) * 1024, int(lines["HugePages_Free"]) - int(lines["HugePages_Rsvd"])

    while True:
        size, free = counted()
        found = features_lazy.free_huge_pages()[size]
        if counted() == (size, free):  # else somebody took or freed some meanwhile
            break
    assert found == free


def test_names_are_unique_and_everything_is_said() -> None:
    names = [probe.name for probe in features.PROBES]
    assert len(set(names)) == len(names)
    for probe in features.PROBES:
        assert all((probe.purpose, probe.how, probe.without, probe.advice)), probe.name


def test_results_of_an_attempt() -> None:
    def missing() -> str:
        raise OSError(1, "Operation not permitted", "clone3")

    def untried() -> str:
        raise Untried("none free")

    def probe(run: Any, needed: bool) -> Probe:
        return Probe("x", "purpose", needed, "how", "without", "advice", run)

    assert (attempt(probe(missing, True)).result, attempt(probe(missing, True)).ok) == (Result.MISSING, False)
    assert attempt(probe(missing, False)).ok
    assert attempt(probe(missing, True)).detail == "clone3: Operation not permitted"
    assert (attempt(probe(untried, True)).result, attempt(probe(untried, True)).ok) == (Result.UNTRIED, False)
    assert attempt(probe(lambda: "found", True)).detail == "found"


def test_require_raises_with_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied() -> str:
        raise OSError(1, "Operation not permitted", "clone3")

    probe = Probe("set-tid", "purpose", True, "clone3 with set_tid", "restore", "run as root", denied)
    monkeypatch.setattr(features, "PROBES", (probe,))
    with pytest.raises(
        MissingFeature, match="set-tid: clone3 with set_tid: clone3: Operation not permitted; run as root"
    ):
        features.require("set-tid")
    with pytest.raises(KeyError):
        features.require("no-such-feature")
