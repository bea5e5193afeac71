"""The command line: thin. Each command is one file that is imported when it is called.

Exit status: 0 done, 1 a run could not go on, 2 what was asked for cannot be done, 130 interrupted. An error is one line
on standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from distri import __version__
from distri.errors import RunError, UserError

COMMANDS = (
    "plan",
    "run",
    "compare",
    "evaluate",
    "bench",
    "graph",
    "hardware",
    "profile",
    "simulate",
    "validate",
    "calibrate",
)
FAILED, REFUSED, INTERRUPTED = 1, 2, 130


class LazyGroup(click.Group):
    """Subcommands by name; `distri plan` does not import what `distri run` needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's file."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"distri.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="distri")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Draw one high-resolution diffusion image on many devices, and predict what it costs.

    \b
    Examples:
      distri run -o scene.png
      distri plan --gpus 8 --height 2048 --width 2048
      distri compare --gpus 4 --cfg-split off -o side-by-side.png
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        cli.main(
            args=list(arguments) if arguments is not None else None, prog_name="distri", standalone_mode=False
        )
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        return _refuse(error.format_message())
    except UserError as error:
        return _refuse(str(error))
    except RunError as error:
        return _report(str(error), FAILED)
    except (click.Abort, KeyboardInterrupt):
        return _report("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output left, as `head` does; nothing is wrong, but flushing at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return 0


def _refuse(message: str) -> int:
    return _report(message, REFUSED)


def _report(message: str, status: int) -> int:
    print(f"distri: error: {' '.join(message.split())}", file=sys.stderr)
    return status
