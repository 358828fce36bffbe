"""A model of Transformers, saved, imported and compiled, against itself: outputs, gradients, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import fastgrad_dsl as fg
from fastgrad_dsl.checkpoints.exporting import export_checkpoint, find_origin, tensor_of
from fastgrad_dsl.checkpoints.importing import import_checkpoint
from fastgrad_dsl.checkpoints.mapping import Places
from fastgrad_dsl.checkpoints.model import recognise
from fastgrad_grammar.format import format_source

transformers: Any = pytest.importorskip(
    "transformers", reason="Transformers cannot be imported (the extra dev has it)", exc_type=ImportError
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Of the norm of a difference, relative to the norm: ten times what rounding gives in these small models."""

KEY_BIASES = ("key.bias", "k_proj.bias")


@dataclass(frozen=True)
class Case:
    """A saved model and its spec: what a test compares."""

    folder: Path
    spec: Path
    theirs: Any
    compiled: fg.Compiled


def saved(
    config: Any, kind: str, folder: Path, made: Mapping[str, Any] | None = None, **options: Any
) -> Case:
    """A random model of a class of Transformers, saved and imported; `made` and `options` are of the two."""
    torch.manual_seed(0)
    theirs = (
        getattr(transformers, kind)._from_config(config, attn_implementation="eager", **(made or {})).eval()
    )
    for (
        parameter
    ) in theirs.parameters():  # zeros and ones would hide a bias or a norm, small weights attention
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(folder, **options)
    return imported(theirs, folder)


def imported(theirs: Any, folder: Path) -> Case:
    """A saved model, imported and compiled."""
    spec = folder.parent / "imported" / "model.tfg"
    import_checkpoint(folder, spec)
    text = spec.read_text(encoding="utf-8")
    assert format_source(text) == text
    return Case(folder, spec, theirs, fg.compile(spec))


def ours_of(case: Case, dtype: torch.dtype) -> nn.Module:
    """The compiled module with the imported weights."""
    model = case.compiled.module().to(dtype)
    model.load_state_dict(load_file(case.spec.with_suffix(".safetensors")))
    return model.eval()


def largest_errors(
    case: Case,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    result: Callable[[Any], Tensor],
    arguments: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    *,
    index: int = 0,
) -> tuple[float, float]:
    """Relative errors of the result, and of the gradient of the tensor in which it is largest."""
    theirs = case.theirs.to(dtype)
    theirs.zero_grad()
    ours = ours_of(case, dtype)
    wanted, found = result(theirs(**inputs)), ours(*arguments(inputs))
    found = found[index] if isinstance(found, tuple) else found
    torch.manual_seed(1)
    cotangent = torch.randn_like(wanted)
    if (
        "attention_mask" in inputs and wanted.dim() == 3
    ):  # padding has no loss, and rows of tables that are its no gradient
        cotangent *= inputs["attention_mask"].unsqueeze(-1)
    (wanted * cotangent).sum().backward()
    (found * cotangent).sum().backward()
    return relative(found, wanted), gradient_error(case, theirs, ours)


def gradient_error(case: Case, theirs: Any, ours: nn.Module) -> float:
    """The largest relative error of a gradient, by the names of the checkpoint."""
    places = places_of(case)
    mine = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in ours.named_parameters()
    }
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    wanted = {name: gradient for name, gradient in wanted.items() if gradient is not None}
    found = {name: tensor_of(name, places, mine) for name in places.rules if name in wanted}
    assert set(found) == set(wanted)
    # What is left of sums that cancel has the rounding of their terms. The gradient of a bias of keys is nothing else:
    # it adds the same to all logits of a row.
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    return max(
        relative(found[name], gradient, largest / (10 if name.endswith(KEY_BIASES) else 1000))
        for name, gradient in wanted.items()
    )


def places_of(case: Case) -> Places:
    """Where the tensors of a case's checkpoint are in its spec."""
    origin, _ = find_origin(case.spec)
    data = {name: json.loads(text) for name, text in origin.texts.items()}
    return recognise(data, origin.tensors).places(origin.tensors)


def relative(found: Tensor, wanted: Tensor, least: float = 1e-30) -> float:
    """The norm of the difference, relative to that of what is wanted, which counts as `least` at least."""
    assert found.shape == wanted.shape
    difference = (found - wanted).detach().norm()
    return float(difference / wanted.detach().norm().clamp(min=least))


def check_round_trip(case: Case) -> None:
    """The exported folder is the saved one: names, types, numbers, metadata and JSON files."""
    back = case.folder.parent / "back"
    export_checkpoint(case.spec, case.spec.with_suffix(".safetensors"), back)
    files = sorted(path.name for path in case.folder.glob("*.safetensors*"))
    assert sorted(path.name for path in back.glob("*.safetensors*")) == files
    assert (back / "config.json").read_bytes() == (case.folder / "config.json").read_bytes()
    for name in files:
        if name.endswith(".json"):
            assert (back / name).read_bytes() == (case.folder / name).read_bytes()
            continue
        with safe_open(back / name, "pt") as new, safe_open(case.folder / name, "pt") as old:
            assert new.metadata() == old.metadata() == {"format": "pt"}
            assert sorted(new.keys()) == sorted(old.keys())
            for tensor in old.keys():  # noqa: SIM118 (it is no dict)
                was, now = old.get_tensor(tensor), new.get_tensor(tensor)
                assert now.dtype == was.dtype
                assert torch.equal(now.view(torch.uint8), was.view(torch.uint8))


def tokens(vocab: int, length: int = 7, batch: int = 2) -> Tensor:
    """Random tokens."""
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(3))
