"""What `fastgrad heads` measures and shows: each head of a model with given weights, on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fastgrad_dsl as fg
from fastgrad_dsl.calibration.data import named_batches
from fastgrad_dsl.calibration.heads import DEGREES, HeadForm, HeadFound, Heads, find_heads
from fastgrad_dsl.commands.tables import Column, print_table, say
from fastgrad_dsl.commands.terminal import console
from fastgrad_dsl.models.batches import model_inputs, random_batch, target_inputs
from fastgrad_dsl.models.sizes import batch_sizes
from fastgrad_dsl.report.words import number
from fastgrad_dsl.storage.weights import load_weights

COLUMNS = (
    Column("head", is_number=False),
    Column("least\nlogit"),
    Column("largest\nlogit"),
    Column("entropy"),
    Column("polynomial\nwithin the limit", is_number=False),
    Column("cheapest", is_number=False),
    Column("its error\nmeasured"),
    Column("its time\nestimate"),
)


@dataclass(frozen=True)
class HeadsRequest:
    """What to measure: a spec, its params and model, data as `--calibrate` takes it, weights, and a limit of errors."""

    file: Path
    params: Mapping[str, object]
    model: str | None
    data: str
    weights: Path | None
    dims: Mapping[str, int]
    seed: int
    limit: float
    include: Sequence[Path] = ()


def make_heads(request: HeadsRequest, tell: Callable[[str], None]) -> Heads:
    """The heads of the model; TfgError as compiling, `named_batches` and weights that are not the model's."""
    compiled = fg.compile(
        request.file, params=request.params, model=request.model, target="torch", include=request.include
    )
    model = compiled.module(seed=request.seed)
    if request.weights is not None:
        load_weights(model, request.weights)
    batches, _ = named_batches(compiled, request.data, request.dims, request.seed)
    if batches is None:
        tensors = [*model_inputs(compiled.program), *target_inputs(compiled.program)]
        sizes = batch_sizes(compiled.plan_document, request.dims)
        batches = [random_batch(tensors, sizes, request.seed)]
    return find_heads(compiled, model, batches, request.limit, tell)


def print_heads(heads: Heads) -> None:
    """A row for each head, the groups of each attention, and what the whole model's error is."""
    out = console()
    print_table(out, COLUMNS, [_row(head, heads.limit) for head in heads.heads])
    for path, groups in heads.groups.items():
        parts = [f"{words} for {len(own) or 'all'} heads" for words, own in groups]
        say(out, f"{path}: {', '.join(parts)}")
    shares = ", ".join(f"{heads.share(degree):.0%} with degree {degree}" for degree in DEGREES)
    say(out, f"heads with a polynomial of an error of at most {number(heads.limit)}: {shares}")
    say(
        out,
        f"error of the model's output with its heads apart, measured on the last batch: {number(heads.output)}",
    )


def _row(head: HeadFound, limit: float) -> list[str]:
    best, needed = head.best(limit), head.needed(limit)
    return [
        f"{head.path} {head.head}",
        f"{head.least:.3g}",
        f"{head.largest:.3g}",
        f"{head.entropy:.2f}",
        _needed(needed),
        str(best),
        number(best.error),
        f"{best.time:.2g}",
    ]


def _needed(form: HeadForm | None) -> str:
    if form is None:
        return "none"
    return str(form) if form.affordable else f"{form}, too many"
