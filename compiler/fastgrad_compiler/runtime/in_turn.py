"""A sequence in pieces that run one after the other, so that activations are those of one piece at a time.

What looks back is given what earlier pieces leave for it: the last tokens that it sees, and sums of features. These are
kept, activations of the piece are not: the backward pass goes from the last piece to the first, runs each once again,
and hands the gradients of what it was given to those before. Nothing is cut off: gradients are those of the whole.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .piece_run import PieceRun
from .pieces import Layout, served

Given = tuple[Tensor, "int | None"]
"""A tensor and its axis along the tokens; None: it is the same for all of them."""


def loss_in_pieces(
    model: nn.Module,
    loss: Callable[..., Tensor],
    inputs: Sequence[Given],
    others: Sequence[Given],
    tokens: int,
) -> Tensor:
    """loss(model(inputs), others) of a generated model, its sequences in pieces of at most so many tokens.

    others: what the loss takes after the model's results. The loss is a mean over tokens, or made of such means with
    constant factors. Within torch.no_grad nothing but what is left for later pieces is kept.

    Raises ValueError for pieces of less than one token, or lengths that differ, and where a guard would have to change
    what the model computes; TypeError for a model without a step form.
    """
    lengths = _lengths(inputs, others, tokens)
    shares: list[Tensor] = []
    left: tuple[Held, ...] = ()
    for rank in range(len(lengths)):
        layout = Layout(lengths, rank)
        first, last = layout.offset, layout.offset + lengths[rank]
        piece = _Piece(model, loss, layout, _cut(inputs, first, last), _cut(others, first, last))
        if torch.is_grad_enabled():
            share, left = checkpoint(piece, left, use_reentrant=False)
        else:
            share, left = piece(left)
        shares.append(share)
    return torch.stack(shares).sum()


def _lengths(inputs: Sequence[Given], others: Sequence[Given], tokens: int) -> tuple[int, ...]:
    sizes = {x.shape[axis] for x, axis in (*inputs, *others) if axis is not None}
    if tokens < 1:
        raise ValueError(f"pieces of {tokens} tokens: expected at least 1")
    if len(sizes) != 1:
        raise ValueError(f"tokens of one length are expected, not of {sorted(sizes)}")
    (length,) = sizes
    whole, rest = divmod(length, tokens)
    return (tokens,) * whole + ((rest,) if rest or not whole else ())


def _cut(given: Sequence[Given], first: int, last: int) -> tuple[Tensor, ...]:
    return tuple(x if axis is None else x.narrow(axis, first, last - first) for x, axis in given)


@dataclass(frozen=True)
class _Piece:
    """The share of a piece in the loss, and what it leaves for later ones."""

    model: nn.Module
    loss: Callable[..., Tensor]
    layout: Layout
    inputs: tuple[Tensor, ...]
    others: tuple[Tensor, ...]

    def __call__(self, given: tuple[Held, ...]) -> tuple[Tensor, tuple[Held, ...]]:
        give_back()
        layout = TurnLayout(self.layout.lengths, self.layout.rank, given)
        with served(_InTurn(layout)):
            results = self.model(*self.inputs)
        several = results if isinstance(results, tuple) else (results,)
        share = self.loss(*several, *self.others) * (layout.lengths[layout.rank] / sum(layout.lengths))
        return share, tuple(layout.left)


def give_back() -> None:
    """Return to the system what the allocator holds unused, which it does not do by itself where what pieces leave lies
    in between: a process would hold two to three times the bytes of its tensors."""
    if _TRIM is not None:
        _TRIM(0)


_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # of glibc alone


@dataclass(frozen=True)
class Held:
    """What is left for one place that looks back: tokens from the place `first` on, in parts, or one tensor of sums."""

    parts: tuple[Tensor, ...]
    first: int = 0


@dataclass
class TurnLayout(Layout):
    """A piece that is given what the piece before left, in the order in which it is asked for."""

    given: tuple[Held, ...] = ()
    left: list[Held] = field(default_factory=list)

    def tokens_from(self, x: Tensor, axis: int, starts: Sequence[int]) -> Tensor:
        """As the base class says."""
        held = self._held() or Held((), self.offset)
        end = self.offset + x.shape[axis]
        needed = min((start for start in starts[self.rank + 1 : len(self.lengths)]), default=end)
        self.left.append(_since(Held((*held.parts, x), held.first), needed, axis))
        found = [x.narrow(axis, 0, 0), *_since(held, starts[self.rank], axis).parts]
        return torch.cat(found, axis)

    def earlier_sum(self, sums: Tensor, log_decay: Tensor | None) -> Tensor:
        """As the base class says."""
        held = self._held()
        before = torch.zeros_like(sums) if held is None else held.parts[0]
        decayed = before if log_decay is None else before * log_decay.exp().unsqueeze(-1)
        self.left.append(Held((decayed + sums,)))
        return before

    def _held(self) -> Held | None:
        return self.given[len(self.left)] if self.given else None


def _since(held: Held, first: int, axis: int) -> Held:
    """The tokens from a place on, without those before: a part that is cut is copied, so that they are not kept."""
    kept, place, start = [], held.first, None
    for part in held.parts:
        count = part.shape[axis]
        cut = min(max(0, first - place), count)
        if cut < count:
            start = place + cut if start is None else start
            kept.append(part if cut == 0 else part.narrow(axis, cut, count - cut).clone())
        place += count
    return Held(tuple(kept), place if start is None else start)


class _InTurn(PieceRun):
    """Serves a model for one piece."""

    def __init__(self, layout: TurnLayout) -> None:
        self.layout: TurnLayout = layout

    def enter(self, tokens: int, batch: int | None, device: torch.device) -> Layout:
        """The layout that is known beforehand."""
        return self.layout
