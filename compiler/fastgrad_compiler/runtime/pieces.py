"""A sequence of which each rank of a group holds a piece: what serves generated models then.

A model runs its step form on its piece, with a state that says where the piece begins. What looks back asks `Pieces` of
that state for what earlier ranks hold. The packages of a process, each with its copy of this file, share one setting.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

_KEY = "pieces"


class Pieces(Protocol):
    """Where the pieces of a sequence are; all of it differentiable, and called by every rank in the same order."""

    def run(self, model: nn.Module, *given: Any, **named: Any) -> Any:
        """What `forward` of a generated model gives for this rank's piece."""

    def before(self, x: Tensor, axis: int, count: int) -> Tensor:
        """The last `count` tokens before this piece along an axis, zeros where there are fewer."""

    def attention(self, inputs: Any, rule: Any, whole: Any, guard: str) -> Tensor:
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


def serve(pieces: Pieces | None) -> None:
    """Set what serves them."""
    vars(torch.ops.fastgrad)[_KEY] = pieces
