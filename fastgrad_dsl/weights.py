"""Weights from safetensors files: a model's own, or those inside a training checkpoint."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastgrad_grammar.diagnostics import Diagnostic, TfgError

MODEL = "model."  # before the names of weights in a checkpoint


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a model's weights in place; TfgError FG418 where the file is unreadable or another model's."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TfgError([Diagnostic("FG418", f"cannot read weights {path}: {error}")]) from None
    of_checkpoint = {name.removeprefix(MODEL): t for name, t in tensors.items() if name.startswith(MODEL)}
    try:
        model.load_state_dict(of_checkpoint or tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise TfgError(
            [Diagnostic("FG418", f"{path} does not hold this model's weights: {reason}")]
        ) from None
