"""`fastgrad fmt`: .tfg files in their standard format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from fastgrad_dsl.commands.failures import diagnostics
from fastgrad_dsl.storage.outputs import rewrite
from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from fastgrad_grammar.quote import terminal
from fastgrad_grammar.read import read_source


def fmt(
    files: Annotated[list[Path], Argument(help=".tfg files.", show_default=False, readable=False)],
    check_: Annotated[
        bool, Option("--check", help="Change nothing; fail if a file is not formatted.")
    ] = False,
) -> None:
    """Format .tfg files in place, keeping comments."""
    from fastgrad_grammar.format import format_source

    errors: list[Diagnostic] = []
    unformatted = []
    for file in files:
        try:
            source = read_source(file)
            formatted = format_source(source)
            if formatted.encode() == file.read_bytes():
                continue
            if not check_:
                rewrite(file, formatted)
            unformatted.append(file)
        except (TfgError, OSError) as error:  # the other files are formatted all the same
            errors.extend(diagnostics(error))
    for file in unformatted:
        print(f"{'would format' if check_ else 'formatted'} {terminal(str(file))}")
    if errors:
        raise TfgError(errors)
    if check_ and unformatted:
        raise typer.Exit(2)
