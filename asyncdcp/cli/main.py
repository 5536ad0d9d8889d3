"""The program ``asyncdcp``: the table of its commands, and how it ends.

Exit statuses are those of ``diff`` and ``cmp``: 0 for yes (whole, equal, done), 1 for no (damaged, different), 2 for
what could not be carried out, with one line on stderr that says why and what to do; 130 after Ctrl-C, and 141,
quietly, where the reader of its output went away (``asyncdcp ls RUN | head``).
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TextIO

import click
from click.shell_completion import CompletionItem

from asyncdcp.cli.output import TROUBLE, ReaderGone
from asyncdcp.cli.text import describe, one_line
from asyncdcp.errors import ThreadPipelineWarning, VolatileStorageWarning

COMMANDS = {
    "ls": "List the checkpoints of a run.",
    "inspect": "Show what a checkpoint holds: tensors, shapes, sizes, values.",
    "history": "Show how the metrics of a run went.",
    "gc": "Show what of a run is of no use, and with --delete take it away.",
    "cat": "Print one tensor or value, or write it to a .npy file.",
    "diff": "Compare two checkpoints: structure, and how far tensors moved.",
    "convert": "Write a checkpoint anew, in this or another format.",
    "verify": "Read every byte of checkpoints and say what is damaged.",
    "report": "Write a run as one HTML page.",
    "completion": "Print the completion script of a shell.",
}
"""Every command and its help, so that ``--help`` imports none. Each is ``commands/<name>.py``'s ``command``."""

_INTERRUPTED = 130
_READER_GONE = 141


class Commands(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"asyncdcp.cli.commands.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in COMMANDS or args[0].startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        near = get_close_matches(args[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see asyncdcp --help"
        raise click.ClickException(f"there is no command {args[0]!r}; {hint}")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return found or super().shell_complete(ctx, incomplete)


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001  # click's signature
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"asyncdcp {version('asyncdcp')}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.pass_context
def program(ctx: click.Context) -> None:
    """Look at checkpoints that asyncdcp saved, check them, and clean up.

    RUN is the folder of a training run, CKPT that of one checkpoint in it.
    """
    if os.environ.get("NO_COLOR"):
        ctx.color = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Of the exceptions only ``SystemExit`` gets out."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before it began (>&-); no file is to get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character gets its number
            stream.reconfigure(errors="backslashreplace")
    status = _run(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = _READER_GONE
        _abandon_output()
    except OSError as error:  # such as a full disk
        status = _complain(error)
        _abandon_output()
    return status


def _run(arguments: Sequence[str] | None) -> int:
    showing, warnings.showwarning = warnings.showwarning, _warn
    try:
        status: Any = program.main(arguments, prog_name="asyncdcp", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return TROUBLE
    except ReaderGone:
        return _READER_GONE
    except (KeyboardInterrupt, click.Abort):
        click.echo("asyncdcp: interrupted", err=True)
        return _INTERRUPTED
    except Exception as error:  # a person at a terminal gets a line, never a traceback
        if os.environ.get("ASYNCDCP_TRACEBACK"):
            raise
        return _complain(error)
    finally:
        warnings.showwarning = showing
    return status if isinstance(status, int) else 0


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings of asyncdcp as one line; those of others are for programmers."""
    if issubclass(category, (ThreadPipelineWarning, VolatileStorageWarning)):
        click.echo(f"asyncdcp: {one_line(str(message))}", err=True)


def _complain(error: Exception) -> int:
    click.echo(f"asyncdcp: {describe(error)}", err=True)
    return TROUBLE


def _abandon_output() -> None:
    """What is left in the buffer goes nowhere, so that the interpreter does not complain when it flushes at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
