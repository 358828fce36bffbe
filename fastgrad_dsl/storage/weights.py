"""Weights from safetensors files: a model's own, or those inside a training checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import check_regular

MODEL = "model."  # before the names of weights in a checkpoint


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a model's weights in place; TfgError FG418 where the file is unreadable or another model's."""
    tensors = read_tensors(path, "FG418", "weights")
    try:
        model.load_state_dict(of_model(tensors))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise TfgError.of("FG418", f"{path} does not hold this model's weights: {reason}") from None


def of_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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
