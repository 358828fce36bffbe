"""Runs a program on tensors, at any stage: running before and after a pass shows what the pass preserves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Self, TypeAlias

import torch
from torch import Tensor

from fastgrad_compiler.ir.calls import backward_of, iterations
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.flatten import ROOT, Place, is_float, packed, single
from fastgrad_compiler.ir.graph import Graph, Node, Program, TensorType, integer
from fastgrad_compiler.reference.operations_torch import TORCH
from fastgrad_compiler.reference.torch_env import Env

Values: TypeAlias = "Tensor | tuple[Tensor, ...]"
Attend: TypeAlias = Callable[[str, Node, list[Tensor]], Tensor]  # (full path, node, its inputs) -> result


def run(
    program: Program,
    inputs: Mapping[str, Tensor] | Sequence[Tensor],
    weights: Mapping[str, Tensor],
    *,
    graph: str | None = None,
    dtype: torch.dtype | None = None,
    attend: Attend | None = None,
) -> Values:
    """The results of `graph` (by default main), a tuple where there are several.

    `inputs` by name or in the order of the signature, `weights` by path. Floats are converted to `dtype`
    where it is given. `attend` computes the attentions instead of their dense definition. Raises ValueError where
    inputs or weights do not have the declared types, or a dim leaves its bound.
    """
    source = program[graph or program.main]
    state = Run.start(program, source, _in_order(source, inputs), weights, dtype)
    state.attend = attend
    return packed(state.graph(source.name))


def run_gradient(
    program: Program,
    inputs: Mapping[str, Tensor] | Sequence[Tensor],
    weights: Mapping[str, Tensor],
    cotangents: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The cotangents of the float inputs by name and of the weights by path, from one for each float result.

    Runs `program.gradient`. Raises ValueError as `run`, and where the program has no gradient graph.
    """
    if program.gradient is None:
        raise ValueError(f"program {program.name} has no gradient graph")
    main, source = program[program.main], program[program.gradient]
    given = [*_in_order(main, inputs), *cotangents]
    state = Run.start(program, source, given, weights, dtype)
    results = state.graph(source.name)
    names = [node.name for node in main.inputs if is_float(node.type)]
    return dict(zip(names, results, strict=True)), state.gradients


# ---------------------------------------------------------------- inputs


def _in_order(graph: Graph, inputs: Mapping[str, Tensor] | Sequence[Tensor]) -> list[Tensor]:
    names = [node.name for node in graph.inputs]
    if isinstance(inputs, Mapping):
        if set(inputs) != set(names):
            raise ValueError(f"{graph.name} takes {names}, not {sorted(inputs)}")
        return [inputs[name] for name in names]
    return list(inputs)


def _dtype(type_: TensorType, floats: torch.dtype) -> torch.dtype:
    return {"float": floats, "int": torch.int64, "bool": torch.bool}[type_.dtype]


def _converted(tensor: Tensor, node: Node, floats: torch.dtype) -> Tensor:
    kind = "bool" if tensor.dtype == torch.bool else "float" if tensor.is_floating_point() else "int"
    if kind != node.tensor.dtype:
        raise ValueError(f"{node.name} is a tensor of {tensor.dtype}, not of {node.tensor.dtype}")
    return tensor.to(_dtype(node.tensor, floats))


def bind_dims(program: Program, graph: Graph, inputs: Sequence[Tensor]) -> dict[str, int]:
    """The sizes of the run-time dims, from the shapes of a graph's inputs.

    Raises ValueError where the number of inputs, a rank or a size does not fit, or a dim leaves its bound.
    """
    if len(inputs) != len(graph.inputs):
        raise ValueError(f"{graph.name} takes {len(graph.inputs)} inputs, not {len(inputs)}")
    dims: dict[str, int] = {}
    for node, tensor in zip(graph.inputs, inputs, strict=True):
        if len(node.tensor.shape) != tensor.dim():
            raise ValueError(f"{node.name} is {node.tensor}, not of shape {tuple(tensor.shape)}")
        for dim, size in zip(node.tensor.shape, tensor.shape, strict=True):
            _solve(dim, size, dims)
    for node, tensor in zip(graph.inputs, inputs, strict=True):
        if any(
            d.names <= set(dims) and d.evaluate(dims) != n
            for d, n in zip(node.tensor.shape, tensor.shape, strict=True)
        ):
            sizes = ", ".join(f"{name} = {size}" for name, size in dims.items())
            raise ValueError(f"{node.name} is {node.tensor} with {sizes}, not of shape {tuple(tensor.shape)}")
    for info in program.dims:
        size = dims.get(info.name, 0)
        if info.at_most is not None and size > info.at_most:
            raise ValueError(f"{info.name} = {size} is above its declared bound {info.at_most}")
        if size % info.multiple_of:
            raise ValueError(f"{info.name} = {size} is not a multiple of {info.multiple_of}, as declared")
    return dims


