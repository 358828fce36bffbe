"""What the logits of an attention are on data: range and histogram of each head, and what centring the keys gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrad_dsl.calibration.capture import Call
from fastgrad_dsl.calibration.samples import Sample, sample
from fastgrad_dsl.models.measure import check_finite

ENTRIES = 2**23  # of a matrix of scores whose range is taken: beyond it, evenly spaced rows stand for all
BINS = 40
NARROWER = 0.95  # centred keys serve where they leave at most this share of the range


@dataclass(frozen=True)
class Logits:
    """The logits of far pairs of one attention, on all batches; everything by query head [H].

    Args:
        least, largest: of q.k, scale included.
        centred: largest |q.(k - c)|; None where keys cannot be centred.
        centre: c by key head [Hk, d], the mean of the keys on the batches; None with `mean`.
        mean: keys are centred by their own mean, sequence by sequence.
        norms: scale max ||q|| max ||k||, or of k - c where centring is worth it: no smaller than what is beside it.
        edges, counts: histogram of what a polynomial would get (centred, if that is narrower); counts [H, BINS].
    """

    least: tuple[float, ...]
    largest: tuple[float, ...]
    centred: tuple[float, ...] | None
    centre: tuple[tuple[float, ...], ...] | None
    mean: bool
    norms: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """The largest |q.k| of each head."""
        return tuple(max(abs(low), abs(high)) for low, high in zip(self.least, self.largest, strict=True))

    @property
    def centring(self) -> bool:
        """Whether centring the keys is worth it."""
        return self.centred is not None and max(self.centred) <= NARROWER * max(self.magnitudes)


def measure_logits(calls: Sequence[Call], near: int | None) -> Logits:
    """The logits on the far pairs of some batches, beyond the block `near` where the rewrite has one.

    Without any far pair, as in a short sequence within its near field, all are 0. Raises TfgError FG427 where a query
    or a key is not finite.
    """
    samples = [sample(call, ENTRIES) for call in calls]
    check_finite("the exact model", *(x for rows in samples for x in (rows.q, rows.k)))
    least, largest = _extremes(samples, [rows.logits() for rows in samples], near)
    mean = _own_mean(calls[0])
    centres = _centres(calls, samples, mean)
    centred = None
    if centres is not None:
        low, high = _extremes(
            samples, [rows.logits(c) for rows, c in zip(samples, centres, strict=True)], near
        )
        centred = torch.maximum(low.abs(), high.abs())
        if not mean:
            centres, centred = _where_narrower(calls[0], centres, centred, torch.maximum(-least, largest))
    found = Logits(
        tuple(least.tolist()),
        tuple(largest.tolist()),
        None if centred is None else tuple(centred.tolist()),
        None if centres is None or mean else _by_key_head(calls[0], centres[0]),
        mean,
        (),
        (),
        (),
    )
    served = centres if found.centring else None
    edges, counts = _histogram(samples, served, near, found)
    return replace(found, norms=_norms(samples, served), edges=edges, counts=counts)


def _norms(samples: Sequence[Sample], centres: Sequence[Tensor] | None) -> tuple[float, ...]:
    """The longest query times the longest key of each head."""
    queries, keys = [], []
    for place, rows in enumerate(samples):
        own = rows.k if centres is None else rows.k - centres[place]
        queries.append(rows.q.norm(dim=-1).amax((0, 2)))
        keys.append(own.norm(dim=-1).amax((0, 2)))
    return tuple((torch.stack(queries).amax(0) * torch.stack(keys).amax(0)).tolist())


def _own_mean(call: Call) -> bool:
    """Whether a sequence's own mean may be taken from its keys: no query may learn of keys that it cannot see."""
    return not (call.attention.mask.causal or call.attention.roles)


def _centres(calls: Sequence[Call], samples: Sequence[Sample], mean: bool) -> list[Tensor] | None:
    """None where near pairs have logits of their own: a shift of the far ones alone would change the weights."""
    if any(rows.near_q is not None for rows in samples) or calls[0].attention.alibi:
        return None
    if mean:
        return [rows.k.mean(2, keepdim=True) for rows in samples]
    total = torch.stack([_mean_key(rows) for rows in samples]).mean(0)
    return [total[None, :, None]] * len(samples)


def _mean_key(rows: Sample) -> Tensor:
    """Of each head, over the keys that a query sees: [H, d]."""
    seen = rows.visible.any(-2).expand(rows.k.shape[0], -1, -1)
    return (rows.k * seen.unsqueeze(-1)).sum((0, 2)) / seen.sum((0, 2)).clamp(min=1).unsqueeze(-1)


def _where_narrower(
    call: Call, centres: Sequence[Tensor], centred: Tensor, magnitudes: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Only key heads whose range it narrows are centred; all query heads that share one go together."""
    groups = _groups(call, len(centred))
    narrower = centred.unflatten(0, (-1, groups)).amax(1) < magnitudes.unflatten(0, (-1, groups)).amax(1)
    kept = narrower.repeat_interleave(groups)
    masked = [torch.where(kept[None, :, None, None], centre, 0.0) for centre in centres]
    return masked, torch.where(kept, centred, magnitudes)


def _groups(call: Call, heads: int) -> int:
    """Query heads for each key head."""
    return heads // call.inputs[1].shape[1]


def _by_key_head(call: Call, centre: Tensor) -> tuple[tuple[float, ...], ...]:
    each = centre[0, :: _groups(call, centre.shape[1]), 0]
    return tuple(tuple(float(f"{x:.6g}") for x in row) for row in each.tolist())


def _extremes(samples: Sequence[Sample], logits: Sequence[Tensor], near: int | None) -> tuple[Tensor, Tensor]:
    """Least and largest of the far pairs for each head, 0 where there are none."""
    lows, highs = [], []
    for rows, scores in zip(samples, logits, strict=True):
        far = rows.far(near)
        lows.append(torch.where(far, scores, torch.inf).amin((0, 2, 3)))
        highs.append(torch.where(far, scores, -torch.inf).amax((0, 2, 3)))
    low, high = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
    return torch.where(low.isinf(), 0.0, low), torch.where(high.isinf(), 0.0, high)


def _histogram(
    samples: Sequence[Sample], centres: Sequence[Tensor] | None, near: int | None, found: Logits
) -> tuple[tuple[float, ...], tuple[tuple[int, ...], ...]]:
    limit = max(found.centred if centres is not None and found.centred else found.magnitudes) or 1.0
    heads = len(found.least)
    counts = torch.zeros(heads, BINS, dtype=torch.int64)
    for place, rows in enumerate(samples):
        scores = rows.logits(None if centres is None else centres[place])
        far = rows.far(near).expand(scores.shape)
        for head in range(heads):
            values = scores[:, head][far[:, head]]
            counts[head] += torch.histc(values, BINS, -limit, limit).long().cpu()
    edges = torch.linspace(-limit, limit, BINS + 1, dtype=torch.float64)
    return tuple(edges.tolist()), tuple(tuple(row) for row in counts.tolist())
