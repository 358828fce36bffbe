"""The objective of a file over the tokens of all ranks, from what it is over those of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from fastgrad_compiler.analysis.means import problem
from fastgrad_compiler.ir.graph import Program
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

        What wraps the model, and hooks of its own, see a forward pass: then the results are made.
        """
        if serving() is None and hasattr(type(model), "loss") and not _is_watched(model):
            value: Tensor = model.loss(*inputs, *targets)  # type: ignore[operator]  # of the class that was generated
            return value
        results = model(*inputs)
        return self(*(results if isinstance(results, tuple) else (results,)), *targets)

    @cached_property
    def _problem(self) -> Diagnostic | None:
        name, along = self.program.objective, self.program.along
        return None if name is None or along is None else problem(self.program[name], along)


def _is_watched(model: nn.Module) -> bool:
    """Whether a call of what `loss` runs in place of `forward` does more than that, as with FSDP."""
    return any(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in vars(module)
        or module._compiled_call_impl is not None
        for module in model.modules()
        if hasattr(type(module), "loss")
    )
