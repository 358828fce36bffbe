"""Weights from safetensors files: a model's own, or those inside a training checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import check_regular

MODEL = "model."  # before the names of weights in a checkpoint


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a model's weights in place; TfgError FG418 where the file is unreadable or another model's."""
    tensors = read_weights(path, {name: own.dtype for name, own in model.state_dict().items()})
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise TfgError.of("FG418", f"{path} does not hold this model's weights: {reason}") from None


def read_weights(path: Path, types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The weights in a file by path, also in a training checkpoint; TfgError FG418 where it is unreadable.

    Numbers of another precision than `types` says will do, but not those of another kind: whole ones, truth values or
    complex ones. Names and shapes are for the caller to check.
    """
    tensors = _of_model(read_tensors(path, "FG418", "weights"))
    for name, wanted in types.items():
        if name in tensors and _kind(tensors[name].dtype) != _kind(wanted):
            has, own = (str(each).removeprefix("torch.") for each in (tensors[name].dtype, wanted))
            raise TfgError.of("FG418", f"{path}: {name} has the type {has}, and the model's is {own}")
    return tensors


def _kind(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    return dtype.is_floating_point, dtype.is_complex, dtype == torch.bool


def _of_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights by path: those of a training checkpoint without what comes before their names."""
    of_checkpoint = {name.removeprefix(MODEL): t for name, t in tensors.items() if name.startswith(MODEL)}
    return of_checkpoint or tensors


def read_tensors(path: Path, code: str, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; TfgError with this code where it is none, "cannot read `what` PATH"."""
    try:
        check_regular(path)
        return load_file(path)
    except OSError as error:
        reason = error.strerror or str(error)
    except SafetensorError as error:
        reason = str(error)
    raise TfgError.of(code, f"cannot read {what} {path}: {reason}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file at once. Raises OSError."""
    try:
        save_file(dict(tensors), path, dict(metadata) or None)
    except SafetensorError as error:
        raise OSError(str(error)) from None
