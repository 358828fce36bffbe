"""Runs the step form of a program on tensors: a node that looks back is computed for all tokens so far.

Nothing is kept but the inputs of such nodes, and each call computes their dense definition anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastgrad_compiler.attention.value import ATTENTION, Attention
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.flatten import Place, packed, single
from fastgrad_compiler.ir.graph import Node, Program, integer
from fastgrad_compiler.reference.interpret import Run, Values
from fastgrad_compiler.reference.operations_torch import TORCH

_TOKENS = -2  # the axis of tokens in rows, [.., n, d]; in what has a number for each token it is the last


@dataclass
class Kept:
    """What the calls so far left: the number of tokens, inputs by path and place, and results of the first call."""

    past: int = 0
    inputs: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    results: dict[str, list[Tensor]] = field(default_factory=dict)


def run_step(
    program: Program,
    inputs: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    kept: Kept,
    *,
    dtype: torch.dtype | None = None,
) -> Values:
    """The results for the next tokens, whose inputs are in the order of the signature; `kept` is brought up to date.

    Inputs without the dim `program.along` are those of the first call in every call. Raises ValueError as
    `interpret.run`, and where the program has no step form.
    """
    if program.step is None or program.along is None:
        raise ValueError(f"program {program.name} has no step form")
    source = program[program.step]
    dims = tuple(
        dim for dim in program.dims if dim.name != program.along
    )  # what it declares is of whole texts
    state = StepRun.start(replace(program, dims=dims), source, inputs, weights, dtype)
    state.kept = kept
    results = state.graph(source.name)
    kept.past += state.env.dims[program.along]
    return packed(results)


@dataclass
class StepRun(Run):
    """One call of a step form."""

    kept: Kept = field(default_factory=Kept)

    def _node(self, node: Node, inputs: list[Values], place: Place) -> Values:
        if node.op == "call" and node.get("once"):
            path = place.path(str(node["label"]))
            if path not in self.kept.results:
                self.kept.results[path] = self.graph(str(node["graph"]), list(map(single, inputs)), place)
            return packed(self.kept.results[path])
        if node.get("state") is not None:
            return self._of_all(node, list(map(single, inputs)), place.path(str(node["state"])))
        if node.get("past"):
            return self._placed(node, list(map(single, inputs)))
        return super()._node(node, inputs, place)

    def _of_all(self, node: Node, inputs: list[Tensor], path: str) -> Tensor:
        """The last results of a node that looks back."""
        given = [
            tensor if axis is None else self._history(path, index, tensor, axis)
            for index, (tensor, axis) in enumerate(zip(inputs, _token_axes(node), strict=True))
        ]
        result = TORCH[node.op](node, given, self.env)
        assert isinstance(result, Tensor)
        return result[..., -inputs[0].shape[_TOKENS] :, :]

    def _history(self, path: str, index: int, tensor: Tensor, axis: int) -> Tensor:
        before = self.kept.inputs.get((path, index))
        found = tensor if before is None else torch.cat((before, tensor), axis)
        self.kept.inputs[path, index] = found
        return found

    def _placed(self, node: Node, inputs: list[Tensor]) -> Tensor:
        """What tells positions, which go on from those before."""
        past = self.kept.past
        if node.op == "slice":
            start, stop = (Dim.of(_dim(node, key)) + past for key in ("start", "stop"))
            result = TORCH["slice"](node.with_attributes(start=start, stop=stop), inputs, self.env)
        elif node.op == "rotary":
            before = inputs[0].new_zeros((*inputs[0].shape[:_TOKENS], past, inputs[0].shape[-1]))
            result = TORCH["rotary"](node, [torch.cat((before, inputs[0]), _TOKENS)], self.env)
        else:
            key = "stop" if node.op == "arange" else "length"
            result = TORCH[node.op](
                node.with_attributes(**{key: Dim.of(_dim(node, key)) + past}), inputs, self.env
            )
        assert isinstance(result, Tensor)
        if node.op == "slice":
            return result
        return result[past:] if node.op == "arange" else result[..., past:, :]


def _dim(node: Node, key: str) -> int | Dim:
    value = node[key]
    return value if isinstance(value, Dim) else integer(value)


def _token_axes(node: Node) -> list[int | None]:
    """The axis of the tokens in each input of a node that looks back, None for weights."""
    if node.op in ATTENTION:
        rows = ("q", "k", "v", "near_q", "near_k")
        return [
            _TOKENS if role in rows else -1 for role in Attention.of(node).by_role(range(len(node.inputs)))
        ]
    first: list[int | None] = [_TOKENS] if node.op == "shift" else [_TOKENS, None]
    return [*first, *(-1 for _ in node.inputs[len(first) :])]
