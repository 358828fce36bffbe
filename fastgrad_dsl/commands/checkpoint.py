"""`fastgrad import` and `fastgrad export`: what they print."""

from __future__ import annotations

from pathlib import Path

from fastgrad_dsl.checkpoints.exporting import export_checkpoint
from fastgrad_dsl.checkpoints.importing import import_checkpoint
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.quote import terminal

TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def run_import(folder: Path, out: Path, *, force: bool) -> None:
    """Import a checkpoint and say what was written."""
    if out.suffix != ".tfg":
        raise TfgError.of("FG416", f"-o {out}: the spec is a .tfg file")
    summary = import_checkpoint(folder, out, force=force)
    types = ", ".join(TYPES[each] for each in summary.dtypes)
    print(f"{summary.title}: {summary.entries:,} weights from {summary.tensors} tensors of {types}")
    if summary.kept:
        written = terminal(summary.outputs.kept.name)
        print(f"{summary.kept} tensors that it does not compute with are kept in {written}")
    names = (summary.outputs.weights.name, summary.outputs.origin.name)
    print(f"written to {terminal(str(out))} ({', '.join(map(terminal, names))})")


def run_export(where: Path, weights: Path, out: Path, *, force: bool) -> None:
    """Export a checkpoint and say so."""
    count = export_checkpoint(where, weights, out, force=force)
    print(f"{count} tensors written to {terminal(str(out))}/")
