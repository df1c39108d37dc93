"""Events in every order in which threads can queue them: the maps that come out are the kernel's truth.

A scenario is a string of steps, see window.c: real calls, one after the other, so what is true is known. Their events
are then applied in all orders that several threads could have caused: only the events of one call stay in order. Where
digits name the threads, the events of each thread do, and the window is told who made a call as it is in the pager.
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
    "l": 1,
    "m": 1,
    "c": 1,
    "r": 1,
    "x": 1,
}  # a move: REMAP, then UNMAP of its source; growth: nothing
X, S, D, E, V, SIZE = "100000000", "200000000", "300000000", "400000000", "500000000", "10000"
W = "ffff0000"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("window") / "window"
    names = ("window", "apply", "callers", "history", "scene", "pieces", "interval_map", "uffd", "proc")
    sources = [HERE / "window.c", *(NATIVE / "pager" / f"{name}.c" for name in names)]
    flags = ["-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-pthread"]
    subprocess.run(["cc", *flags, "-iquote", NATIVE, *sources, "-o", path], check=True)
    return path


def orders(scenario: str) -> list[str]:
    """All orders in which each call's own events, or each thread's, stay in order.

    A thread's next call, and all that happens after it, comes after the reading of its last one's events.
    """
    events: list[tuple[str, int, int]] = []  # owner, call, and the owner's next call
    thread = ""
    owners: list[str] = []
    for call, step in enumerate(scenario):
        thread = step if step.isdigit() else thread
        owners.append("" if step.isdigit() else thread or f"call {call}")
    for call, step in enumerate(scenario):
        if owners[call]:
            later = owners.index(owners[call], call + 1) if owners[call] in owners[call + 1 :] else len(scenario)
            events += [(owners[call], call, later)] * EVENTS.get(step, 0)

    def precedes(a: int, b: int) -> bool:
        return a < b and (events[a][0] == events[b][0] or events[a][2] <= events[b][1])

    def possible(order: tuple[int, ...]) -> bool:
        return not any(precedes(b, a) for i, a in enumerate(order) for b in order[i + 1 :])

    return ["".join(map(str, order)) for order in itertools.permutations(range(len(events))) if possible(order)]


def run(program: Path, scenario: str, order: str, kernel: str = "new") -> set[str]:
    done = subprocess.run([program, scenario, order, kernel], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


def at(whose: str, address: str, image: str) -> str:
    return f"{whose} {address}+{SIZE} {image}"


def live(lines: set[str]) -> set[str]:
    """Without what reads zero, as does what no interval holds."""
    return {line for line in lines if not line.endswith("zero 0")}


def both(scenario: str) -> list[tuple[str, str]]:
    """The scenario with threads that are known, and without, in each of its orders."""
    calls = "".join(step for step in scenario if not step.isdigit())
    return [(which, order) for which in (calls, scenario) for order in orders(scenario)]


@pytest.mark.parametrize(("scenario", "order"), both("1u2s"))
def test_a_move_into_what_was_just_unmapped(program: Path, scenario: str, order: str) -> None:
    assert run(program, scenario, order) == {at("self", S, X)}


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


@pytest.mark.parametrize("order", orders("1d2wc"))
def test_a_move_beside_growth_into_its_place_that_is_unmapped_again(program: Path, order: str) -> None:
    assert live(run(program, "1d2wc", order)) == {at("self", D, X), at("self", S, S), at("self", W, V)}


@pytest.mark.parametrize("order", orders("2dwc1l"))
def test_dontunmap_into_what_another_had_grown_over_and_unmapped(program: Path, order: str) -> None:
    assert live(run(program, "2dwc1l", order)) == {at("self", D, X), at("self", X, S), at("self", W, V)}


@pytest.mark.parametrize("order", orders("1z2wm"))
def test_growth_over_what_was_just_unmapped_that_is_moved(program: Path, order: str) -> None:
    assert live(run(program, "1z2wm", order)) == {at("self", E, V), at("self", S, S)}


@pytest.mark.parametrize("order", orders("1d2tz"))
def test_a_move_into_what_was_just_moved_away_that_is_unmapped(program: Path, order: str) -> None:
    assert live(run(program, "1d2tz", order)) == {at("self", D, X)}


@pytest.mark.parametrize("scenario", ["krg", "1krg"])
def test_moved_shrunk_and_grown_by_one_thread(program: Path, scenario: str) -> None:
    """What was cut off reads zero, though the kernel shows the same part of the file there again."""
    assert live(run(program, scenario, "01")) == {f"self {D}+8000 {X}", at("self", S, S)}


def test_shrunk_by_one_thread_and_grown_and_moved_by_another(program: Path) -> None:
    assert live(run(program, "2x1yd", "012")) == {f"self {D}+8000 {X}", at("self", S, S)}


def knows(scenario: str, order: str) -> bool:
    """Whether the child can know: a call that is first told on the other side of the fork ran beside it."""
    first = {call: sum(EVENTS[step] for step in scenario[:call]) for call in range(len(scenario))}
    fork = scenario.index("f")
    told = {call: order.index(str(event)) for call, event in first.items()}
    return all((told[call] < told[fork]) == (call < fork) for call in told if call != fork)


def check_fork(program: Path, scenario: str, order: str, mine: set[str], before: set[str], after: set[str]) -> None:
    """The child has what was there before the call or after it; which, if it can know. Else it may lose what moved."""
    lines = live(run(program, scenario, order))
    child = {line for line in lines if line.startswith("child")}
    assert lines - child == mine
    if knows(scenario, order):
        assert child == (before if scenario[0] == "f" else after)
    else:
        assert child in (before, after, before & after)


@pytest.mark.parametrize(("scenario", "order"), [(s, o) for s in ("uf", "fu") for o in orders(s)])
def test_fork_beside_unmap(program: Path, scenario: str, order: str) -> None:
    before = {at("child", X, X), at("child", S, S)}
    check_fork(program, scenario, order, {at("self", X, X)}, before, {at("child", X, X)})


@pytest.mark.parametrize(("scenario", "order"), [(s, o) for s in ("hf", "fh") for o in orders(s)])
def test_fork_beside_unmap_of_a_part(program: Path, scenario: str, order: str) -> None:
    before = {at("child", X, X), at("child", S, S)}
    after = {at("child", X, X), f"child {S}+8000 {S}"}
    check_fork(program, scenario, order, {at("self", X, X), f"self {S}+8000 {S}"}, before, after)


@pytest.mark.parametrize(("scenario", "order"), [(s, o) for s in ("df", "fd") for o in orders(s)])
def test_fork_beside_move(program: Path, scenario: str, order: str) -> None:
    before = {at("child", X, X), at("child", S, S)}
    after = {at("child", D, X), at("child", S, S)}
    check_fork(program, scenario, order, {at("self", D, X), at("self", S, S)}, before, after)


@pytest.mark.parametrize(("scenario", "order"), [(s, o) for s in ("kf", "fk") for o in orders(s)])
def test_fork_beside_dontunmap(program: Path, scenario: str, order: str) -> None:
    """MREMAP_DONTUNMAP leaves empty memory behind, and tells no UNMAP."""
    before = {at("child", X, X), at("child", S, S)}
    after = {at("child", D, X), at("child", S, S)}
    check_fork(program, scenario, order, {at("self", D, X), at("self", S, S)}, before, after)
