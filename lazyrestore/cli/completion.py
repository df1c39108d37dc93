"""`lazyrestore completion`."""

from __future__ import annotations

import click

from lazyrestore.cli import Command, main
from lazyrestore.commands import say


@click.command("completion", cls=Command)
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the completion script for SHELL: bash, zsh or fish.

    \b
    eval "$(lazyrestore completion bash)"
    lazyrestore completion fish > ~/.config/fish/completions/lazyrestore.fish
    """
    from click.shell_completion import get_completion_class

    completion = get_completion_class(shell)
    assert completion is not None
    say(completion(main, {}, "lazyrestore", "_LAZYRESTORE_COMPLETE").source())
