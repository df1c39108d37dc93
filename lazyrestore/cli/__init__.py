"""The command line: `lazyrestore`. Each command lives in a module of its own that is imported when it is called."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from lazyrestore.commands import Misunderstood, complain, default_store, failed, unwritable
from lazyrestore.errors import LazyrestoreError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS = {
    "snapshot": "lazyrestore.cli.snapshot:snapshot_command",
    "restore": "lazyrestore.cli.restore:restore",
    "record": "lazyrestore.cli.record:record_command",
    "ls": "lazyrestore.cli.listing:ls_command",
    "show": "lazyrestore.cli.listing:show_command",
    "rm": "lazyrestore.cli.listing:rm_command",
    "verify": "lazyrestore.cli.listing:verify_command",
    "stats": "lazyrestore.cli.stats:stats_command",
    "doctor": "lazyrestore.cli.doctor:doctor_command",
    "completion": "lazyrestore.cli.completion:completion_command",
}
HELP = {  # so that --help imports no command
    "snapshot": "Snapshot a running process.",
    "restore": "Restore a process; its memory arrives on touch.",
    "record": "Record which memory a process needs first.",
    "ls": "List the snapshots.",
    "show": "Show what a snapshot holds.",
    "rm": "Remove snapshots.",
    "verify": "Check every stored byte of one snapshot or all.",
    "stats": "Show what the pagers count, per restored process.",
    "doctor": "Try every kernel feature and privilege that matters.",
    "completion": "Print the completion script for a shell.",
}


WITHOUT_STORE = {"doctor", "completion"}


def _not_empty(ctx: click.Context, parameter: click.Parameter, store: str | None) -> str | None:
    """`--store "$UNSET"` must not mean the default store: `rm` would remove somebody else's snapshot."""
    if store == "":
        raise click.BadParameter("it is empty; leave the option out for the default store")
    return store


def _choose_store(ctx: click.Context, parameter: click.Parameter, store: str | None) -> None:
    if _not_empty(ctx, parameter, store):
        ctx.obj = store


def _choose_debug(ctx: click.Context, parameter: click.Parameter, debug: bool) -> None:
    if debug:
        ctx.find_root().params["debug"] = True


def _folders(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


DEBUG_HERE = click.Option(
    ["--debug"],
    is_flag=True,
    expose_value=False,
    callback=_choose_debug,
    help="On errors, print the traceback, here or before the command.",
)
STORE_HERE = click.Option(
    ["--store"],
    metavar="DIR",
    expose_value=False,
    callback=_choose_store,
    shell_complete=_folders,
    help="The store, here or before the command.",
)


class Command(click.Command):
    """A command whose words are read with errors that know where they happened."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise
        except BrokenPipeError:
            raise
        except OSError as error:  # --help and --version print from here
            raise unwritable(error) from error


class LazyGroup(Command, click.Group):
    """A group whose commands are imported when they are needed, and whose errors end in one line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        if cmd_name not in WITHOUT_STORE and STORE_HERE not in command.params:
            command.params.append(STORE_HERE)
        if DEBUG_HERE not in command.params:
            command.params.append(DEBUG_HERE)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word not in COMMANDS and not word.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            if near := get_close_matches(word, COMMANDS, 1):
                ctx.fail(f"No such command {word!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(HELP.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            with suppress(OSError):
                complain(ctx.get_help())
            ctx.exit(Misunderstood.exit_status)
        return super().parse_args(ctx, args)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        # click would import shutil, with four compression modules, to ask for the width when it prints help.
        extra.setdefault("terminal_width", help_width())
        with _one_line(None):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> object:
        with _one_line(ctx):
            return super().invoke(ctx)


@contextmanager
def _one_line(ctx: click.Context | None) -> Iterator[None]:
    """Whatever goes wrong ends the command with one line and an exit status, wrong words too: click has four lines."""
    try:
        yield
    except BrokenPipeError:
        raise  # click ends quietly
    except (click.UsageError, LazyrestoreError, OSError, MemoryError, KeyboardInterrupt) as error:
        ours = _misunderstood(error) if isinstance(error, click.UsageError) else error
        raise click.exceptions.Exit(failed(ours, debug=bool(ctx and ctx.params.get("debug")))) from None


def _misunderstood(error: click.UsageError) -> Misunderstood:
    """click's sentences as one, with what it says in lines of their own: which command, and where its help is."""
    text = error.format_message()
    if isinstance(error, click.MissingParameter):  # which lists choices in lines
        text = " ".join(text.split()).replace(". Choose from: ", ": one of ")
    reason, guess, near = re.sub(r"\. \(?(Did you mean .*\?)\)?$", r"\0\1", text).partition("\0")
    ctx = error.ctx
    command = (ctx.info_name or "") if ctx and ctx.parent else ""
    advice = f"{_lower(near)} " if guess else ""
    advice += f"see `{ctx.command_path if ctx else 'lazyrestore'} --help`"
    return Misunderstood(command, "", _lower(reason.rstrip(".")), advice)


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def help_width() -> int:
    """The columns that help texts fill: as click has it, at most 78, at least 50, by $COLUMNS or the terminal."""
    try:
        columns = int(os.environ.get("COLUMNS", ""))
    except ValueError:
        columns = 0
    if columns <= 0:
        try:
            columns = os.get_terminal_size(1).columns
        except OSError:
            columns = 0
    return max(min(columns or 80, 80) - 2, 50)


@click.group(cls=LazyGroup, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--store",
    metavar="DIR",
    envvar="LAZYRESTORE_STORE",
    callback=_not_empty,
    shell_complete=_folders,
    help="The store; default $LAZYRESTORE_STORE, else /var/lib/lazyrestore as root, ~/.local/share/lazyrestore else.",
)
@click.option("--debug", is_flag=True, help="On errors, print the traceback.")
@click.version_option(package_name="lazyrestore", prog_name="lazyrestore")
@click.pass_context
def main(ctx: click.Context, store: str | None, debug: bool) -> None:
    """Snapshot running processes, and restore them lazily, in milliseconds.

    \b
    lazyrestore snapshot 4242 --name worker --kill
    lazyrestore restore worker
    lazyrestore restore worker --detach --json
    """
    ctx.obj = store or default_store()
