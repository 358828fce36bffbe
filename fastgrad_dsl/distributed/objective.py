"""The objective of a file over the tokens of all ranks, from what it is over those of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from fastgrad_compiler.analysis.means import problem
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.runtime.in_turn import Given, loss_in_pieces
from fastgrad_compiler.runtime.pieces import serving
from fastgrad_dsl.distributed.context import mean_over_tokens
from fastgrad_grammar.diagnostics import Diagnostic, TfgError


@dataclass(frozen=True)
class Objective:
    """The generated function of an objective; in pieces, the mean of its values by the tokens of each.

    That is the objective of the whole where it is a sum of means over tokens with constant factors. Any other raises
    TfgError FG501 within `context_parallel`.
    """

    function: Callable[..., Tensor]
    program: Program = field(repr=False)

    def __call__(self, *given: Tensor) -> Tensor:
        value = self.function(*given)
        if serving() is None:
            return value
        if self._problem is not None:
            raise TfgError([self._problem])
        return mean_over_tokens(value, given[0].numel())

    def of(self, model: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The objective of a model's results, by its method `loss` where it has one, which makes no logits.

        What wraps the model, and hooks of its own, see a forward pass: then the results are made. Where the budget's
        `memory` asks for it, the sequence runs in pieces, one after the other, which gives the same numbers up to
        rounding.
        """
        if (tokens := self._tokens_of_a_piece(inputs)) is not None:
            return self._in_pieces(model, inputs, targets, tokens)
        if serving() is None and hasattr(type(model), "loss") and not _is_watched(model):
            value: Tensor = model.loss(*inputs, *targets)  # type: ignore[operator]  # of the class that was generated
            return value
        results = model(*inputs)
        return self(*(results if isinstance(results, tuple) else (results,)), *targets)

    def _tokens_of_a_piece(self, inputs: Sequence[Tensor]) -> int | None:
        """None where the sequence runs as a whole: no pieces were planned, or it is no longer than one."""
        memory = self.program.memory
        if memory is None or memory.piece is None or serving() is not None:
            return None
        longest = max(
            x.shape[axis] for x, axis in self._placed(inputs, self.program.main) if axis is not None
        )
        return memory.piece if longest > memory.piece else None

    def _in_pieces(
        self, model: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor], tokens: int
    ) -> Tensor:
        placed = self._placed(inputs, self.program.main)
        results = len(self.program[self.program.main].outputs)
        others = self._placed(targets, str(self.program.objective), results)
        with torch.compiler.set_stance("force_eager"):  # what was compiled runs whole sequences
            return loss_in_pieces(model, self.function, placed, others, tokens)

    def _placed(self, tensors: Sequence[Tensor], graph: str, first: int = 0) -> list[Given]:
        """With the axis of each along the tokens, None where it has none; from the input `first` of a graph on."""
        along, nodes = self.program.along, self.program[graph].inputs[first:]
        axes = (
            next((axis for axis, dim in enumerate(node.tensor.shape) if along in dim.names), None)
            for node in nodes
        )
        return list(zip(tensors, axes, strict=True))

    @cached_property
    def _problem(self) -> Diagnostic | None:
        name, along = self.program.objective, self.program.along
        return None if name is None or along is None else problem(self.program[name], along)


def _is_watched(model: nn.Module) -> bool:
    """Whether a call of what `loss` runs in place of `forward` does more than that, as with FSDP, or ranks share it."""
    return any(type(each) is not nn.Parameter for each in model.parameters()) or any(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in vars(module)
        or module._compiled_call_impl is not None
        for module in model.modules()
        if hasattr(type(module), "loss")
    )
