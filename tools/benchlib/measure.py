"""What a run has measured: series of values, ratios between them, goals; as a table and as JSON.

A figure is a series of values of one quantity, one value per round; what is reported is its median with minimum and
maximum. Nothing is dropped as an outlier.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from benchlib.usage import Usage

T = TypeVar("T")
RESUMED, RESPONSE = "resumed", "first response"
MEASURES = {RESUMED: "ms", RESPONSE: "ms", "faults": "", "CPU": "ms", "USS": "MB", "PSS": "MB"}


@dataclass
class Figure:
    """The values of one quantity, in the order in which they were measured."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self) -> str:
        return f"{_short(self.median)} ({_short(min(self.values))}–{_short(max(self.values))})"


@dataclass(frozen=True)
class Goal:
    """A limit on one number: at most `limit`, or at least `limit` if `floor`."""

    what: str
    value: float
    limit: float
    unit: str
    floor: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.floor else self.value <= self.limit

    def verdict(self) -> str:
        """The word "met", or by how much it is missed, in per cent of the limit."""
        return "met" if self.met else f"missed by {abs(self.value / self.limit - 1) * 100:.0f} %"


@dataclass
class Report:
    """All figures, goals and notes of one run."""

    machine: dict[str, str]
    figures: dict[str, Figure] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    contenders: dict[str, dict[str, str]] = field(default_factory=dict)  # victim → contender → why not, or empty

    def note(self, text: str) -> None:
        """Append a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def contend(
        self,
        victim: str,
        contender: str,
        resumed_ms: float | None,
        response_ms: float,
        used: Usage,
        others_ms: float = 0,
    ) -> None:
        """One try of a contender: times to resumed and to the first response, what the process had used then, and the
        CPU time of others for it. resumed_ms: None if there is no such moment."""
        self.contenders.setdefault(victim, {}).setdefault(contender, "")
        values = (resumed_ms, response_ms, used.faults, used.cpu_ms + others_ms, used.uss / 1e6, used.pss / 1e6)
        for (measure, unit), value in zip(MEASURES.items(), values, strict=True):
            if value is not None:
                self.add(f"{victim}, {contender}: {measure}", value, unit)

    def contend_not(self, victim: str, contender: str, reason: str) -> None:
        self.contenders.setdefault(victim, {})[contender] = reason

    def add(self, name: str, value: float, unit: str) -> None:
        """Append one value to the figure `name`, which always has the same unit."""
        figure = self.figures.setdefault(name, Figure(name, unit))
        if figure.unit != unit:
            raise ValueError(f"{name} is in {figure.unit}, not in {unit}")
        figure.values.append(value)

    def median(self, name: str) -> float | None:
        """The median of a figure, None if it was not measured."""
        figure = self.figures.get(name)
        return figure.median if figure else None

    def goal(self, what: str, value: float | None, limit: float, unit: str, *, floor: bool = False) -> None:
        """State a goal; one whose value was not measured becomes a note."""
        if value is None:
            self.notes.append(f"not measured: {what}")
        else:
            self.goals.append(Goal(what, value, limit, unit, floor))

    def ratio(self, above: str, below: str) -> float | None:
        """The ratio of two medians, None if one is missing."""
        a, b = self.median(above), self.median(below)
        return None if a is None or not b else a / b

    def response(self, victim: str, contender: str) -> Figure | None:
        """A contender's time to the first response."""
        return self.figures.get(f"{victim}, {contender}: {RESPONSE}")

    def response_ratio(self, victim: str, above: str, below: str) -> float | None:
        """As ratio(), of two contenders' times to the first response."""
        return self.ratio(f"{victim}, {above}: {RESPONSE}", f"{victim}, {below}: {RESPONSE}")

    def comparisons(self) -> Iterator[tuple[str, list[list[str]]]]:
        """Of each victim: name, and a table with a row for each contender below the head."""
        for victim, contenders in self.contenders.items():
            table = [["contender", *(f"{name}, {unit}" if unit else name for name, unit in MEASURES.items())]]
            for contender, reason in contenders.items():
                figures = (self.figures.get(f"{victim}, {contender}: {measure}") for measure in MEASURES)
                cells = [figure.text() if figure else "" for figure in figures]
                table.append([contender, *(cells if not reason else [reason, *cells[1:]])])
            yield victim, table

    def plain_figures(self) -> list[Figure]:
        """Those that are in no comparison."""
        compared = {
            f"{victim}, {contender}: {measure}"
            for victim, contenders in self.contenders.items()
            for contender in contenders
            for measure in MEASURES
        }
        return [figure for name, figure in self.figures.items() if name not in compared]

    def to_json(self) -> str:
        content: dict[str, Any] = {
            "machine": self.machine,
            "figures": {
                f.name: {
                    "unit": f.unit,
                    "median": f.median,
                    "min": min(f.values),
                    "max": max(f.values),
                    "values": f.values,
                }
                for f in self.figures.values()
            },
            "goals": [
                {"what": g.what, "value": g.value, "limit": g.limit, "unit": g.unit, "floor": g.floor, "met": g.met}
                for g in self.goals
            ],
            "notes": self.notes,
        }
        return json.dumps(content, indent=2)

    def write(self, path: Path) -> None:
        path.write_text(self.to_json() + "\n")

    def to_markdown(self) -> str:
        """Tables of the goals and of all figures, for docs/performance.md."""
        lines = [", ".join(f"{key} {value}" for key, value in self.machine.items()), ""]
        lines += ["| goal | value | limit | |", "|---|---|---|---|"]
        for goal in self.goals:
            value, limit = f"{_short(goal.value)} {goal.unit}".strip(), f"{goal.limit:g} {goal.unit}".strip()
            lines.append(f"| {goal.what} | {value} | {'≥' if goal.floor else '≤'} {limit} | {goal.verdict()} |")
        for victim, (head, *rows) in self.comparisons():
            lines += ["", f"| {victim}: {' | '.join(head)} |", "|---" * len(head) + "|"]
            lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", "| figure | median (min–max) | unit | n |", "|---|---|---|---|"]
        lines += [f"| {f.name} | {f.text()} | {f.unit} | {len(f.values)} |" for f in self.plain_figures()]
        lines += ["", *(f"* {note}" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def show(self, console: Console) -> None:
        console.print(", ".join(f"{k} {v}" for k, v in self.machine.items()), style="dim")
        for victim, (head, *rows) in self.comparisons():
            comparison = Table(*head, title=victim)
            for row in rows:
                comparison.add_row(*row)
            console.print(comparison)
        table = Table("figure", "unit", "median (min–max)", "n", title="figures")
        for figure in self.plain_figures():
            table.add_row(figure.name, figure.unit, figure.text(), str(len(figure.values)))
        console.print(table)
        if self.goals:
            goals = Table("goal", "value", "limit", "", title="goals")
            for goal in self.goals:
                sign = "≥" if goal.floor else "≤"
                verdict = f"[green]{goal.verdict()}" if goal.met else f"[red]{goal.verdict()}"
                goals.add_row(
                    goal.what, f"{_short(goal.value)} {goal.unit}", f"{sign} {goal.limit:g} {goal.unit}", verdict
                )
            console.print(goals)
        for note in self.notes:
            console.print(f"note: {note}")


def clock(action: Callable[[], T]) -> tuple[T, float]:
    """The action's result and how long it took, in milliseconds."""
    start = time.perf_counter()
    result = action()
    return result, (time.perf_counter() - start) * 1000


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
