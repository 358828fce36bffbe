"""Forget gates as decays: the running sum of their logarithms, and the gradient of gates from that of the sums.

With l = log_gate and G_i = l_0 + .. + l_i the weight of a pair is times e^(G_i - G_j), i >= j (docs/mathematics.md,
section 6). Sums and their differences are float64; a difference is rounded to the precision of the arithmetic before it
is exponentiated. What is at most LEAST forgets everything in every precision, -inf too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .documents import document_ranges, document_runs

LEAST = -1000.0  # e^LEAST is 0 in float64


def log_decay(log_gate: Tensor, mask: Tensor | None) -> Tensor:
    """G, float64 [b, h, n], that never rises; log_gate [b, h, n], taken to be within [LEAST, 0]; mask bool [b, n].

    At a token that the mask hides it is that of the last one before which is not hidden, or of the first. A row's
    common factor has no effect; so the last key that a row sees has the factor 1, and no row is scaled to 0.
    """
    sums = log_gate.double().clamp(LEAST, 0.0).cumsum(-1)
    if mask is None:
        return sums
    place = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(mask, place, 0).cummax(-1).values
    return sums.gather(-1, last[:, None].expand_as(sums))


def gate_gradient(gradient: Tensor, log_gate: Tensor, documents: Tensor | None) -> Tensor:
    """The gradient of log_gate [b, h, n], from that of G at each key, [b, h, n]: its sum over the keys from a token on.

    Only keys of the token's document count. 0 where the gate has no effect: it is the first of its document, or beyond
    [LEAST, 0].
    """
    total = gradient.double().flip(-1).cumsum(-1).flip(-1)
    without = (log_gate > 0.0) | (log_gate < LEAST)
    if documents is not None:
        runs = document_runs(documents)
        first, behind = document_ranges(runs)
        later = torch.nn.functional.pad(total, (0, 1)).gather(-1, behind[:, None].expand_as(total))
        total = total - later
        place = torch.arange(runs.shape[-1], device=runs.device)
        without = without | (first == place)[:, None]
    total = total.masked_fill(without, 0.0)
    total[..., :1] = 0.0
    return total.to(log_gate.dtype)
