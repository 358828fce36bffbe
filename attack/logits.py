"""The logits of an attention node on the pairs that a polynomial serves, or would."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrad_compiler.ir.graph import Node


def far_logits(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """scale q.k [.., H, n, m] of what the masks show and is not near; 0 elsewhere."""
    q, k = inputs[:2]
    if q.dim() > 2 and k.dim() > 2:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    logits = float(str(node["scale"])) * (q @ k.transpose(-1, -2))
    return torch.where(served_pairs(node, inputs, logits), logits, 0.0)


def served_pairs(node: Node, inputs: Sequence[Tensor], logits: Tensor) -> Tensor:
    """True for the pairs of a query and a key that are visible and not near; broadcasts to the logits."""
    n, m = logits.shape[-2:]
    rows, columns = torch.arange(n)[:, None], torch.arange(m)
    pairs = torch.ones(n, m, dtype=torch.bool)
    if node["causal"]:
        pairs = columns <= rows
    window, near = node.get("window"), node["near"]
    if isinstance(window, int):
        pairs = pairs & ((rows - columns).abs() < window)
    if isinstance(near, int):
        pairs = pairs & ((rows // near - columns // near).abs() > 1)
    roles = node["roles"]
    extra = dict(zip(roles if isinstance(roles, tuple) else (), inputs[3:], strict=True))
    lead = [1] * (logits.dim() - 3)
    if "padding" in extra:
        pairs = pairs & extra["padding"].reshape(-1, *lead, 1, m)
    if "documents" in extra:
        ids = extra["documents"]
        runs = torch.cat((torch.zeros_like(ids[:, :1]), (ids[:, 1:] != ids[:, :-1]).long()), 1).cumsum(1)
        pairs = pairs & (runs[:, :, None] == runs[:, None]).reshape(len(ids), *lead, n, m)
    return pairs
