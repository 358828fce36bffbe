"""`fastgrad import` and `fastgrad export`: checkpoints of Hugging Face's Transformers in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fastgrad_dsl.commands.line.options import path_option


def import_(
    folder: Annotated[
        Path,
        Argument(help="A folder with config.json and model.safetensors.", show_default=False, readable=False),
    ],
    out: Annotated[Path, path_option("The spec to write, a .tfg file.", "--out", "-o")],
    force: Annotated[bool, Option("--force", help="Replace files that have other content.")] = False,
) -> None:
    """Read a checkpoint of Hugging Face's Transformers as a spec, and its weights in a .safetensors file beside it.

    Nothing is fetched, no pickle is read and no code of the folder runs.
    """
    from fastgrad_dsl.commands.checkpoint import run_import

    run_import(folder, out, force=force)


def export(
    where: Annotated[
        Path,
        Argument(
            metavar="DIR_OR_FILE",
            help="An imported .tfg file, or a folder compiled from one.",
            readable=False,
        ),
    ],
    weights: Annotated[Path, path_option("A .safetensors file with the model's weights.", "--weights")],
    out: Annotated[Path, path_option("The folder to write.", "--out", "-o")],
    force: Annotated[bool, Option("--force", help="Replace files that have other content.")] = False,
) -> None:
    """Write weights back as the checkpoint that the model was imported from, in the same layout."""
    from fastgrad_dsl.commands.checkpoint import run_export

    run_export(where, weights, out, force=force)
