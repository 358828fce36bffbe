"""What generation asks of a model: the step form that generated modules have, and their state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Self, cast

from torch import Tensor, nn

from fastgrad_grammar.diagnostics import TfgError


class State(Protocol):
    """What a model keeps of the tokens that it has read, for each sequence of a batch."""

    @property
    def position(self) -> Tensor:
        """How many tokens were read: int64, a scalar."""
        ...

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        ...

    def clone(self) -> Self:
        """A state of its own, which steps of this one do not change."""
        ...

    def __getitem__(self, rows: slice) -> Self:
        """The state of some sequences of the batch."""
        ...

    def repeat(self, times: int) -> Self:
        """The state of the batch, so many times after each other."""
        ...

    def save(self, path: Path, model: StepModel) -> None:
        """Write a safetensors file that names the model by a hash."""
        ...


class StepModel(Protocol):
    """A model whose only inputs are tokens, with its step form."""

    training: bool

    def train(self, mode: bool = True) -> object:
        """As that of nn.Module."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As those of nn.Module."""
        ...

    def start(self, batch_size: int) -> State:
        """The state before the first token."""
        ...

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits [b, c, vocab] of the tokens after each of int64 [b, c], and the state, which is updated in place."""
        ...

    def load_state(self, path: Path) -> State:
        """The state of a file that `State.save` wrote; ValueError if it is another model's."""
        ...


def has_steps(model: nn.Module) -> bool:
    """Whether a module has a step form."""
    return hasattr(model, "start")


def step_form(model: nn.Module) -> StepModel:
    """A module as what runs token by token. Raises TfgError FG434, which says why, if it has no step form."""
    if not has_steps(model):
        said = f"{type(model).__name__} cannot be run token by token: {why_not(model)}"
        raise TfgError.of("FG434", said)
    return cast(StepModel, model)


def why_not(model: nn.Module) -> str:
    """Why a module has no step form."""
    return "it was generated without a step form"
