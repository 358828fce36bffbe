"""How widely an attention spreads the weight of its rows: the entropy of the weights that a call gives its keys.

Rows are taken in blocks of bounded memory, all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrad_compiler.reference.attention_torch import near_mask, polynomial
from fastgrad_compiler.runtime.attention_op import Inputs
from fastgrad_compiler.runtime.exact_blocks import Block, Seen, blocks
from fastgrad_compiler.runtime.guard import limits
from fastgrad_compiler.runtime.guard_key import read_key
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.runtime.logit_range import Pairs, clamp, rows_of


@dataclass(frozen=True)
class Spread:
    """Means over the rows that see a key, of all heads: `entropy` in nats, `keys` e^entropy, `visible` keys.

    `entropy` and `keys` are NaN where a weight is negative, which a polynomial may be beyond its range, or where all
    weights of a row are 0.
    """

    entropy: float
    keys: float
    visible: float


def spread_of(inputs: Inputs, spec: KernelSpec, *, exact: bool) -> Spread | None:
    """Of the weights by a kernel's polynomial, or `exact` by exp in its place; None where no row sees a key."""
    seen = Seen.of(inputs, spec.scale, spec.causal, spec.near or 0, 0)
    entropy = keys = visible = rows = 0.0
    for block in blocks(inputs.floats, seen):
        logits, _ = block.logits()
        count = (logits > -math.inf).sum(-1)
        if not exact:
            logits += _instead_of_exp(block, logits, spec)
        found = torch.special.entr(logits.softmax(-1)).sum(-1, dtype=torch.float64)[count > 0]
        entropy += found.sum().item()
        keys += found.exp().sum().item()
        visible += count.sum().item()
        rows += found.numel()
    return Spread(entropy / rows, keys / rows, visible / rows) if rows else None


def entropy_share(logits: Tensor, visible: Tensor, over: tuple[int, ...]) -> Tensor:
    """The mean entropy of rows of softmax weights, as a share of that of equal ones: in [0, 1].

    logits [b, H, r, n]; visible: bool, broadcast against them. The mean is over these dimensions of [b, H, r]; rows
    that see one key or none are left out, and where no row is left it is 0.
    """
    weights = torch.softmax(logits.masked_fill(~visible, -math.inf), -1).nan_to_num(0.0)
    entropy = torch.special.entr(weights).sum(-1)
    most = visible.sum(-1).double().log().expand(entropy.shape)
    counted = most > 0
    shares = torch.where(counted, entropy / most.clamp(min=1e-9), 0.0)
    found: Tensor = shares.sum(over) / counted.sum(over).clamp(min=1)
    return found


def _instead_of_exp(block: Block, logits: Tensor, spec: KernelSpec) -> Tensor:
    """log p(s) - s of the far pairs that are seen, NaN where p(s) is negative, and 0 of all others."""
    scores = torch.matmul(block.q, block.k.mT).mul_(spec.scale)
    change = polynomial(spec.coefficients, scores).log_().sub_(scores)
    change.masked_fill_(logits == -math.inf, 0.0)
    if spec.near is not None:
        low, high = block.band.keys
        queries = torch.arange(*block.band.queries, device=scores.device)
        change.masked_fill_(near_mask(queries, high, spec.near)[:, low:], 0.0)
    return change


def clamped(inputs: Inputs, spec: KernelSpec, guard: str) -> Inputs:
    """The inputs as a polynomial gets them, where the guard of this key scales queries down."""
    if not guard or read_key(guard).policy != "clamp":
        return inputs
    rows = rows_of(inputs.q, inputs.k, inputs.mask, inputs.documents)
    limit = limits(read_key(guard).bounds, rows)
    return inputs._replace(q=clamp(rows, Pairs(spec.scale, spec.causal, spec.near or 0), limit).queries())
