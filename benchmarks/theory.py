"""The theorem in numbers: what replacing exp by a polynomial does to a whole model, in float64.

    python -m benchmarks.theory

measures the model below over degrees, depths and lengths and writes docs/theory.json, and from it docs/theory.md and
docs/theory.svg (`benchmarks/theory_page.py`). `--quick` tries it at tiny sizes and prints the page instead.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastgrad_dsl as fg
from benchmarks import theory_page
from benchmarks.running_bound import Shape, running_bound
from benchmarks.settings import ROOT, say
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.models.measure import ModelErrors, Served, measure_errors
from fastgrad_dsl.models.text_data import TextData, load_text
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.training.loop import Options, make_optimiser, training_step

TEXT = ROOT / "examples" / "data" / "emma.txt"
HEADS, GAIN, FAMILY = 4, 1.0, "balanced"
SPEC = """\
use std

dim b
dim n <= 16384

block layer(x: float[b, n, d]) -> float[b, n, d] {{
    x = x + std.attention(std.rms_norm(x); heads = {heads}, qk_dim = 4, causal = true, gain = {gain}, rope = 10000.0)
    x = x + std.swiglu(std.rms_norm(x); hidden = 2 * d)
    return x
}}

model theory(tokens: int[b, n]) -> float[b, n, 256] {{
    weight table: float[256, 64] = normal(std = 0.125)
    x = embedding(table, tokens)
    repeat i in {depth} {{
        x = layer(x) as layers
    }}
    return std.rms_norm(x) @ table.T
}}

objective loss(logits: float[b, n, 256], targets: int[b, n]) = cross_entropy(logits, targets)