def _solve(dim: Dim, size: int, dims: dict[str, int]) -> None:
    """Bind the name of a dim `a * name + c`, where that is what it is."""
    rest = [(monomial, factor) for monomial, factor in dim.terms if monomial]
    if len(rest) == 1 and len(rest[0][0]) == 1:
        (name,), factor = rest[0]
        offset = sum((c for monomial, c in dim.terms if not monomial), Fraction(0))
        value = (size - offset) / factor
        if value.denominator == 1:
            dims.setdefault(name, int(value))


# ---------------------------------------------------------------- a run


@dataclass
class Run:
    """One run: what it was given, and the gradients of weights that it meets."""

    program: Program
    env: Env
    inputs: list[Tensor]
    weights: Mapping[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    attend: Attend | None = None

    @classmethod
    def start(
        cls,
        program: Program,
        graph: Graph,
        inputs: Sequence[Tensor],
        weights: Mapping[str, Tensor],
        dtype: torch.dtype | None,
    ) -> Self:
        dims = bind_dims(program, graph, inputs)
        tensors = [*inputs, *weights.values()]
        floats = dtype or next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
        device = tensors[0].device if tensors else torch.device("cpu")
        given = [_converted(t, node, floats) for t, node in zip(inputs, graph.inputs, strict=True)]
        return cls(program, Env(dims, floats, device), given, weights)

    def graph(self, name: str, inputs: Sequence[Tensor] | None = None, place: Place = ROOT) -> list[Tensor]:
        """The results of a graph that is run at a place."""
        graph = self.program[name]
        given = self.inputs if inputs is None else inputs
        values: dict[str, Values] = {node.name: t for node, t in zip(graph.inputs, given, strict=True)}
        for node in graph.nodes:
            if node.op != "input":
                values[node.name] = self._node(node, [values[source] for source in node.inputs], place)
        return [single(values[output]) for output in graph.outputs]

    def _node(self, node: Node, inputs: list[Values], place: Place) -> Values:
        if node.op == "item":
            return _item(node, inputs[0])
        tensors = [single(value) for value in inputs]
        match node.op:
            case "weight" | "buffer":
                return self._weight(node, place.path(str(node["label"])))
            case "call":
                return packed(self.graph(str(node["graph"]), tensors, place.called(node)))
            case "repeat":
                return packed(self._repeat(node, tensors, place)[-1])
            case "repeat_backward":
                return packed(self._repeat_backward(node, tensors, place))
            case "weight_gradient":
                path = place.path(str(node["label"]))
                known = self.gradients.get(path)
                self.gradients[path] = tensors[0] if known is None else known + tensors[0]
                return tensors[0]
        if node.op == "attention" and self.attend is not None:
            return self.attend(place.path(node.name), node, tensors)
        return TORCH[node.op](node, tensors, self.env)

    def _weight(self, node: Node, path: str) -> Tensor:
        if path not in self.weights:
            raise ValueError(f"there is no weight {path}")
        weight = self.weights[path]
        if tuple(weight.shape) != self.env.shape(node.tensor.shape):
            raise ValueError(f"weight {path} is {node.tensor}, not of shape {tuple(weight.shape)}")
        return _converted(weight, node, self.env.dtype)

    def _repeat(self, node: Node, inputs: list[Tensor], place: Place) -> list[list[Tensor]]:
        """The carried values before each iteration and after the last one."""
        carried = integer(node["carried"])
        states = [inputs[:carried]]
        for index, body in iterations(node):
            states.append(self.graph(body, [*states[-1], *inputs[carried:]], place.repeated(index)))
        return states

    def _repeat_backward(self, node: Node, inputs: list[Tensor], place: Place) -> list[Tensor]:
        """Forward, keeping the carried values; then backward in reverse, invariants' cotangents summed."""
        carried, backward = integer(node["carried"]), backward_of(node)
        bodies = list(iterations(node))
        count = len(self.program[bodies[0][1]].inputs)
        states = self._repeat(node, inputs[:count], place)
        cotangents, kept = inputs[count:], sum(t.is_floating_point() for t in inputs[:carried])
        sums = [torch.zeros_like(t) for t in inputs[carried:count] if t.is_floating_point()]
        for (index, body), state in zip(reversed(bodies), states[-2::-1], strict=True):
            given = [*state, *inputs[carried:count], *cotangents]
            results = self.graph(backward[body], given, place.repeated(index))
            cotangents = results[:kept]
            sums = [total + more for total, more in zip(sums, results[kept:], strict=True)]
        return [*cotangents, *sums]


def _item(node: Node, value: Values) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return value[integer(node["index"])]
