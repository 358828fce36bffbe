"""What generation asks of a model: the step form of generated modules whose only input is tokens, and its state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor, nn

from fastgrad_grammar.diagnostics import TfgError

if TYPE_CHECKING:
    from fastgrad_compiler.runtime.state import State


class StepModel(Protocol):
    """A module with a step form (docs/generation.md)."""

    training: bool

    def train(self, mode: bool = True) -> object:
        """As that of nn.Module."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As those of nn.Module."""
        ...

    def start(self, batch_size: int, *, capacity: int = 0) -> State:
        """The state before the first token."""
        ...

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits [b, c, vocab] of the tokens after each of int64 [b, c], and the state, which is updated in place."""
        ...


def has_steps(model: nn.Module) -> bool:
    """Whether a module has a step form whose only input is tokens."""
    return why_not(model) is None


def step_form(model: nn.Module) -> StepModel:
    """A module as what runs token by token. Raises TfgError FG434, which says why, if it is none."""
    reason = why_not(model)
    if reason is not None:
        help_ = "`fastgrad generate` names the place in a .tfg file that has no step form"
        raise TfgError.of("FG434", f"{type(model).__name__} cannot be run token by token: {reason}", help_)
    return cast(StepModel, model)


def why_not(model: nn.Module) -> str | None:
    """Why a module cannot be run token by token; None if it can."""
    if not hasattr(model, "start"):
        return "it was generated without a step form"
    fixed, tokens = getattr(model, "FIXED", ()), getattr(model, "TOKENS", None)
    if fixed or (tokens is not None and [(kind, len(shape)) for _, kind, shape in tokens] != [("int", 2)]):
        return "it takes other inputs than tokens"
    return None
