"""The objective of a file over the tokens of all ranks, from what it is over those of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_compiler.runtime.pieces import serving
from fastgrad_dsl.distributed.context import mean_over_tokens
from fastgrad_grammar.diagnostics import Diagnostic, TfgError

MEANS = frozenset(("mean", "cross_entropy", "linear_cross_entropy", "mse"))
LINEAR = frozenset(("add", "sub", "neg", "mean", "sum", "cast", "reshape"))


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


def problem(graph: Graph, along: str) -> Diagnostic | None:
    """Why an objective is no sum of means over tokens with constant factors; None if it is."""
    of_tokens: set[str] = set()
    means: set[str] = set()
    for node in graph.nodes:
        given = of_tokens.intersection(node.inputs)
        if any(along in dim.names for dim in node.tensor.shape):
            bad = bool(means.intersection(node.inputs))
            of_tokens.add(node.name)
        elif given:
            bad = (
                node.op not in MEANS or node.get("ignored") is not None
            )  # ranks differ in how many tokens count
            means.add(node.name)
        else:
            bad = not _is_linear(node, means)
            means.update([node.name] if means.intersection(node.inputs) else [])
        if bad:
            message = f"no value in pieces along {along}: an objective is a sum of means over tokens there"
            return Diagnostic("FG501", message, node.span or graph.span)
    return None


def _is_linear(node: Node, means: set[str]) -> bool:
    """Whether a value changes in proportion with the means that it is made of."""
    of_means = [name in means for name in node.inputs]
    if not any(of_means) or node.op in LINEAR:
        return True
    return (node.op == "mul" and sum(of_means) == 1) or (node.op == "div" and of_means == [True, False])
