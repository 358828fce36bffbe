"""The `fastgrad` command. Exit status 0, 2 for an error in the user's input, 1 for a bug.

PyTorch is imported only by the commands that run a model.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer import Option

from fastgrad_dsl import __version__
from fastgrad_dsl.commands.failures import run_command
from fastgrad_dsl.commands.line.advise import advise
from fastgrad_dsl.commands.line.bench import bench
from fastgrad_dsl.commands.line.check import check
from fastgrad_dsl.commands.line.checkpoint import export, import_
from fastgrad_dsl.commands.line.compile import compile_
from fastgrad_dsl.commands.line.convert import convert
from fastgrad_dsl.commands.line.fmt import fmt
from fastgrad_dsl.commands.line.generate import generate
from fastgrad_dsl.commands.line.graph import graph
from fastgrad_dsl.commands.line.heads import heads
from fastgrad_dsl.commands.line.lsp import lsp
from fastgrad_dsl.commands.line.report import report
from fastgrad_dsl.commands.line.stages import stages
from fastgrad_dsl.commands.line.train import train
from fastgrad_dsl.commands.line.tune import tune

app = typer.Typer(
    name="fastgrad",
    help="Compile .tfg models to PyTorch modules with almost-linear attention, and see what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# What a BadParameter is, and what else is wrong with a command line: a class that typer does not export.
USAGE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def _version(asked: bool) -> None:
    if asked:
        print(f"fastgrad {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


_COMMANDS: dict[str, Callable[..., Any]] = {
    "check": check,
    "compile": compile_,
    "advise": advise,
    "stages": stages,
    "graph": graph,
    "report": report,
    "heads": heads,
    "train": train,
    "convert": convert,
    "generate": generate,
    "bench": bench,
    "tune": tune,
    "fmt": fmt,
    "lsp": lsp,
    "import": import_,
    "export": export,
}
for _name, _command in _COMMANDS.items():
    app.command(name=_name)(_command)


SIGNALLED = 128  # and a signal's number: the status of what it stopped
UNREAD = 3.0  # seconds in which an agent that goes on takes a status


def rank_main(arguments: list[str]) -> int:
    """Run a command line as one of several processes; the exit status.

    The agent takes it and ends the process; but where a signal stopped the agent, too, it waits for the process to end.
    """
    sys.argv = ["fastgrad", *arguments]
    try:
        status = run_command(_parse_and_run)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    if status > SIGNALLED:
        leaving = threading.Timer(UNREAD, os._exit, [status])
        leaving.daemon = True
        leaving.start()
    return status


def main() -> None:
    """Run the command line (`failures.py` says what its exit status tells)."""
    sys.exit(run_command(_parse_and_run))


def _parse_and_run() -> int | None:
    """Run a command; a wrong command line is told as typer tells it."""
    if len(sys.argv) == 3 and sys.argv[1] == "check" and not sys.argv[2].startswith("-"):
        # typer would first load pydantic, which takes a third of the time of a check
        check(Path(sys.argv[2]))
        return 0
    try:
        status: int | None = app(prog_name="fastgrad", standalone_mode=False, obj=rank_main)
    except USAGE_ERROR as error:
        error.show()
        return error.exit_code
    return status
