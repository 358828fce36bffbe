"""A sequence in pieces, on several ranks or one after the other: what serves generated models then.

A model runs its step form on a piece, with a state that says where the piece begins. What looks back asks `Pieces` of
that state for what earlier pieces hold. The packages of a process, each with its copy of this file, share one setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

_KEY = "pieces"


@dataclass
class Layout:
    """Where the pieces of a sequence are: their lengths in order, and which one this is, by its rank among them.

    Its subclasses say how a piece is given what earlier ones hold; all pieces ask for it in the same order.
    """

    lengths: tuple[int, ...]
    rank: int
    SENDS: ClassVar[bool] = False  # whether other processes have the other pieces

    @property
    def offsets(self) -> tuple[int, ...]:
        """The place of each piece's first token, and after them the length of the sequence."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def offset(self) -> int:
        """The place of this piece's first token."""
        return self.offsets[self.rank]

    def since(self, count: int) -> tuple[int, ...]:
        """By piece: the place `count` tokens before it, at least 0."""
        return tuple(max(0, offset - count) for offset in self.offsets[:-1])

    def tokens_from(self, x: Tensor, axis: int, starts: Sequence[int]) -> Tensor:
        """The tokens [starts[rank], offset) along an axis, which earlier pieces hold; x: those of this piece.

        starts: for every piece where the tokens that it asks for begin, at most its offset.
        """
        raise NotImplementedError

    def earlier_sum(self, sums: Tensor, log_decay: Tensor | None) -> Tensor:
        """The sums of all earlier pieces; sums: [b, h, r, c] of this one.

        log_decay, [b, h, 1]: the logarithm of what is left after this piece of sums before it; None: all of them.
        """
        raise NotImplementedError

    def begin_sum(
        self, sums: Tensor, log_decay: Tensor | None, *, later: bool = False
    ) -> Callable[[], Tensor]:
        """Begin to send sums: a function that waits for those of all earlier pieces, or of all later ones.

        In place of `earlier_sum` where `SENDS`; without gradients.
        """
        raise NotImplementedError


class Pieces(Protocol):
    """Where the pieces of a sequence are; all of it differentiable, and called for every piece in the same order."""

    def run(self, model: nn.Module, *given: Any, **named: Any) -> Any:
        """What `forward` of a generated model gives for this piece."""

    def before(self, x: Tensor, axis: int, count: int) -> Tensor:
        """The last `count` tokens before this piece along an axis, zeros where there are fewer."""

    def attention(self, inputs: Any, rule: Any, whole: Any, native: Any, guard: str) -> Tensor:
        """The causal attention of this piece's tokens to all before them."""


def serving() -> Pieces | None:
    """What serves the models of this process; None where they have whole sequences."""
    found: Pieces | None = vars(torch.ops.fastgrad).get(_KEY)
    return found


def refuse_pieces() -> None:
    """RuntimeError where they have pieces: what runs next is made for whole sequences."""
    if serving() is not None:
        raise RuntimeError(
            "`model.loss` takes whole sequences: in pieces, `compiled.loss(model(inputs), targets)`"
        )


@contextmanager
def served(pieces: Pieces) -> Iterator[None]:
    """Within it the models of this process run on pieces of sequences."""
    before = serving()
    vars(torch.ops.fastgrad)[_KEY] = pieces
    try:
        yield
    finally:
        vars(torch.ops.fastgrad)[_KEY] = before
