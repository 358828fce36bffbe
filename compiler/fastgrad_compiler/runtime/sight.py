"""Which keys a query sees through its masks: padding aside, an interval of them, whose ends do not fall from a query to
the next. All that computes with intervals reads them here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .documents import document_ranges, document_runs

CPU = torch.device("cpu")


class Band(NamedTuple):
    """Queries [first, last), the keys [low, high) that they see, and those of them that all see, [inner, outer)."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    whole: tuple[int, int]


@dataclass(frozen=True)
class Sight:
    """What decides which keys a query sees, besides mask and documents; window: |i - j| < window, 0 without.

    degree: the most components of a token that are multiplied with each other; 1 without a polynomial.
    """

    causal: bool = False
    window: int = 0
    degree: int = 1

    def ranges(self, queries: int, keys: int, documents: Tensor | None, device: torch.device) -> Ranges:
        """The interval of keys that each query sees, some of which a mask may hide; documents [b, n]: ids or runs."""
        place = torch.arange(queries, device=device)
        first, behind = torch.zeros_like(place), torch.full_like(place, keys)
        if self.causal:
            behind = place + 1
        if self.window:
            first, behind = place - self.window + 1, behind.minimum(place + self.window)
        first, behind = first.clamp(0, keys)[None], behind.clamp(0, keys)[None]
        if documents is not None:
            begin, end = document_ranges(document_runs(documents))
            first, behind = first.maximum(begin), behind.minimum(end)
        return Ranges(first, behind.maximum(first), keys)


@dataclass(frozen=True)
class Ranges:
    """Tokens [first, behind) of the `others` of the other side for each token: int64 [batch or 1, tokens]."""

    first: Tensor
    behind: Tensor
    others: int

    def transposed(self) -> Ranges:
        """The tokens that see each of the others: an interval too, since both ends rise."""
        place = torch.arange(self.others, device=self.first.device).expand(self.first.shape[0], -1)
        first, behind = (
            torch.searchsorted(ends.contiguous(), place.contiguous(), right=True)
            for ends in (self.behind, self.first)
        )
        return Ranges(first, behind.maximum(first), self.first.shape[1])

    def of(self, batch: slice) -> Ranges:
        """Those of some sequences."""
        if self.first.shape[0] == 1:
            return self
        return Ranges(self.first[batch], self.behind[batch], self.others)

    def hold(self, flags: Tensor) -> Tensor:
        """bool [b, h, tokens]: whether one of flags, bool [b, h, others], is in a token's range."""
        counts = torch.nn.functional.pad(flags.cumsum(-1), (1, 0))
        ends = (x[:, None].expand(*flags.shape[:2], -1) for x in (self.first, self.behind))
        first, behind = (counts.gather(-1, end) for end in ends)
        return behind > first

    def hidden(self, tokens: tuple[int, int], others: tuple[int, int]) -> Tensor:
        """bool [batch or 1, tokens, others]: which of the others in [low, high) are outside of the ranges."""
        place = torch.arange(*others, device=self.first.device)
        first, behind = (x[:, slice(*tokens), None] for x in (self.first, self.behind))
        return (place < first) | (place >= behind)

    def hidden_from(self, places: Tensor) -> Tensor:
        """bool [b, .., others]: which are outside of the ranges of the tokens at places [b, ..]."""
        batch = places.shape[0]
        ends = (x.expand(batch, -1) for x in (self.first, self.behind))
        first, behind = (x.gather(1, places.flatten(1)).view(places.shape).unsqueeze(-1) for x in ends)
        place = torch.arange(self.others, device=places.device)
        return (place < first) | (place >= behind)

    def bands(self, size: int) -> Iterator[Band]:
        """Blocks of `size` tokens with the others that they see; reads the ranges."""
        tokens = self.first.shape[1]
        starts = torch.arange(0, tokens, size, device=self.first.device)
        lasts = (starts + size).clamp(max=tokens) - 1
        ends = (
            lasts + 1,
            self.first[:, starts].amin(0),
            self.behind[:, lasts].amax(0),
            self.first[:, lasts].amax(0),
            self.behind[:, starts].amin(0),
        )
        for first, last, low, high, inner, outer in torch.stack((starts, *ends), -1).tolist():
            yield Band((first, last), (low, high), (inner, max(inner, outer)))
