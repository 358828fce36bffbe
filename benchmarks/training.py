"""A training step of examples/bounded.tfg, 6 layers of width 256, against the same model on SDPA.

    python -m benchmarks.training '{"model": "sdpa", "n": 4096, "steps": 1, "threads": 2, "target": "auto"}'

is the process of its own in which each model's time and peak memory are measured.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.settings import ROOT, Settings, heading, say
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.api.compiled import compile as compile_spec
from fastgrad_dsl.bench.memory import peak_of, run_child
from fastgrad_dsl.training.loop import Options, make_optimiser, training_step

SPEC = ROOT / "examples" / "bounded.tfg"
LENGTHS, QUICK_LENGTHS = (4096, 16_384, 65_536), (128, 256)
NEAR_LINE = "        near = near,\n"  # of bounded.tfg; without it no attention has a near field
WARM = 128  # tokens of the step before, which builds what is built once and makes the optimiser's state
LONGEST_EXACT = 16_384

MODELS = {
    "near": "bounded.tfg, compiled",
    "far": "bounded.tfg without its near field, compiled",
    "sdpa": "bounded.tfg without its near field, softmax by SDPA",
    "reference": "bounded.tfg, exact near and far",
}
"""What is trained. PyTorch has no fused kernel for near logits of their own, so SDPA runs the model without them."""


def measure(settings: Settings) -> dict[str, object]:
    """The section `training` of the JSON. The processes take turns, so that none has the quieter machine."""
    lengths = QUICK_LENGTHS if settings.quick else LENGTHS
    rows: list[dict[str, object]] = []
    for n in lengths:
        turns = 1 if settings.quick or n > LONGEST_EXACT else 2
        models = [name for name in MODELS if _is_run(name, n, lengths)]
        found: dict[str, list[dict[str, object]]] = {name: [] for name in models}
        for turn in range(turns):
            for name in models:
                if turn and name in ("sdpa", "reference") and n >= LONGEST_EXACT:
                    continue  # slow, and so less disturbed
                say(f"training step, n = {n:,}: {MODELS[name]}")
                found[name].append(_child(name, n, settings))
        rows += [_row(name, n, results) for name, results in found.items()]
    rows += _extrapolations(rows, lengths)
    return {**heading(settings), "models": MODELS, "layers": 6, "width": 256, "batch": 1, "rows": rows}


def _is_run(name: str, n: int, lengths: tuple[int, ...]) -> bool:
    if name == "reference":
        return n == lengths[0]
    return name != "sdpa" or n <= LONGEST_EXACT


def _child(name: str, n: int, settings: Settings) -> dict[str, object]:
    request = {"model": name, "n": n, "threads": settings.threads, "target": settings.target}
    steps = 1 if name in ("sdpa", "reference") and n >= LONGEST_EXACT else 3
    return run_child("benchmarks.training", {**request, "steps": steps})


def _row(name: str, n: int, results: list[dict[str, object]]) -> dict[str, object]:
    seconds = [value for result in results for value in _numbers(result["seconds"])]
    peaks = [value for result in results for value in _numbers([result["peak"]])]
    return {
        "model": name,
        "n": n,
        "seconds": statistics.median(seconds),
        "steps": len(seconds),
        "peak_bytes": max(peaks, default=None),
        "measured": True,
    }


def _numbers(values: object) -> list[float]:
    assert isinstance(values, list)
    return [value for value in values if value is not None]


def _extrapolations(rows: list[dict[str, object]], lengths: tuple[int, ...]) -> list[dict[str, object]]:
    """SDPA at the longer lengths: a n + b n^2 through its two longest measured ones."""
    exact = [row for row in rows if row["model"] == "sdpa"]
    if len(exact) < 2:
        return []
    (n1, s1), (n2, s2) = ((_numbers([row["n"]])[0], _numbers([row["seconds"]])[0]) for row in exact[-2:])
    b = max(0.0, (s2 / n2 - s1 / n1) / (n2 - n1))
    a = s2 / n2 - b * n2
    extrapolated = {"model": "sdpa", "steps": 0, "peak_bytes": None, "measured": False}
    return [{**extrapolated, "n": n, "seconds": a * n + b * n**2} for n in lengths if n > n2]


def make_model(name: str, target: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    """One of MODELS, with its objective."""
    text = SPEC.read_text()
    if name in ("far", "sdpa"):
        if NEAR_LINE not in text:
            raise RuntimeError(f"{SPEC.name} has no line {NEAR_LINE.strip()!r} to leave out")
        text = text.replace(NEAR_LINE, "")
    compiled: Compiled = compile_spec(text, target=target)
    model = compiled.module(seed=0)
    assert compiled.loss is not None
    return (compiled.reference(model) if name in ("sdpa", "reference") else model), compiled.loss


def main() -> None:
    """The process of its own: a step to warm up, one whose peak is taken, and more that are only timed."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    model, loss = make_model(request["model"], request["target"])
    options = replace(Options(), tokens=request["n"])
    optimiser = make_optimiser(model, options)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (1, request["n"] + 1), generator=generator)
    seconds: list[float] = []

    def step(length: int) -> None:
        batch = (tokens[:, :length], tokens[:, 1 : length + 1])
        started = time.perf_counter()
        training_step(model, loss, optimiser, batch, 1e-4, options)
        seconds.append(time.perf_counter() - started)

    step(min(WARM, request["n"]))
    peak = peak_of(lambda: step(request["n"]))
    for _ in range(request["steps"] - 1):
        step(request["n"])
    print(json.dumps({"seconds": seconds[1:], "peak": peak}))


if __name__ == "__main__":
    main()
