"""What `--calibrate` names: a text for byte-level models, a .safetensors file of batches, or random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgrad_dsl.calibration.calibrate import Tell
from fastgrad_dsl.calibration.replan import Request, replan
from fastgrad_dsl.models.batch_check import batch_problem, is_whole
from fastgrad_dsl.models.sizes import batch_sizes, text_sizes
from fastgrad_dsl.models.text_data import load_text
from fastgrad_dsl.storage.weights import load_weights, read_tensors
from fastgrad_grammar.diagnostics import TfgError

if TYPE_CHECKING:
    from fastgrad_dsl.api.compiled import Compiled

RANDOM = "random"
TEXT_BATCHES = 2  # of the part to train on; the last one is of the held-out part


def calibrated(
    compiled: Compiled,
    data: str,
    tell: Tell,
    *,
    dims: Mapping[str, int],
    weights: Path | None = None,
    seed: int = 0,
) -> Compiled:
    """The model planned anew on a text, a .safetensors file or `random`; TfgError as `named_batches` and `replan`."""
    batches, described = named_batches(compiled, data, dims, seed)
    asked = Request(None, batches, data=described, dims=dims, seed=seed)
    if weights is not None:
        model = compiled.module(seed=seed)
        load_weights(model, weights)
        asked = replace(asked, model=model, weights=f"weights of {weights}")
    return replan(compiled, asked, tell)


def named_batches(
    compiled: Compiled, source: str, dims: Mapping[str, int], seed: int
) -> tuple[Sequence[Sequence[Tensor]] | None, str]:
    """Batches and what they are; None for random inputs.

    A .safetensors file holds each input and target under its name, for several batches with `.0`, `.1` after it.
    Raises TfgError FG411, FG412 or FG415 for a text, FG423 for a file of batches.
    """
    if source == RANDOM:
        return None, "random inputs"
    path = Path(source)
    if path.suffix == ".safetensors":
        return _stored(compiled, path), f"batches of {path}"
    rows, tokens = text_sizes(compiled.plan_document, batch_sizes(compiled.plan_document, dims))
    text = load_text(path, tokens, "--dim")
    places = torch.Generator().manual_seed(seed)
    used = [text.batch(tokens, rows, places) for _ in range(TEXT_BATCHES)]
    return [*used, *text.validation_batches(tokens, rows, 1)], f"text of {path}"


def _stored(compiled: Compiled, path: Path) -> list[list[Tensor]]:
    tensors = read_tensors(path, "FG423", "batches")
    plan = compiled.plan_document
    described = [*plan.inputs, *plan.targets]
    names = [tensor.name for tensor in described]
    numbers = sorted({int(key.rpartition(".")[2]) for key in tensors if key.rpartition(".")[2].isdecimal()})
    endings = [f".{number}" for number in numbers] or [""]
    batches = []
    for ending in endings:
        missing = [name for name in names if name + ending not in tensors]
        if missing:
            help_ = (f"each batch holds {', '.join(names)}",)
            raise TfgError.of("FG423", f"{path} has no tensor {missing[0]}{ending}", *help_)
        batch = [tensors[name + ending] for name in names]
        problem = batch_problem(compiled.program, batch)
        if problem is not None:
            raise TfgError.of("FG423", f"{path}: {problem}")
        batches.append([each.long() if is_whole(each) else each for each in batch])
    return batches
