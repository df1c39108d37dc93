"""`lazyrestore doctor`: what works on this machine, what does not, what that stops, and what to do."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from typing import Any

import click

from lazyrestore.cli import Command
from lazyrestore.commands import say
from lazyrestore.errors import MissingFeature
from lazyrestore.kernel.features import Feature, Result, try_all, usable

NARROWEST = 72  # columns, of which the last, the sentences, gets 31
STYLES = {Result.WORKS: "green", Result.MISSING: "red", Result.UNTRIED: "yellow"}


def as_json(features: list[Feature]) -> dict[str, Any]:
    """The report as plain data: ok, kernel release, and one object per feature with the fields of Feature."""
    return {
        "ok": usable(features),
        "kernel": platform.release(),
        "features": [asdict(feature) for feature in features],
    }


def verdict(features: list[Feature]) -> str:
    """One sentence: whether snapshot and restore will work, and what is missing for them."""
    stopping = [feature.name for feature in features if not feature.ok]
    if stopping:
        return f"snapshot and restore will not work: {', '.join(stopping)}"
    return "snapshot and restore will work"


def print_table(features: list[Feature]) -> None:
    """A table on standard output; for whatever does not work, what stops and what to do."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, NARROWEST) if console.is_terminal else 140
    table = Table(box=None, pad_edge=False)
    for heading in ("feature", "", "result"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it is for, or what is wrong", overflow="fold")
    for feature in features:
        color = STYLES[feature.result] if feature.needed or feature.result is Result.WORKS else "yellow"
        result = f"[{color}]{feature.result}[/{color}]"
        said = f"{feature.purpose} ({feature.detail})" if feature.detail else feature.purpose
        if feature.result is not Result.WORKS:
            said = f"{said}\nstops: {feature.without}\nto do: {feature.advice}"
        table.add_row(feature.name, "needed" if feature.needed else "optional", result, said)
    with console.capture() as drawn:
        console.print(table)
    say("\n".join(line.rstrip() for line in drawn.get().splitlines()))
    console.print(
        f"\n{verdict(features)}", style="green" if usable(features) else "red", highlight=False, soft_wrap=True
    )
    if not usable(features) and os.geteuid() != 0:
        console.print("you are not root: `sudo lazyrestore doctor` tells what works for root", soft_wrap=True)


@click.command("doctor", cls=Command)
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def doctor_command(json_output: bool) -> None:
    """Try every kernel feature and privilege that matters; exit status 0 only if snapshot and restore will work."""
    features = try_all()
    if json_output:
        say(json.dumps(as_json(features), indent=2))
    else:
        print_table(features)
    if not usable(features):
        sys.exit(MissingFeature.exit_status)
