"""Descriptors are put where they belong with one spare number, whatever the order in which they were made."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from lazyrestore.program import Descriptors, Program, lib

HIGH = 100


@st.composite
def moves(draw: st.DrawFn) -> dict[int, dict[int, bool]]:
    """Some numbers below 20, each of which is wanted by at most one description that lies under one of them."""
    current = draw(st.lists(st.integers(0, 19), unique=True, max_size=20))
    wanted = draw(st.lists(st.integers(0, 19), unique=True, max_size=20))
    found: dict[int, dict[int, bool]] = {now: {} for now in current}
    for want in wanted if current else ():
        found[draw(st.sampled_from(current))][want] = draw(st.booleans())
    return found


@given(moves())
def test_settle(moves: dict[int, dict[int, bool]]) -> None:
    program = Program()
    ops = program.add_list()
    table = Descriptors(ops, [], HIGH)
    table.used.update(moves)
    table.settle(moves)
    there = {now: (now, True) for now in moves}  # number → (description, close-on-exec): what the kernel would do
    for op in ops.ops:
        first, second, third = (*op.arguments, 0, 0, 0)[:3]
        assert isinstance(first, int) and isinstance(second, int) and isinstance(third, int)
        if op.number == lib.SYS_close:
            del there[first]
        elif op.number == lib.SYS_dup3:
            assert second not in there, "something is overwritten"
            there[second] = there[first][0], bool(third & os.O_CLOEXEC)
        elif second == lib.F_SETFD:
            there[first] = there[first][0], bool(third & lib.FD_CLOEXEC)
        else:
            assert (second, third) == (lib.F_DUPFD_CLOEXEC, HIGH)
            assert HIGH not in there, "a second number above"
            there[HIGH] = there[first][0], True
    assert there == {want: (now, cloexec) for now, wants in moves.items() for want, cloexec in wants.items()}
    assert table.used == set(there)
    assert table.lowest() == min(set(range(HIGH)) - set(there))
