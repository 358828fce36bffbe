"""A rigorous bound of a model's error, carried through its layers, for the model of benchmarks/theory.py.

The activations of the exact model on a batch are known. Beside each token's row goes a bound of the distance to the
row of the approximated model; every operation turns it into a bound for its result, by Lipschitz constants on the ball
around the known activation. Nothing is averaged and no first order is taken: it is a proof for this batch and these
weights, and as tight as norms allow. docs/theory.md shows what becomes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from fastgrad_compiler.approximation.certificates import eta

_NORM_EPS = 1e-6  # of rms_norm
_UNIT_SLOPE = 1.1  # |silu'| is at most 1.0999


@dataclass(frozen=True)
class Shape:
    """Heads, and the gain R of unit queries and keys."""

    heads: int
    gain: float


def running_bound(
    tokens: Tensor, weights: Mapping[str, Tensor], depth: int, shape: Shape, eps: float
) -> list[float]:
    """After each layer, a bound of ||error|| / ||stream|| over all tokens.

    Args:
        tokens: int [n].
        weights: of the model, by path, in float64.
        depth: layers.
        shape: of an attention.
        eps: of the polynomial of every attention.
    """
    x = weights["table"][tokens]
    error = torch.zeros(x.shape[0], dtype=x.dtype)
    shares = []
    for layer in range(depth):
        own = {
            name.removeprefix(f"layers.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        y, moved = _normalised(x, error, own["rms_norm.w"])
        change, added = _attention(y, moved, own, shape, eps)
        x, error = x + change, error + added
        y, moved = _normalised(x, error, own["rms_norm_2.w"])
        change, added = _swiglu(y, moved, own)
        x, error = x + change, error + added
        shares.append((error.norm() / x.norm()).item())
    return shares


def _normalised(x: Tensor, error: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """rms_norm is sqrt(d) x / sqrt(|x|^2 + d eps), whose slope is at most sqrt(d) / sqrt(|x|^2 + d eps)."""
    width = x.shape[-1]
    sizes = x.norm(dim=-1)
    result = sqrt(width) * x / (sizes.square() + width * _NORM_EPS).sqrt()[:, None] * gain
    least = ((sizes - error).clamp(min=0).square() + width * _NORM_EPS).sqrt()
    moved = sqrt(width) * torch.minimum(error / least, torch.full_like(error, 2.0))
    return result, gain.abs().max() * moved


def _attention(
    y: Tensor, moved: Tensor, own: Mapping[str, Tensor], shape: Shape, eps: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (_heads(y @ own[f"attention.w{name}"], shape.heads) for name in "qkv")
    of_q, of_k, of_v = (_projected(own[f"attention.w{name}"], moved, shape.heads) for name in "qkv")
    of_q, of_k = _unit(q, of_q), _unit(k, of_k)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    n = y.shape[0]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    f = (shape.gain * q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1)
    out = f @ v
    # A weight changes by at most e^(its logit's change + the largest of the row) - 1, relative to itself.
    logits = shape.gain * (of_q[:, :, None] + of_k[:, None, :]).masked_fill(hidden, 0.0)
    change = torch.expm1((logits + logits.amax(-1, keepdim=True)).clamp(max=700.0))
    distance = torch.cdist(out, v) + of_v[:, None, :]
    farthest = distance.masked_fill(hidden, 0.0).amax(-1)
    of_weights = torch.minimum((f * change * distance).sum(-1), 2 * farthest)
    of_head = (f * of_v[:, None, :]).sum(-1) + of_weights + eta(eps) * farthest
    joined = out.transpose(0, 1).flatten(1)
    return joined @ own["attention.wo"], _projected_back(own["attention.wo"], of_head)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], heads, -1).transpose(0, 1)


def _projected(weight: Tensor, moved: Tensor, heads: int) -> Tensor:
    """[heads, n]: the largest singular value of a head's columns times the row's error."""
    columns = _heads(weight, heads)
    slopes: Tensor = torch.linalg.matrix_norm(columns, 2)
    return slopes[:, None] * moved


def _projected_back(weight: Tensor, of_head: Tensor) -> Tensor:
    """The smaller of two bounds: heads as one vector, and one by one."""
    rows = weight.unflatten(0, (of_head.shape[0], -1))
    one_by_one = (torch.linalg.matrix_norm(rows, 2)[:, None] * of_head).sum(0)
    return torch.minimum(torch.linalg.matrix_norm(weight, 2) * of_head.norm(dim=0), one_by_one)


def _unit(x: Tensor, error: Tensor) -> Tensor:
    """|a / |a| - b / |b|| is at most 2 |a - b| / (|a| + |b|), and 2."""
    sizes = 2 * x.norm(dim=-1) - error
    return torch.where(sizes > error, 2 * error / sizes, torch.full_like(error, 2.0))


def _swiglu(y: Tensor, moved: Tensor, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    gate, up, down = (own[f"swiglu.{name}"] for name in ("gate", "up", "down"))
    a, b = torch.nn.functional.silu(y @ gate), y @ up
    of_a, of_b = (moved[:, None] * weight.norm(dim=0) for weight in (_UNIT_SLOPE * gate, up))
    of_product = of_a * b.abs() + (a.abs() + of_a) * of_b
    return (a * b) @ down, torch.linalg.matrix_norm(down, 2) * of_product.norm(dim=-1)
