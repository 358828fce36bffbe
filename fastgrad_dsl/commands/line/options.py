"""The options that several commands have, and what their texts say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from fastgrad_grammar.diagnostics import TfgError

MANY = 2**31 - 1  # of anything that is made one by one, or is a size
LARGEST_FLOAT = 3.4028234e38
LARGEST = 2**63 - 1  # what PyTorch takes as a seed


def finite(value: float) -> float:
    """A number of an option that float32 can hold: `min` and `max` let nan pass."""
    if not abs(value) <= LARGEST_FLOAT:
        raise typer.BadParameter(f"{value} is not a finite number of 32 bits")
    return value


def positive(value: float) -> float:
    """A number of an option that divides."""
    if not finite(value) > 0:
        raise typer.BadParameter(f"{value} is not above 0")
    return value


def path_option(help_: str, *names: str, metavar: str | None = None) -> Any:
    """An option for a path: one that cannot be read is told by what reads it, as all errors are, not by typer."""
    return Option(*names, help=help_, metavar=metavar, readable=False)


File = Annotated[Path, Argument(help="A .tfg file.", show_default=False, readable=False)]
Model = Annotated[str | None, Option("--model", "-m", help="The model to use, if the file has several.")]
Set = Annotated[
    list[str] | None,
    Option("--set", metavar="NAME=VALUE", help="Override a param; can be repeated."),
]
Include = Annotated[
    list[Path] | None,
    path_option("A folder that `use` may read from; can be repeated.", "--include", "-I", metavar="DIR"),
]
Dim = Annotated[
    list[str] | None,
    Option("--dim", metavar="NAME=SIZE", help="Size of a run-time dim; can be repeated."),
]
PlannedDim = Annotated[
    list[str] | None,
    Option(
        "--dim",
        metavar="NAME=SIZE",
        help="Size of a run-time dim that memory is planned for, in place of its limit; can be repeated.",
    ),
]
Weights = Annotated[Path | None, path_option("A .safetensors file with the model's weights.")]
Seed = Annotated[int, Option(min=0, max=LARGEST, help="Seed of initial weights and random batches.")]
Seq = Annotated[int, Option(min=1, max=MANY, help="Tokens per sequence.")]
Batch = Annotated[int, Option(min=1, max=MANY, help="Sequences per step.")]
Clip = Annotated[float, Option(min=0.0, callback=finite, help="Largest norm of the gradient.")]
Every = Annotated[int, Option(min=1, max=MANY, help="Steps between validations and checkpoints.")]
Wide = Annotated[bool, Option("--wide", help="Show every column of the tables.")]
Tokenizer = Annotated[
    Path | None, path_option("A tokenizer.json; without it, bytes are the tokens.", metavar="FILE")
]
Target = Annotated[
    str, Option(help="torch, cpp (C++ on a CPU), triton (on a GPU) or auto (chooses by device).")
]


def params_of(assignments: list[str] | None) -> dict[str, object]:
    """The params that `--set` names. Raises TfgError FG416."""
    return dict(_split("--set", text) for text in assignments or [])


def sizes_of(assignments: list[str] | None) -> dict[str, int]:
    """The sizes that `--dim` names. Raises TfgError FG416."""
    sizes = {}
    for name, value in (_split("--dim", text) for text in assignments or []):
        if not value.isdecimal() or len(value) > len(str(MANY)) or not 1 <= int(value) <= MANY:
            raise TfgError.of("FG416", f"--dim {name}={value}: a size is a whole number from 1 to {MANY}")
        sizes[name] = int(value)
    return sizes


def check_spec_options(
    where: Path,
    set_: list[str] | None,
    model: str | None,
    include: list[Path] | None,
    target: str = "auto",
) -> None:
    """TfgError FG416 for options of a .tfg file where `where` is a folder, which is compiled already."""
    given = {
        "--set": bool(set_),
        "--model": model is not None,
        "--include": bool(include),
        "--target": target != "auto",
    }
    for option in (option for option, is_given in given.items() if is_given and where.is_dir()):
        said = f"{option} is for a .tfg file, and {where} is a folder that is compiled already"
        raise TfgError.of("FG416", said, f"compile the file again with {option}")


def _split(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        help_ = (f"write {option} {name or 'name'}=value",)
        raise TfgError.of("FG416", f"{option} {text}: expected NAME=VALUE", *help_)
    return name.strip(), value.strip()
