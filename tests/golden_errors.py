"""What the front end says about a `.tfg` text: the source of the golden files, and what the fuzz attacks.

The front end is the parser, elaboration and the passes up to the plan: what `fastgrad check` runs.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.pipeline import run
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import read_source
from fastgrad_grammar.render import render
from fastgrad_grammar.source import Source

ERRORS = Path(__file__).parent / "golden" / "errors"
"""Bad files, NAME.tfg, each beside what is said about it, NAME.out."""

_ARGS = "# args:"


def diagnose(path: Path) -> str:
    """What `fastgrad check NAME` prints on stderr, run in the file's folder so that the bare name is shown.

    The first line of the file may hold options: `# args: --set depth=x --model gpt`.
    """
    with contextlib.chdir(path.parent):
        try:
            front_end(read_source(path.name), _options(path))
        except TfgError as error:
            return render(error.diagnostics)
    return ""


def front_end(source: Source, options: Sequence[str] = ()) -> None:
    """Run all that reads a text: raises TfgError, or nothing."""
    chosen = _parser().parse_args(options)
    params = dict(text.split("=", 1) for text in chosen.set)
    run(elaborate(source, model=chosen.model, params=params), until="plan")


def _options(path: Path) -> list[str]:
    first = path.read_bytes().split(b"\n", 1)[0].decode("utf-8", errors="replace").strip()
    return shlex.split(first.removeprefix(_ARGS)) if first.startswith(_ARGS) else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--model")
    return parser
