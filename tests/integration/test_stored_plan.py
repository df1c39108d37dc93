"""The plan that is stored with a snapshot: what would be made of its manifest, or not used.

That it is, byte for byte, what this process would make is looked at for every snapshot that a test takes with `copies`
(helpers_copies.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from helpers import Builder, Victim, Victims, ask
from helpers_copies import Copies

import lazyrestore
from lazyrestore import errors, restore_plan, restore_program, stored_plan
from lazyrestore.store import format

Start = Callable[[], Victim]
OF_ANOTHER_PROCESS = """
import sys, msgspec, lazyrestore
from lazyrestore import stored_plan
from lazyrestore.restore_program import make_plan
with lazyrestore.Store.open(sys.argv[1]) as store, store.get("x") as snapshot:
    stored = stored_plan.usable(snapshot._image.plan, snapshot._image.manifest_sum)
    encode = msgspec.msgpack.encode
    print(stored is not None and encode(stored[1]) == encode(make_plan(snapshot.manifest)))
"""


@pytest.fixture
def start(run: Path, victims: Victims, build: Builder) -> Start:
    """A small program that answers at `control`."""

    def start() -> Victim:
        victim = victims.start([build.c("small", "-lm"), run / "control"], cwd=run)
        victim.listens(run / "control")
        return victim

    return start


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The manifests that plans are made of, one each."""
    manifests: list[object] = []
    make_plan = restore_program.make_plan

    def noted(manifest: object, *arguments: object, **more: object) -> object:
        manifests.append(manifest)
        return make_plan(manifest, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(restore_program, "make_plan", noted)
    return manifests


def taken(start: Start, copies: Copies) -> lazyrestore.Snapshot:
    victim = start()
    snapshot = copies.snapshot(victim.pid, "x", kill=True)
    victim.gone()
    return snapshot


def answers(run: Path, copies: Copies, snapshot: lazyrestore.Snapshot) -> None:
    copy = copies.restore(snapshot)
    assert ask(run / "control", "0") == "1001\n"
    copy.kill()


def test_it_spares_making_one(run: Path, copies: Copies, start: Start, made: list[object]) -> None:
    snapshot = taken(start, copies)
    made.clear()
    for _ in range(2):
        answers(run, copies, snapshot)
    with copies.store.get("x") as again:
        answers(run, copies, again)
        assert not made
        copy = again.restore(new_pid=True)
        assert len(made) == 1  # another program
        copy.kill()
        copy.wait()


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_makes_the_same(run: Path, copies: Copies, start: Start, seed: str) -> None:
    taken(start, copies)
    words = [sys.executable, "-c", OF_ANOTHER_PROCESS, str(run / "store")]
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "True\n", done.stderr


def test_a_store_without_one(run: Path, copies: Copies, start: Start, made: list[object]) -> None:
    """As they were before November 2026."""
    snapshot = taken(start, copies)
    environment = copies.store._images._environment
    environment.update(lambda txn: txn.delete(format.key(format.PLANS, snapshot.id)))
    made.clear()
    with copies.store.get("x") as old:
        assert not old._image.plan
        answers(run, copies, old)
    assert len(made) == 1


def test_it_goes_with_its_snapshot(copies: Copies, start: Start) -> None:
    snapshot = taken(start, copies)
    environment = copies.store._images._environment
    with environment.read() as txn:
        assert environment.keys(txn, format.PLANS) == [snapshot.id]
    snapshot.close()
    copies.store.remove("x")
    with environment.read() as txn:
        assert environment.keys(txn, format.PLANS) == []


def test_damage(copies: Copies, start: Start) -> None:
    image = taken(start, copies)._image
    plan = image.plan
    assert stored_plan.usable(plan, image.manifest_sum)
    step = max(1, len(plan) // 500)
    for at in [*range(64), *range(64, len(plan), step), len(plan) - 1]:
        damaged = bytearray(plan)
        damaged[at] ^= 1 << at % 8
        assert stored_plan.usable(bytes(damaged), image.manifest_sum) is None
    for length in (0, 1, 7, 8, 9, len(plan) // 2, len(plan) - 1):
        assert stored_plan.usable(plan[:length], image.manifest_sum) is None
    assert stored_plan.usable(plan + b"\0", image.manifest_sum) is None


def test_a_damaged_one_is_passed_over(run: Path, copies: Copies, start: Start, made: list[object]) -> None:
    snapshot = taken(start, copies)
    environment = copies.store._images._environment
    damaged = snapshot._image.plan[:-1] + b"\0"
    environment.update(lambda txn: txn.put(format.key(format.PLANS, snapshot.id), damaged))
    made.clear()
    with copies.store.get("x") as opened:
        answers(run, copies, opened)
    assert len(made) == 1


def test_of_another_manifest(copies: Copies, start: Start) -> None:
    image = taken(start, copies)._image
    assert stored_plan.usable(image.plan, image.manifest_sum ^ 1) is None


def test_with_other_settings(run: Path, copies: Copies, start: Start, made: list[object]) -> None:
    """A process gets its own CPUs and priority back, whoever restores it."""
    snapshot = taken(start, copies)
    made.clear()
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, nice + 3)
    try:
        assert stored_plan.usable(snapshot._image.plan, snapshot._image.manifest_sum) is None
        with copies.store.get("x") as opened:
            copy = copies.restore(opened)
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    assert len(made) == 1
    assert os.getpriority(os.PRIO_PROCESS, copy.pid) == nice
    copy.kill()
    made.clear()
    os.setpriority(os.PRIO_PROCESS, 0, nice + 3)
    try:  # an open snapshot, too
        copy = copies.restore(snapshot)
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    assert os.getpriority(os.PRIO_PROCESS, copy.pid) == nice


def test_with_fewer_cpus(copies: Copies, start: Start, made: list[object]) -> None:
    """The plan does not depend on the restorer's CPUs, and a process that could use all of them still can."""
    snapshot = taken(start, copies)
    made.clear()
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(own)})
    try:
        copy = copies.restore(snapshot)
    finally:
        os.sched_setaffinity(0, own)
    assert os.sched_getaffinity(copy.pid) == own
    assert not made


