"""The examples at a small size, their inputs, and modules whose kernels run at every length."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import fastgrad_dsl as fg
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.api.loader import package_from_texts

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES: dict[str, dict[str, object]] = {
    "bounded": {"depth": 2, "d_model": 16, "heads": 2, "near": 2, "vocab": 11},
    "gpt": {"depth": 2, "d_model": 16, "heads": 2, "near": 2, "vocab": 11},
    "llama": {"depth": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "near": 2, "hidden": 24, "vocab": 11},
    "bert": {"depth": 2, "d_model": 16, "heads": 4, "vocab": 11},
    "vit": {"depth": 2, "d_model": 16, "heads": 4, "height": 12, "width": 16},
    "encoder_decoder": {"depth": 2, "d_model": 16, "heads": 4, "near": 2, "vocab": 11},
    "spelled_out": {"depth": 2, "d_model": 16, "heads": 2, "vocab": 11},
    "based": {"depth": 2, "d_model": 16, "heads": 2, "qk_dim": 4, "window": 3, "vocab": 11},
}
NAMES = tuple(SIZES)


def _tokens(n: int) -> Tensor:
    return torch.randint(11, (2, n), generator=torch.Generator().manual_seed(n))


_PADDING = torch.arange(9) < torch.tensor([9, 4])[:, None]
INPUTS: dict[str, list[Tensor]] = {
    **{name: [_tokens(13)] for name in ("bounded", "gpt", "llama", "spelled_out", "based")},
    "bert": [_tokens(9), _PADDING],
    "vit": [torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)],
    "encoder_decoder": [_tokens(9), _PADDING, _tokens(13)],
}


@cache
def small(name: str) -> Compiled:
    """An example compiled at a small size."""
    return fg.compile(EXAMPLES / f"{name}.tfg", params=SIZES[name], target="torch")


def disturbed(model: nn.Module) -> nn.Module:
    """The model with its weights moved a little, so that none of them is a plain one or zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def always_polynomial(compiled: Compiled, model: nn.Module) -> nn.Module:
    """A model with the weights of `model` whose kernels run below their break-even length too."""
    files = dict(compiled.modules)
    files["model.py"] = re.sub(r"exact_below=\d+", "exact_below=0", files["model.py"])
    other: nn.Module = package_from_texts(files).MODEL(seed=None)
    for parameter in model.parameters():
        other.to(parameter.dtype)
    other.load_state_dict(model.state_dict())
    return other


def text(
    body: str, signature: str = "x: float[b, n, 4]", result: str = "float[b, n, 4]", more: str = ""
) -> str:
    """A program of one model `m` with this body."""
    return f"dim b\ndim n\n{more}\nmodel m({signature}) -> {result} {{\n{body}\n}}\n"