budget {{
    at "*" degree = {degree}
}}
"""
TRAINED_STEPS, TRAINED_TOKENS, RATE = 150, 256, 2e-3
RUNNING_DEPTH, RUNNING_EPS = 6, (1e-2, 1e-4, 1e-6, 1e-8, 1e-12)


@dataclass(frozen=True)
class Grid:
    """Each sweep holds the other two fixed. `degrees` at several depths, `depths` and `lengths` at several degrees."""

    degrees: tuple[int, ...] = tuple(range(1, 11))
    degrees_depths: tuple[int, ...] = (1, 6, 24)
    depths: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 20, 24)
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16_384)
    some_degrees: tuple[int, ...] = (2, 4, 6, 8)
    length: int = 1024
    depth: int = 4


QUICK = Grid((1, 2), (1,), (1, 2), (32, 64), (1, 2), 32, 1)


@dataclass(frozen=True)
class Point:
    """One model on one batch. All are relative L2 errors; `gradient` is of all weights' gradients as one vector.

    `output`, `gradient` are measured; `output_estimate`, `gradient_estimate` add up what making one attention exact
    moves; `output_certificates` adds up the proved bounds of the attentions' own outputs, each on its own inputs.
    """

    degree: int
    depth: int
    n: int
    eps: float
    eps_prime: float
    output: float
    gradient: float
    output_estimate: float
    gradient_estimate: float
    output_certificates: float
    gradient_certificates: float


def spec(degree: int, depth: int) -> str:
    """The text of the model."""
    return SPEC.format(heads=HEADS, gain=GAIN, depth=depth, degree=degree)


def measure_point(degree: int, depth: int, n: int, data: TextData, target: str) -> Point:
    """Errors of the model at its initial weights, on a held-out window of n bytes, in float64."""
    compiled = fg.compile(spec(degree, depth), target=target)
    model = compiled.module(seed=0, dtype=torch.float64)
    tokens, following = next(data.validation_batches(n, 1, 1))
    entries = compiled.plan_document["attentions"]
    errors = _errors(compiled, model, (tokens,), (following,))
    say(
        f"degree {degree}, depth {depth}, n = {n:,}: output {errors.output:.1e}, gradient {errors.gradient:.1e}"
    )
    return Point(
        degree,
        depth,
        n,
        entries[0]["eps"],
        entries[0]["eps_prime"],
        errors.output,
        errors.gradient,
        errors.output_estimate,
        errors.gradient_estimate,
        sum(attention.local["output"].bound for attention in errors.attentions),
        sum(attention.gradient.bound for attention in errors.attentions),
    )


def _errors(
    compiled: Compiled, model: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> ModelErrors:
    """Measured errors, of every polynomial at any length, with the certificates of real arithmetic."""
    entries = compiled.plan_document["attentions"]
    served = [Served(e["path"], e["eps"], e["eps_prime"], e["scale"]) for e in entries]
    return measure_errors(model, inputs, targets, compiled.loss, served, at_any_length=True)


def points(grid: Grid) -> list[tuple[int, int, int]]:
    """(degree, depth, n) of every point, each once."""
    wanted = [(g, depth, grid.length) for depth in grid.degrees_depths for g in grid.degrees]
    wanted += [(g, depth, grid.length) for g in grid.some_degrees for depth in grid.depths]
    wanted += [(g, grid.depth, n) for g in grid.some_degrees for n in grid.lengths]
    return list(dict.fromkeys(wanted))


def measure_running(data: TextData, target: str, *, quick: bool) -> dict[str, Any]:
    """The rigorous running bound by layer beside the measured error of the output, on briefly trained weights."""
    steps, tokens = (2, 32) if quick else (TRAINED_STEPS, TRAINED_TOKENS)
    compiled = fg.compile(spec(4, RUNNING_DEPTH), target=target)
    model = compiled.module(seed=0)
    loss = _train(compiled, model, data, steps, tokens)
    weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
    batch = next(data.validation_batches(tokens, 1, 1))
    shape = Shape(HEADS, GAIN)
    rows = [
        {"eps": eps, "layers": _finite(running_bound(batch[0][0], weights, RUNNING_DEPTH, shape, eps))}
        for eps in RUNNING_EPS
    ]
    measured = []
    for degree in (2, 4, 6, 8, 10):
        planned = fg.compile(spec(degree, RUNNING_DEPTH), target=target)
        entries = planned.plan_document["attentions"]
        errors = _errors(planned, planned.adopt(model).double(), batch[:1], batch[1:])
        eps = entries[0]["eps"]
        bound = running_bound(batch[0][0], weights, RUNNING_DEPTH, shape, eps)
        measured.append({"degree": degree, "eps": eps, "output": errors.output, "layers": _finite(bound)})
    return {"steps": steps, "tokens": tokens, "loss": loss, "bounds": rows, "measured": measured}


def _train(compiled: Compiled, model: nn.Module, data: TextData, steps: int, tokens: int) -> float:
    assert compiled.loss is not None
    options = Options(steps=steps, tokens=tokens, learning_rate=RATE, seed=0)
    optimiser = make_optimiser(model, options)
    generator = torch.Generator().manual_seed(0)
    loss = math.nan
    for _ in range(steps):
        batch: tuple[Tensor, Tensor] = data.batch(tokens, 4, generator)
        loss, _ = training_step(model, compiled.loss, optimiser, batch, RATE, options)
    return loss


def _finite(values: Iterable[float]) -> list[float | None]:
    """JSON has no infinity."""
    return [value if math.isfinite(value) else None for value in values]


def measure(grid: Grid, target: str, *, quick: bool) -> dict[str, Any]:
    """The document."""
    data = load_text(TEXT, max(grid.lengths))
    found = [asdict(measure_point(*each, data, target)) for each in points(grid)]
    return {
        "command": "python -m benchmarks.theory",
        "torch": torch.__version__,
        "target": target,
        "grid": asdict(grid),
        "points": found,
        "running": measure_running(data, target, quick=quick),
    }


def main() -> None:
    """Measure, and write the three files."""
    parser = argparse.ArgumentParser(description="The theorem in numbers: docs/theory.json, .md and .svg.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; prints the page and writes nothing")
    parser.add_argument("--target", default="auto", help="of the polynomial attention")
    parser.add_argument(
        "--page", action="store_true", help="measure nothing: the page and the plot from the JSON"
    )
    options = parser.parse_args()
    path = ROOT / theory_page.JSON
    if options.page:
        document: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    else:
        document = measure(QUICK if options.quick else Grid(), options.target, quick=options.quick)
    if options.quick:
        print(theory_page.page(document))
        return
    write_atomically(path, json.dumps(document, indent=1) + "\n")
    for name, text in theory_page.render(document).items():
        write_atomically(ROOT / name, text)


if __name__ == "__main__":
    main()