def test_by_other_code(copies: Copies, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    image = taken(start, copies)._image

    def usable() -> bool:
        return stored_plan.usable(image.plan, image.manifest_sum) is not None

    files = stored_plan._files
    assert files is not None
    (path, size, mtime), *others = files
    monkeypatch.setattr(stored_plan, "_files", ((path, size, mtime + 1), *others))
    monkeypatch.setattr(stored_plan, "_code_digest", lambda: b"of other contents")
    assert not usable()
    monkeypatch.undo()
    digest = stored_plan._code_digest()
    monkeypatch.setattr(stored_plan, "_files", ((path, size, mtime + 1), *others))
    monkeypatch.setattr(stored_plan, "_code_digest", lambda: digest)
    assert usable()  # installed elsewhere, or touched
    monkeypatch.setattr(stored_plan, "_files", None)
    assert not usable()  # a package without sources


def test_the_code_is_digested_with_its_contents(tmp_path: Path) -> None:
    """A package that differs in one byte of one file has another digest; its files' times do not matter."""
    package = Path(lazyrestore.__file__).parent
    script = "from lazyrestore import stored_plan as s; print(s._files is not None, s._code_digest().hex())"

    def digest(folder: Path) -> str:
        words = [sys.executable, "-c", script]
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(words, capture_output=True, text=True, env=environment, cwd="/", check=True).stdout

    copy = tmp_path / "lazyrestore"
    subprocess.run(["cp", "-r", package, copy], check=True)
    original = digest(package.parent)
    assert original.startswith("True ")
    assert digest(tmp_path) == original
    changed = copy / "resources" / "pipe.py"
    changed.write_text(changed.read_text() + "#\n")
    assert digest(tmp_path) not in (original, "")
    for source in copy.rglob("*.py"):
        if source.name == "restore_program.py":
            source.unlink()
    assert digest(tmp_path).startswith("False ")


def test_checks_are_made_with_a_stored_one(run: Path, copies: Copies, start: Start, made: list[object]) -> None:
    """What may change between two moments is not part of the plan; messages name the resource."""
    snapshot = taken(start, copies)
    made.clear()
    host = msgspec.structs.replace(snapshot.manifest.host, vdso_hash="0" * 32)
    stored = stored_plan.usable(snapshot._image.plan, snapshot._image.manifest_sum)
    assert stored is not None
    now, plan = stored
    snapshot._stored = now, msgspec.structs.replace(plan, host=host)
    with pytest.raises(errors.KernelMismatch):
        snapshot.restore()
    paths = plan.files.paths.split(b"\0")
    start = next(number for number, path in enumerate(paths) if b"/libm" in path) * restore_plan.SIGNATURE.size
    signatures = bytearray(plan.files.signatures)
    signatures[start] ^= 1
    files = msgspec.structs.replace(plan.files, signatures=bytes(signatures))
    with copies.store.get("x") as other:  # another time of the file, the same build: looked at again, and fine
        other._stored = now, msgspec.structs.replace(plan, files=files)
        answers(run, copies, other)
    assert not made


def test_a_failing_operation_is_named(copies: Copies, start: Start) -> None:
    """A plan has no names; the manifest's program has."""
    snapshot = taken(start, copies)
    stored = stored_plan.usable(snapshot._image.plan, snapshot._image.manifest_sum)
    assert stored is not None
    now, plan = stored
    index = next(
        number
        for number, op in enumerate(restore_program.compile_for(snapshot.manifest)[0].lists[0].ops)
        if op.name == "umask"
    )
    broken = bytearray(plan.compiled.linked.image)
    at = plan.compiled.linked.op_addresses[0] - plan.compiled.linked.base + index * 80
    broken[at : at + 4] = (9999).to_bytes(4, "little")  # no system call
    linked = msgspec.structs.replace(plan.compiled.linked, image=broken)
    compiled = msgspec.structs.replace(plan.compiled, linked=linked)
    snapshot._stored = now, msgspec.structs.replace(plan, compiled=compiled)
    with pytest.raises(errors.RestoreError, match="umask") as caught:
        snapshot.restore()
    assert caught.value.errno == 38  # ENOSYS
