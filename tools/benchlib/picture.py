"""The run's times to the first response as bars: on the terminal, and with matplotlib in a file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from benchlib.measure import Figure, Report

WIDTH = 60  # characters of the longest bar
ENDINGS = ("to response", "first response", "hand-out to response")


def show(report: Report, console: Console) -> None:
    """Bars of the medians, the quickest first; nothing if no response was timed."""
    figures = _responses(report)
    longest = max((figure.median for figure in figures), default=0)
    for figure in figures:
        bar = "█" * max(1, round(figure.median / longest * WIDTH))
        console.print(f"{figure.name:>55} {bar} {figure.median:.3g} ms", highlight=False, soft_wrap=True)


def write(report: Report, path: Path) -> None:
    """The same as a PNG, with minimum and maximum, on a logarithmic axis. Raises ImportError without matplotlib.

    Nothing is written if no response was timed.
    """
    from matplotlib.figure import Figure as Canvas

    figures = _responses(report)
    if not figures:
        return
    canvas = Canvas(figsize=(11, 1 + 0.35 * len(figures)), layout="constrained")
    axes = canvas.subplots()
    medians = [figure.median for figure in figures]
    below = [figure.median - min(figure.values) for figure in figures]
    above = [max(figure.values) - figure.median for figure in figures]
    bars = axes.barh([figure.name for figure in figures], medians, xerr=(below, above), capsize=2)
    axes.bar_label(bars, [f"{median:.3g} ms" for median in medians], padding=4)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("ms to the first response: median, minimum to maximum")
    axes.set_title(", ".join(f"{key} {value}" for key, value in report.machine.items()), fontsize=7)
    canvas.savefig(path, dpi=120)


def _responses(report: Report) -> list[Figure]:
    found = [figure for figure in report.figures.values() if figure.name.endswith(ENDINGS)]
    return sorted(found, key=lambda figure: figure.median)
