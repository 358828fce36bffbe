"""Models of Transformers in float64 throughout: norms, softmax and positions of theirs turn to float32 otherwise."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch


class _Torch:
    """The module torch, whose float32 is float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


def make_double(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a model compute in float64, and its rotary positions made anew in it."""
    model.double()
    for name in {type(model).__module__, "transformers.modeling_rope_utils"} & set(sys.modules):
        monkeypatch.setattr(sys.modules[name], "torch", _Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config)
            module.inv_freq, module.attention_scaling = fresh.inv_freq, fresh.attention_scaling
        if hasattr(module, "embed_scale"):  # of Gemma 3, the root of the width
            module.embed_scale = torch.tensor(module.embedding_dim**0.5, dtype=torch.float64)
