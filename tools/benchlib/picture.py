"""The run's times to the first response as bars, victim by victim: on the terminal, and with matplotlib in a file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from benchlib.measure import Figure, Report

WIDTH = 60  # characters of the longest bar


def show(report: Report, console: Console) -> None:
    """Bars of the medians, the quickest first; nothing if no response was timed."""
    for victim, figures in _responses(report).items():
        console.print(victim, style="dim")
        longest = max(figure.median for figure in figures.values())
        for contender, figure in figures.items():
            bar = "█" * max(1, round(figure.median / longest * WIDTH))
            console.print(f"{contender:>40} {bar} {figure.median:.3g} ms", highlight=False, soft_wrap=True)


def write(report: Report, path: Path) -> None:
    """The same as a PNG, with minimum and maximum, on a logarithmic axis. Raises ImportError without matplotlib.

    Nothing is written if no response was timed.
    """
    from matplotlib.figure import Figure as Canvas

    responses = _responses(report)
    if not responses:
        return
    rows = [len(figures) for figures in responses.values()]
    canvas = Canvas(figsize=(11, 1 + 0.35 * sum(rows) + 0.7 * len(rows)), layout="constrained")
    panels = canvas.subplots(len(rows), sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (victim, figures) in zip(panels, responses.items(), strict=True):
        medians = [figure.median for figure in figures.values()]
        below = [figure.median - min(figure.values) for figure in figures.values()]
        above = [max(figure.values) - figure.median for figure in figures.values()]
        bars = axes.barh(list(figures), medians, xerr=(below, above), capsize=2)
        axes.bar_label(bars, [f"{median:.3g} ms" for median in medians], padding=4)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_title(victim, fontsize=9)
    panels[-1].set_xlabel("ms to the first response: median, minimum to maximum")
    canvas.suptitle(", ".join(f"{key} {value}" for key, value in report.machine.items()), fontsize=7)
    canvas.savefig(path, dpi=120)


def _responses(report: Report) -> dict[str, dict[str, Figure]]:
    """Victim → contender → its times, the quickest first."""
    found: dict[str, dict[str, Figure]] = {}
    for victim, contenders in report.contenders.items():
        timed = {contender: report.response(victim, contender) for contender in contenders}
        known = {contender: figure for contender, figure in timed.items() if figure}
        found[victim] = dict(sorted(known.items(), key=lambda item: item[1].median))
    return {victim: figures for victim, figures in found.items() if figures}
