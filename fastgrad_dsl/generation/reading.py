"""What a text leaves behind for the token after it: state, logits, and which tokens it has; in memory, in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from fastgrad_dsl.generation.step_form import State, StepModel
from fastgrad_dsl.models.batches import check_memory
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.storage.weights import read_whole
from fastgrad_grammar.diagnostics import TfgError

LONGEST_CALL = 2048  # tokens: the logits of a longer text would take more memory than all else
OWN = "next."  # before the names of what a file holds besides the model's state
LOGITS, SEEN = f"{OWN}logits", f"{OWN}seen"


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
    model.train(False)
    try:
        with torch.no_grad():
            state = model.start(rows) if after is None else after.state
            for first in range(0, count, LONGEST_CALL):
                logits, state = model.step(tokens[:, first : first + LONGEST_CALL], state)
    except IndexError:
        ids = f"from {int(tokens.min())} to {int(tokens.max())}"
        raise TfgError.of(
            "FG437", f"the prompt has ids {ids}, some of which the model does not have"
        ) from None
    finally:
        model.train(training)
    last = logits[:, -1].clone()
    seen = torch.zeros(last.shape, dtype=torch.bool) if after is None else after.seen
    return Reading(state, last, seen.scatter(-1, tokens.cpu(), True))


def _device(model: StepModel) -> torch.device:
    weight = next(iter(model.parameters()), None)
    return torch.device("cpu") if weight is None else weight.device


def save_reading(reading: Reading, model: StepModel, path: Path) -> None:
    """One file with the model's state and what else a reading has. Raises OSError if it cannot be written."""
    with TemporaryDirectory() as folder:
        part = Path(folder, "state")
        reading.state.save(part, model)
        tensors, header = read_whole(part, "FG435", "the state")
    own = {LOGITS: reading.logits.contiguous(), SEEN: reading.seen.contiguous()}
    write_atomically(path, save({**tensors, **own}, header))


def load_reading(model: StepModel, path: Path) -> Reading:
    """The reading of a file. Raises TfgError FG435 if it is damaged, or of another model."""
    tensors, header = read_whole(path, "FG435", "the state")
    logits, seen = tensors.pop(LOGITS, None), tensors.pop(SEEN, None)
    if logits is None or seen is None or logits.ndim != 2 or seen.shape != logits.shape:
        raise TfgError.of(
            "FG435", f"{path} does not hold a state that `fastgrad generate --save-state` wrote"
        )
    with TemporaryDirectory() as folder:
        part = Path(folder, "state")
        save_file(tensors, part, header)
        try:
            state = model.load_state(part)
        except ValueError as error:
            said = str(error).replace(str(part), str(path))
            raise TfgError.of("FG435", f"cannot use the state {path}: {said}") from None
    return Reading(state, logits, seen.bool())
