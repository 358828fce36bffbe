"""A generated model on a piece of a sequence: its step form, with gradients, from where the piece begins."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention_op import Inputs
from .piece_attention import Whole, attention_of_piece
from .pieces import Layout
from .state import LIKE, State
from .step_tokens import Rule


class PieceRun:
    """Serves the models of a process (`pieces.Pieces`); `layout` is that of the model that runs."""

    layout: Layout

    def enter(self, tokens: int, batch: int | None, device: torch.device) -> Layout:
        """The layout of a model that is given so many tokens, of so many sequences where that is known."""
        raise NotImplementedError

    def run(self, model: nn.Module, *given: Any, **named: Any) -> Any:
        """What `forward` of a generated model gives for this piece. TypeError for one without a step form."""
        kind: Any = type(model)
        if not hasattr(kind, "STEP"):
            raise TypeError(
                f"model {kind.__name__} has no step form, and so it cannot run on a piece of a sequence"
            )
        inputs = inspect.signature(kind.forward).bind(model, *given, **named).arguments
        tokens = [inputs[name] for name, *_ in kind.TOKENS]
        fixed = [inputs[name] for name, *_ in kind.FIXED]
        state = _PieceState(self, kind, tokens[0].device, _like(model, tokens), _sizes(kind, fixed))
        if any(x.numel() == 0 for x in tokens):
            state.enter(kind.STEP, 0)  # others may wait for this one's length
        *results, _ = kind.step.__wrapped__(model, *tokens, state, *fixed)
        return results[0] if len(results) == 1 else tuple(results)

    def before(self, x: Tensor, axis: int, count: int) -> Tensor:
        """The last `count` tokens before this piece along an axis, zeros where there are fewer."""
        found = self.layout.tokens_from(x, axis, self.layout.since(count))
        missing = list(x.shape)
        missing[axis] = count - found.shape[axis]
        return torch.cat((x.new_zeros(missing), found), axis)

    def attention(self, inputs: Inputs, rule: Rule, whole: Whole | None, native: Any, guard: str) -> Tensor:
        """The causal attention of this piece's tokens to all before them."""
        return attention_of_piece(inputs, rule, whole, native, guard, self.layout)


class _PieceState(State):
    """The state of a step form that runs on a piece, which begins where earlier pieces end."""

    def __init__(
        self, served: PieceRun, kind: Any, device: torch.device, like: torch.dtype, sizes: dict[str, int]
    ) -> None:
        position = torch.zeros((), dtype=torch.int64, device=device)
        super().__init__(kind.STEP, position, {LIKE: torch.zeros((), dtype=like, device=device)}, 0, sizes)
        self.served, self.pieces, self.starting = served, served, True

    def enter(self, model: str, tokens: int, *, batch: int | None = None, at_most: int | None = None) -> None:
        """Find where the piece begins. ValueError where sequences are longer than declared."""
        layout = self.served.enter(tokens, batch, self.position.device)
        if at_most is not None and sum(layout.lengths) > at_most:
            raise ValueError(f"{sum(layout.lengths)} tokens, but the model is declared for at most {at_most}")
        self.served.layout, self.known = layout, layout.offset
        self.position.fill_(layout.offset)

    def advance(self, tokens: int) -> State:
        """Nothing goes on after a piece."""
        return self


def _like(model: nn.Module, tokens: Sequence[Tensor]) -> torch.dtype:
    """The dtype of a model."""
    floats = (x.dtype for x in (*model.parameters(), *model.buffers(), *tokens) if x.is_floating_point())
    return next(floats, torch.get_default_dtype())


def _sizes(kind: Any, fixed: Sequence[Tensor]) -> dict[str, int]:
    """The run-time dims of the inputs that are the same for all tokens."""
    pairs = zip(kind.FIXED, fixed, strict=True)
    named = ((name, size) for (_, _, shape), x in pairs for name, size in zip(shape, x.shape, strict=True))
    return {name: size for name, size in named if isinstance(name, str)}
