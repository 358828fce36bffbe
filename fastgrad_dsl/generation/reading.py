"""What a text leaves behind for the token after it: state, logits, and which tokens it has; in memory, in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fastgrad_dsl.generation.step_form import StepModel
from fastgrad_dsl.models.batches import check_memory
from fastgrad_dsl.models.state_file import load_state, save_state
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import check_regular

if TYPE_CHECKING:
    from fastgrad_compiler.runtime.state import State

SHORT_CALL = 2048  # tokens that are read in one call whatever their logits take
LARGEST_LOGITS = 1 << 28  # entries of the logits of a call
LONG_CACHE = 1 << 10  # tokens: longer than a cache that no length is asked for
MOST_TOKENS = 1 << 53  # all numbers of tokens up to it are floats
LOGITS, SEEN = "next.logits", "next.seen"
"""Names in a file besides those of the model's state."""


@dataclass(frozen=True)
class Reading:
    """What was read so far: a state, logits [b, vocab] of the next token, and which tokens were seen, bool [b, vocab].

    The state is updated in place by whatever goes on from it: go on from a `clone` to use a reading again.
    """

    state: State
    logits: Tensor
    seen: Tensor

    @property
    def rows(self) -> int:
        """The size of the batch."""
        return self.logits.shape[0]

    def clone(self) -> Reading:
        """A reading of its own."""
        return Reading(self.state.clone(), self.logits, self.seen)

    def repeat(self, times: int) -> Reading:
        """The batch, so many times after each other. Raises TfgError FG426 if its states do not fit into memory."""
        if times == 1:
            return self
        check_memory(f"the state of {times} samples", times * self.state.nbytes)
        return Reading(self.state.repeat(times), self.logits.repeat(times, 1), self.seen.repeat(times, 1))


def read(model: StepModel, tokens: Tensor, after: Reading | None = None) -> Reading:
    """Read int64 [b, c], c at least 1, from the beginning or after what was read; the state of `after` is updated.

    The model runs as in evaluation, without gradients. Raises TfgError FG437 for an id that the model does not have,
    ValueError if there are no tokens, or if `after` is of a batch of another size.
    """
    rows, count = tokens.shape
    if not count:
        raise ValueError("there are no tokens to read")
    if after is not None and after.rows != rows:
        raise ValueError(f"the tokens have a batch of {rows}, and what was read before one of {after.rows}")
    training, tokens = model.training, tokens.to(_device(model))
    if training:
        model.train(False)
    try:
        with torch.no_grad():
            state = model.start(rows) if after is None else after.state
            longest = count if count <= SHORT_CALL else _longest_call(model, tokens, state)
            for first in range(0, count, longest):
                logits, state = model.step(tokens[:, first : first + longest], state)
    except IndexError:
        ids = f"from {int(tokens.min())} to {int(tokens.max())}"
        raise TfgError.of(
            "FG437", f"the prompt has ids {ids}, some of which the model does not have"
        ) from None
    finally:
        if training:
            model.train()
    last = logits[:, -1].clone()
    seen = torch.zeros(last.shape, dtype=torch.bool) if after is None else after.seen
    return Reading(state, last, seen.scatter(-1, tokens.cpu(), True))


def _longest_call(model: StepModel, tokens: Tensor, state: State) -> int:
    """How many tokens to read at once: all, unless their logits would take more memory than all else."""
    logits, _ = model.step(tokens[:, :1], state.clone())
    return max(SHORT_CALL, LARGEST_LOGITS // logits.numel())


def _device(model: StepModel) -> torch.device:
    weight = next(iter(model.parameters()), None)
    return torch.device("cpu") if weight is None else weight.device


def save_reading(reading: Reading, model: StepModel, path: Path) -> None:
    """One file with the state and what else a reading has. Raises OSError if it cannot be written."""
    whole = reading.state.clone()
    whole.tensors |= {LOGITS: reading.logits, SEEN: reading.seen}
    save_state(whole, path, cast(nn.Module, model))


def load_reading(model: StepModel, path: Path) -> Reading:
    """The reading of a file. Raises TfgError FG435 if it is damaged, or of another model."""
    try:
        check_regular(path)
        state = load_state(path, model)
        state.capacity = 0  # whatever the file asks for: caches grow by what is read
        logits, seen = state.tensors.pop(LOGITS), state.tensors.pop(SEEN).cpu()
        fits = (
            logits.ndim == 2
            and logits.is_floating_point()
            and seen.shape == logits.shape
            and seen.dtype == torch.bool
        )
        if not fits or not _is_sound(state, model, logits.shape[0]):
            raise ValueError(f"{path} has tensors that are not those of the model's state")
    except OSError as error:
        raise TfgError.of("FG435", f"cannot read the state {path}: {error.strerror or error}") from None
    except KeyError:
        raise TfgError.of("FG435", f"{path} was not written by `fastgrad generate --save-state`") from None
    except ValueError as error:
        raise TfgError.of("FG435", str(error)) from None
    return Reading(state, logits, seen)


def _is_sound(state: State, model: StepModel, rows: int) -> bool:
    """Whether a state has the tensors of a fresh one, and caches that hold all its tokens."""
    position = int(state.position)
    fresh, longer = (model.start(rows, capacity=capacity).tensors for capacity in (0, LONG_CACHE))
    if not 0 <= position <= MOST_TOKENS or state.tensors.keys() != fresh.keys():
        return False
    for path, found in state.tensors.items():
        one, other = fresh[path], longer[path]
        if (found.dtype, found.ndim) != (one.dtype, one.ndim):
            return False
        for size, a, b in zip(found.shape, one.shape, other.shape, strict=True):
            if (size != a) if a == b else (size < position):
                return False
    return True
