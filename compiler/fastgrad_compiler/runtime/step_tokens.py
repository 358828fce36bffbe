"""Tokens of an attention's step form, and how pairs of them weigh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_op import compute_dtype
from .kernel_spec import KernelSpec


@dataclass(frozen=True)
class Rule:
    """How pairs weigh: by the powers of a polynomial beyond the near field, or by exp alone; see `KernelSpec`."""

    scale: float = 1.0
    coefficients: tuple[float, ...] = ()
    near: int = 0
    window: int = 0
    alibi: bool = False
    precision: str = "float32"

    @staticmethod
    def of(spec: KernelSpec) -> Rule:
        """That of a kernel by a polynomial."""
        return Rule(spec.scale, spec.coefficients, spec.near or 0, precision=spec.precision)

    @property
    def ring(self) -> int | None:
        """The tokens that are kept as they are, None for all."""
        if self.coefficients:
            return 2 * self.near
        return self.window - 1 if self.window else None


class Tokens(NamedTuple):
    """Keys and what belongs to them: k [b, h, t, d], v [b, h, t, dv], near_k [b, h, t, near_d].

    log_gate float64 [b, h, t], at most 0: of new tokens their own, of earlier ones the sum of those after them. seen
    bool [b, t]; run int64 [b, t]: the number of the document; places int64 [t], negative where there is no token.
    """

    k: Tensor
    v: Tensor
    near_k: Tensor | None
    log_gate: Tensor | None
    seen: Tensor | None
    run: Tensor | None
    places: Tensor

    def slice(self, first: int, last: int) -> Tokens:
        """The tokens [first, last)."""
        pairs = zip(self, AXES, strict=True)
        return Tokens._make(None if x is None else x[along(axis, first, last)] for x, axis in pairs)

    def after(self, others: Tokens) -> Tokens:
        """These after others."""
        pairs = zip(others, self, AXES, strict=True)
        return Tokens._make(
            None if x is None or y is None else torch.cat((y, x), axis) for y, x, axis in pairs
        )


AXES = (2, 2, 2, 2, 1, 1, 0)  # of the tokens in the fields of `Tokens`


def along(axis: int, first: int, last: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(first, last))


def work_dtype(like: Tensor, rule: Rule) -> torch.dtype:
    return torch.float64 if rule.precision == "float64" else compute_dtype(like)


def grouped(q: Tensor, k: Tensor) -> Tensor:
    """[b, h, G, c, d]: query heads by the key head that they share."""
    grouped: Tensor = q.unflatten(1, (k.shape[1], -1))
    return grouped


def powers(coefficients: tuple[float, ...], s: Tensor) -> Tensor:
    result = torch.full_like(s, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * s + coefficient
    return result


def since(log_gate: Tensor) -> Tensor:
    """[b, h, t]: the sum of the gates after each token."""
    return log_gate.sum(-1, keepdim=True) - log_gate.cumsum(-1)


def gates_of(new: Tokens, keys: Tokens, of_cache: bool = False) -> Tensor | None:
    """float64 [b, h, 1, c, t]: the sum of the gates between each key and each new token, at most 0.

    The last keys are the new tokens, with their own gates; or in a cache, with the sums after them as all keys have.
    """
    if new.log_gate is None or keys.log_gate is None:
        return None
    count = new.log_gate.shape[-1]
    own = new.log_gate.cumsum(-1)
    before = keys.log_gate[..., : keys.log_gate.shape[-1] - (0 if of_cache else count)]
    if of_cache:
        gates = before[:, :, None] - since(new.log_gate)[..., None]
    else:
        earlier = before[:, :, None] + own[..., None]
        gates = torch.cat((earlier, own[..., None] - own[:, :, None]), -1)
    return gates.clamp(max=0.0).unsqueeze(2)


def finite_values(v: Tensor, visible: Tensor, new: Tokens) -> tuple[Tensor, Tensor | None]:
    """Values without those that are not finite, and which rows see one of these: bool [b, h, 1, c, 1].

    A hidden one has the weight 0, and 0 * NaN is NaN. One token by itself sees all that is kept of its document.
    """
    if new.run is None and new.places.shape[0] == 1:
        return v, None
    bad = ~v.isfinite().all(-1)
    return v.masked_fill(bad.unsqueeze(-1), 0.0), (bad[:, :, None, None] & visible).any(-1, keepdim=True)


def softmax_of(
    scores: Tensor, gates: Tensor | None, visible: Tensor, values: tuple[Tensor, Tensor | None]
) -> Tensor:
    """[b, H, c, dv]: the mean of the values by softmax of the scores [b, h, G, c, t]; 0 for a row that sees nothing."""
    scores = scores if gates is None else (scores + gates).to(scores.dtype)
    scores = scores.masked_fill(~visible, -math.inf)
    empty = ~visible.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(~visible, 0.0)
    v, spoilt = values
    out = weights @ v.unsqueeze(2)
    return (out if spoilt is None else out.masked_fill(spoilt, math.nan)).flatten(1, 2)


def quotient(numerator: Tensor, total: Tensor) -> Tensor:
    """Rows over their sum of weights; 0 for a row without any."""
    return numerator / total.masked_fill(total == 0, 1.0)


def slopes(q: Tensor, k: Tensor) -> Tensor:
    """[h, G, 1, 1]: ALiBi's 2^(-8 (i + 1) / H) of query head i of H."""
    heads = q.shape[1]
    places = torch.arange(1, heads + 1, device=q.device, dtype=work_dtype(q, Rule()))
    return torch.exp2(places * (-8.0 / heads)).view(k.shape[1], -1, 1, 1)
