"""Events in every order in which threads can queue them: the maps that come out are the kernel's truth.

A scenario is a string of steps, see window.c: real calls of one thread, so what is true is known. Their events are then
applied in all orders that several threads could have caused: only the events of one call stay in order.
"""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.requires("root")

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "lazyrestore/_native"
EVENTS = {
    "u": 1,
    "h": 1,
    "z": 1,
    "s": 2,
    "d": 2,
    "t": 2,
    "p": 2,
    "e": 2,
    "k": 1,
    "b": 2,
    "f": 1,
}  # a move: REMAP, then UNMAP of its source
X, S, D, E, SIZE = "100000000", "200000000", "300000000", "400000000", "10000"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("window") / "window"
    sources = [
        HERE / "window.c",
        *(NATIVE / "pager" / f"{name}.c" for name in ("window", "apply", "pieces", "interval_map", "uffd", "proc")),
    ]
    flags = ["-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-pthread"]
    subprocess.run(["cc", *flags, "-iquote", NATIVE, *sources, "-o", path], check=True)
    return path


def orders(scenario: str) -> list[str]:
    """All orders in which each call's own events stay in order."""
    owner = [call for call, step in enumerate(scenario) for _ in range(EVENTS[step])]

    def possible(order: tuple[int, ...]) -> bool:
        return all(a < b for i, a in enumerate(order) for b in order[i + 1 :] if owner[a] == owner[b])

    return ["".join(map(str, order)) for order in itertools.permutations(range(len(owner))) if possible(order)]


def run(program: Path, scenario: str, order: str, kernel: str = "new") -> set[str]:
    done = subprocess.run([program, scenario, order, kernel], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


def at(whose: str, address: str, image: str) -> str:
    return f"{whose} {address}+{SIZE} {image}"


@pytest.mark.parametrize("order", orders("us"))
def test_a_move_into_what_was_just_unmapped(program: Path, order: str) -> None:
    assert run(program, "us", order) == {at("self", S, X)}


@pytest.mark.parametrize("kernel", ["new", "old", "none"])
@pytest.mark.parametrize("order", orders("dt"))
def test_a_move_into_what_was_just_moved_away(program: Path, order: str, kernel: str) -> None:
    assert run(program, "dt", order, kernel) == {at("self", D, X), at("self", X, S)}


@pytest.mark.parametrize("kernel", ["new", "old"])
@pytest.mark.parametrize("order", orders("dp"))
def test_a_smaller_move_into_what_was_just_moved_away(program: Path, order: str, kernel: str) -> None:
    rest = f"{int(S, 16) + 0x8000:x}"
    expected = {at("self", D, X), f"self {X}+8000 {S}", f"self {rest}+8000 {rest}"}
    assert run(program, "dp", order, kernel) == expected


@pytest.mark.parametrize("kernel", ["new", "old"])
@pytest.mark.parametrize("order", [o for o in orders("dte") if o.index("2") < o.index("3") < o.index("4")])
def test_and_moved_on_from_there(program: Path, order: str, kernel: str) -> None:
    """By the thread that moved it there, in its next call, while another thread's first move may still be untold."""
    assert run(program, "dte", order, kernel) == {at("self", D, X), at("self", E, S)}


@pytest.mark.parametrize("order", [o for o in orders("zte") if o.index("1") < o.index("2") < o.index("3")])
def test_and_moved_on_from_what_was_just_unmapped(program: Path, order: str) -> None:
    assert run(program, "zte", order) == {at("self", E, S)}


@pytest.mark.parametrize("order", [order for order in orders("db") if order[0] == "0"])
def test_there_and_back_again(program: Path, order: str) -> None:
    """The move back begins only when the first has returned, so its REMAP at least was read."""
    assert run(program, "db", order) == {at("self", X, X), at("self", S, S)}


def test_moved_and_unmapped_by_one_thread(program: Path) -> None:
    """Where the REMAP did come before the UNMAP of its destination: nothing is left there."""
    assert run(program, "usu", "0123") == set()


def knows(scenario: str, order: str) -> bool:
    """Whether the child can know: a call that is first told on the other side of the fork ran beside it."""
    first = {call: sum(EVENTS[step] for step in scenario[:call]) for call in range(len(scenario))}
    fork = scenario.index("f")
    told = {call: order.index(str(event)) for call, event in first.items()}
    return all((told[call] < told[fork]) == (call < fork) for call in told if call != fork)


@pytest.mark.parametrize("scenario", ["uf", "fu"])
@pytest.mark.parametrize("order", orders("uf"))
def test_fork_beside_unmap(program: Path, scenario: str, order: str) -> None:
    lines = run(program, scenario, order)
    assert {line for line in lines if line.startswith("self")} == {at("self", X, X)}
    assert at("child", X, X) in lines
    if knows(scenario, order):
        assert (at("child", S, S) in lines) == (scenario == "fu")


@pytest.mark.parametrize("scenario", ["hf", "fh"])
@pytest.mark.parametrize("order", orders("hf"))
def test_fork_beside_unmap_of_a_part(program: Path, scenario: str, order: str) -> None:
    lines = run(program, scenario, order)
    assert {line for line in lines if line.startswith("self")} == {at("self", X, X), f"self {S}+8000 {S}"}
    assert at("child", X, X) in lines
    if knows(scenario, order):
        size = SIZE if scenario == "fh" else "8000"
        assert f"child {S}+{size} {S}" in lines


@pytest.mark.parametrize(("scenario", "order"), [(s, o) for s in ("df", "fd") for o in orders(s)])
def test_fork_beside_move(program: Path, scenario: str, order: str) -> None:
    lines = run(program, scenario, order)
    assert {line for line in lines if line.startswith("self")} == {at("self", D, X), at("self", S, S)}
    assert at("child", S, S) in lines
    if knows(scenario, order):
        assert at("child", D if scenario == "df" else X, X) in lines


@pytest.mark.parametrize(("scenario", "order"), [(s, o) for s in ("kf", "fk") for o in orders(s)])
def test_fork_beside_dontunmap(program: Path, scenario: str, order: str) -> None:
    """MREMAP_DONTUNMAP leaves empty memory behind, and tells no UNMAP."""
    lines = run(program, scenario, order)
    mine = {at("self", D, X), at("self", X, "zero 0"), at("self", S, S)}
    assert {line for line in lines if line.startswith("self")} == mine
    assert at("child", S, S) in lines
    if knows(scenario, order):
        assert at("child", D if scenario == "kf" else X, X) in lines
        assert (at("child", X, "zero 0") in lines) == (scenario == "kf")
