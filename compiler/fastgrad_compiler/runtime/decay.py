"""Forget gates as decays: the running sum of their logarithms, the factors of pairs, and the gradient of the gates.

With l = log_gate and G_i the sum of l up to token i of a document, the weight of a pair is times e^(G_i - G_j), i >= j
(docs/mathematics.md, section 12). Sums and their differences are float64; a difference is rounded to the precision of
the arithmetic before it is exponentiated. A gate of at most LEAST forgets everything in every precision, -inf too.

Sums begin anew with each document, and a gate that no query sees across counts as 0: what is hidden decides no bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .documents import document_ranges, document_runs

LEAST = -1000.0  # e^LEAST is 0 in float64
BLOCK = 256  # tokens that are added up one by one: a sum of n takes BLOCK + n / BLOCK additions in a row


def log_decay(log_gate: Tensor, mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """G, float64 [b, h, n], which does not rise within a document.

    log_gate [b, h, n], taken to be within [LEAST, 0]; mask bool [b, n]; documents [b, n]: ids. At a token that the mask
    hides it is G of the last one before that is visible: a factor that all weights of a row have has no effect, and so
    the last key that a row sees has the factor 1.
    """
    return _sums(log_gate.double().clamp(LEAST, 0.0), mask, documents)


def log_decay_tangent(
    tangent: Tensor, log_gate: Tensor, mask: Tensor | None, documents: Tensor | None
) -> Tensor:
    """The tangent of G, float64 [b, h, n], from that of log_gate."""
    return _sums(tangent.double().masked_fill(_outside(log_gate), 0.0), mask, documents)


def gate_gradient(later: Tensor, log_gate: Tensor, mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """The gradient of log_gate [b, h, n]; 0 for a gate without effect.

    later, of each token that is not hidden: `sum_of_later` of the gradient of G, or which comes to the same, the sum of
    the gradients of logits over queries from it on and keys before it.
    """
    if mask is not None:
        place = next_visible(mask)
        later = pad(later, (0, 1)).gather(-1, place[:, None].expand_as(later))
    without = _without_effect(log_gate, mask, documents)[:, None] | _outside(log_gate)
    gradient: Tensor = later.masked_fill(without, 0.0)
    return gradient.to(log_gate.dtype)


def running_sum(x: Tensor, runs: Tensor | None) -> Tensor:
    """The sum of x [b, h, n] over the tokens up to each one, of its own document; runs [b, n]: `document_runs`.

    With documents in log2(n) steps, which add nothing of another document: it may hold anything.
    """
    if runs is None:
        blocks = pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).cumsum(-1)
        before = pad(blocks[..., :-1, -1].cumsum(-1), (1, 0))
        whole: Tensor = (blocks + before.unsqueeze(-1)).flatten(-2)
        return whole[..., : x.shape[-1]]
    distance = 1
    while distance < x.shape[-1]:
        same = (runs[:, distance:] == runs[:, :-distance])[:, None]
        added = x[..., distance:] + torch.where(same, x[..., :-distance], 0.0)
        x = torch.cat((x[..., :distance], added), -1)
        distance *= 2
    return x


def sum_of_later(x: Tensor, runs: Tensor | None) -> Tensor:
    """The same over the tokens from each one on."""
    return running_sum(x.flip(-1), None if runs is None else runs.flip(-1)).flip(-1)


def next_visible(mask: Tensor) -> Tensor:
    """int64 [b, n]: the first token from each one on that mask [b, n] does not hide, n where there is none."""
    n = mask.shape[-1]
    place = torch.arange(n, device=mask.device)
    return torch.where(mask, place, n).flip(-1).cummin(-1).values.flip(-1)


def _sums(gates: Tensor, mask: Tensor | None, documents: Tensor | None) -> Tensor:
    gates = gates.masked_fill(_without_effect(gates, mask, documents)[:, None], 0.0)
    sums = running_sum(gates, None if documents is None else document_runs(documents))
    if mask is None:
        return sums
    first, _ = _ranges(gates, documents)
    place = torch.arange(gates.shape[-1], device=gates.device)
    last = torch.where(mask, place, first).cummax(-1).values
    return sums.gather(-1, last[:, None].expand_as(sums))


def _without_effect(gates: Tensor, mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """bool [b or 1, n]: no visible key is before a gate in its document, or none from it on."""
    first, behind = _ranges(gates, documents)
    place = torch.arange(gates.shape[-1], device=gates.device)
    if mask is None:
        return first == place
    visible = pad(mask.cumsum(-1), (1, 0))
    begin, end = (visible.gather(-1, x.expand_as(mask)) for x in (first, behind))
    return (visible[:, :-1] == begin) | (visible[:, :-1] == end)


def _ranges(gates: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64 [b or 1, n] twice: the first token of each one's document, and the one after its last."""
    if documents is not None:
        return document_ranges(document_runs(documents))
    place = torch.arange(gates.shape[-1], device=gates.device)[None]
    return torch.zeros_like(place), torch.full_like(place, gates.shape[-1])


def _outside(log_gate: Tensor) -> Tensor:
    return (log_gate > 0.0) | (log_gate < LEAST)


class Decays:
    """The factors e^(G_i - G_j) of some rows, none above 1; sums [b, h, n]: `log_decay`, dtype: of the factors."""

    def __init__(self, sums: Tensor, dtype: torch.dtype) -> None:
        self.sums, self.dtype = sums, dtype

    def log_pairs(self, queries: slice, keys: slice) -> Tensor:
        """[b, h, t, keys]: G_i - G_j; at most 0, also for a key after the query or of another document."""
        return self._logs(self.sums[:, :, queries, None], self.sums[:, :, None, keys])

    def since(self, token: int, queries: slice) -> Tensor:
        """[b, h, t]: from a token to the queries after it."""
        return self._logs(self.sums[:, :, queries], self.sums[:, :, token, None]).exp_()

    def until(self, token: int, keys: slice) -> Tensor:
        """[b, h, t]: from keys to a token after them."""
        return self._logs(self.sums[:, :, token, None], self.sums[:, :, keys]).exp_()

    def between(self, first: int, second: int) -> Tensor:
        """[b, h]: from one of two tokens to the later."""
        low, high = sorted((first, second))
        return self._logs(self.sums[:, :, high], self.sums[:, :, low]).exp_()

    def _logs(self, later: Tensor, earlier: Tensor) -> Tensor:
        return (later - earlier).clamp_(max=0.0).to(self.dtype)
