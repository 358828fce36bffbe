"""Runs a program in numpy, float64, by the meaning of each operation in docs/language.md: the truth to compare with.

It shares no code with the passes, the emitters, the kernels or the interpreter on tensors, so that a mistake of theirs
is none here. It is dense and simple: n^2 scores, no cleverness. It runs a program as elaborated, whose types may be
missing, and after any forward stage up to `lowrank`; gradient graphs are declined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from fastgrad_compiler.ir.calls import iterations
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.flatten import ROOT, Place
from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_compiler.reference.oracle_attention import Array
from fastgrad_compiler.reference.oracle_operations import DECLINED, KINDS, MEANING, Rule, Sizes, integer

Values: TypeAlias = "Array | tuple[Array, ...]"
Watch: TypeAlias = Callable[[str, Node, Array], None]


def evaluate(
    program: Program,
    inputs: Mapping[str, Array],
    weights: Mapping[str, Array],
    *,
    graph: str | None = None,
    watch: Watch | None = None,
) -> tuple[Array, ...]:
    """The results of `graph` (by default main), each float64, int64 or bool.

    `inputs` by name, `weights` and buffers by their paths from `graph` on; the sizes of run-time dims follow from the
    shapes of the inputs. `watch` gets the full path, the node and the value of every node with one result.
    Raises ValueError where inputs or weights do not have the declared types, or an operation has no value at these
    sizes (an id beyond the table, a slice beyond the end); NotImplementedError for the operations in `DECLINED`.
    """
    source = program[graph or program.main]
    names = [node.name for node in source.inputs]
    if set(inputs) != set(names):
        raise ValueError(f"{source.name} takes {names}, not {sorted(inputs)}")
    sizes = sizes_of(source, inputs)
    given = [_declared(np.asarray(inputs[node.name]), node, node.name, sizes) for node in source.inputs]
    with np.errstate(all="ignore"):  # overflow and 0 / 0 have values, as in torch
        return Run(program, sizes, weights, watch).graph(source.name, given)


def sizes_of(graph: Graph, inputs: Mapping[str, Array]) -> Sizes:
    """The sizes of the run-time dims, from the inputs whose declared shapes name them alone, as n, 4*n or n + 1.

    Raises ValueError where an input has another rank than declared.
    """
    sizes: dict[str, int] = {}
    for node in graph.inputs:
        shape, found = node.tensor.shape, np.shape(inputs[node.name])
        if len(shape) != len(found):
            raise ValueError(f"{node.name} is {node.tensor}, not of shape {found}")
        for dim, size in zip(shape, found, strict=True):
            _solve(dim, size, sizes)
    return sizes


def _solve(dim: Dim, size: int, sizes: dict[str, int]) -> None:
    named = [(monomial, factor) for monomial, factor in dim.terms if monomial]
    if len(named) != 1 or len(named[0][0]) != 1:
        return
    (((name,), factor),) = named
    rest = sum((factor for monomial, factor in dim.terms if not monomial), Fraction(0))
    value = (size - rest) / factor
    if value.denominator == 1:
        sizes.setdefault(name, int(value))


def _declared(value: Array, node: Node, name: str, sizes: Sizes) -> Array:
    """The value as float64, int64 or bool; ValueError where it is not of the declared type."""
    wanted = KINDS[node.tensor.dtype]
    if not np.can_cast(value.dtype, wanted, "same_kind") or (value.dtype == np.bool_) != (wanted == np.bool_):
        raise ValueError(f"{name} is an array of {value.dtype}, not of {node.tensor.dtype}")
    if value.shape != tuple(dim.evaluate(sizes) for dim in node.tensor.shape):
        raise ValueError(f"{name} is {node.tensor}, not of shape {value.shape}")
    return value.astype(wanted, copy=False)


# ---------------------------------------------------------------- a run


@dataclass(frozen=True)
class Run:
    """One run: the sizes of its dims, its weights by path, and the meaning of each operation."""

    program: Program
    sizes: Sizes
    weights: Mapping[str, Array]
    watch: Watch | None = None
    meaning: Mapping[str, Rule] = field(default_factory=lambda: MEANING)

    def graph(self, name: str, inputs: Sequence[Array], place: Place = ROOT) -> tuple[Array, ...]:
        """The results of a graph that is run at a place."""
        graph = self.program[name]
        values: dict[str, Values] = {}
        for node, value in zip(graph.inputs, inputs, strict=True):
            values[node.name] = value
            self._tell(node, value, place)
        for node in graph.nodes:
            if node.op != "input":
                given = [values[source] for source in node.inputs]
                values[node.name] = self.node(node, given, place)
        return tuple(_one(values[output]) for output in graph.outputs)

    def node(self, node: Node, inputs: Sequence[Values], place: Place = ROOT) -> Values:
        """The value of a node other than an input, from those of its operands."""
        result = self._value(node, inputs, place)
        self._tell(node, result, place)
        return result

    def _tell(self, node: Node, value: Values, place: Place) -> None:
        if self.watch is not None and not isinstance(value, tuple):
            self.watch(place.path(node.name), node, value)

    def _value(self, node: Node, inputs: Sequence[Values], place: Place) -> Values:
        if node.op == "item":
            (results,) = inputs
            return results[integer(node["index"])] if isinstance(results, tuple) else results
        given = [_one(value) for value in inputs]
        if node.op in ("weight", "buffer"):
            return self._weight(node, place.path(str(node["label"])))
        if node.op == "call":
            return _pack(self.graph(str(node["graph"]), given, place.called(node)))
        if node.op == "repeat":
            return _pack(self._repeat(node, given, place))
        if node.op in DECLINED:
            raise NotImplementedError(f"{node.op} {DECLINED[node.op]}")
        return np.asarray(self.meaning[node.op](node, given, self.sizes))  # numpy makes scalars of rank 0

    def _weight(self, node: Node, path: str) -> Array:
        if path not in self.weights:
            raise ValueError(f"there is no weight {path}")
        return _declared(np.asarray(self.weights[path]), node, f"weight {path}", self.sizes)

    def _repeat(self, node: Node, inputs: list[Array], place: Place) -> tuple[Array, ...]:
        carried = integer(node["carried"])
        state, invariants = tuple(inputs[:carried]), inputs[carried:]
        for index, body in iterations(node):
            state = self.graph(body, [*state, *invariants], place.repeated(index))
        return state


def _one(value: Values) -> Array:
    if isinstance(value, tuple):
        raise ValueError(f"a tuple of {len(value)} results is read as one tensor")
    return value


def _pack(values: tuple[Array, ...]) -> Values:
    return values[0] if len(values) == 1 else values
