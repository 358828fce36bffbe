"""How well a model does on what is held out: its loss, or how close an encoder's results are to the original's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad_compiler.ir.graph import Program, TensorType
from fastgrad_dsl.conversion.document import What
from fastgrad_dsl.conversion.inputs import Inputs, Texts
from fastgrad_dsl.conversion.objective import AttentionTransfer, relative_error
from fastgrad_dsl.models.text_data import TextData
from fastgrad_dsl.training.language import token_limit
from fastgrad_dsl.training.loop import Loss, Options, validation_loss
from fastgrad_dsl.training.stopping import Stop
from fastgrad_grammar.diagnostics import TfgError

LONGER = 4  # times the length of training, at which the report looks too
BATCHES = 8  # of held-out text, at the length of training
COMPARED, ROWS = 512, 16  # texts whose similarities are compared, at most, and how many at a time


@dataclass(frozen=True)
class Task:
    """What a model is for: its data, its loss, and what the report calls that."""

    data: TextData | Texts
    inputs: Inputs
    loss: Loss
    what: What


@dataclass
class HeldOut:
    """Measurements on held-out text, of the lengths and batches of `options`; `say` tells what is not measured.

    wanted: the original's vectors of held-out texts, by length.
    """

    task: Task
    original: nn.Module
    program: Program
    options: Options
    transfer: AttentionTransfer
    stop: Stop
    say: Callable[[str], None]
    wanted: dict[int, Tensor] = field(default_factory=dict)

    def numbers(self, model: nn.Module) -> list[tuple[What, int, float]]:
        """What is known of a model as it is: (what, tokens, value). TfgError FG433 where one is not finite."""
        found: list[tuple[What, int, float]] = []
        for tokens in self.lengths:
            if self.embeds:
                error, correlation = self.compared(model, tokens)
                found += [(self.task.what, tokens, error), ("rank correlation", tokens, correlation)]
            else:
                found.append((self.task.what, tokens, self.value(self.task.loss, tokens, model)))
        tokens = self.options.tokens
        found.append(("attention error", tokens, self.value(self.transfer, tokens, model)))
        for what, tokens, value in found:
            if not math.isfinite(value):
                raise TfgError.of(
                    "FG433", f"the {what} at {tokens} tokens is {value}: the conversion is stopped"
                )
        return found

    def of_original(self, what: What, tokens: int) -> float:
        """A number of the original; what compares with it is known."""
        if what == "loss":
            return self.value(self.task.loss, tokens, self.original)
        return 1.0 if what == "rank correlation" else 0.0

    @cached_property
    def lengths(self) -> list[int]:
        """That of training, and a longer one where model and text allow it."""
        tokens, longer = self.options.tokens, LONGER * self.options.tokens
        data, limit = self.task.data, token_limit(self.program)
        held_out = data.longest if isinstance(data, Texts) else data.validation.numel() - 1
        needed = tokens + 1 if isinstance(data, Texts) else longer
        fits = held_out >= needed and (limit is None or longer <= limit)
        if not fits:
            self.say(f"nothing is measured at {longer} tokens: the model or the held-out text is shorter")
        return [tokens, longer] if fits else [tokens]

    def value(self, loss: Loss, tokens: int, model: nn.Module) -> float:
        """A loss on held-out text; at a greater length on as many tokens."""
        times = 1 if isinstance(self.task.data, Texts) else max(1, tokens // self.options.tokens)
        batches = max(1, BATCHES // times)
        options = replace(self.options, tokens=tokens, validation_batches=batches)
        return validation_loss(model, loss, self.task.data, options, self.stop.check)

    @cached_property
    def embeds(self) -> bool:
        """Whether the model gives one vector for each text, and nothing else."""
        result = self.program[self.program.main].output_type
        return isinstance(self.task.data, Texts) and isinstance(result, TensorType) and len(result.shape) == 2

    def compared(self, model: nn.Module, tokens: int) -> tuple[float, float]:
        """The error of the held-out texts' vectors, and Spearman's correlation of the cosine similarities of all pairs.

        Both against the original's.
        """
        from scipy.stats import spearmanr

        if tokens not in self.wanted:
            self.wanted[tokens] = self.vectors(self.original, tokens)
        wanted, given = self.wanted[tokens], self.vectors(model.eval(), tokens)
        rows, columns = torch.triu_indices(len(given), len(given), 1)
        pairs: list[Any] = []
        for vectors in (wanted, given):
            unit = nn.functional.normalize(vectors.double(), dim=-1)
            pairs.append((unit @ unit.T)[rows, columns].numpy())
        found: Any = spearmanr(*pairs)
        return relative_error(given, wanted, None).item(), float(found.statistic)

    @torch.no_grad()
    def vectors(self, model: nn.Module, tokens: int) -> Tensor:
        """What a model gives for the held-out texts, of which it takes so many tokens."""
        made = []
        for packed, _ in self.task.data.validation_batches(tokens, ROWS, COMPARED // ROWS):
            self.stop.check()
            made.append(model(*self.task.inputs.unpacked(packed)))
        return torch.cat(made)
