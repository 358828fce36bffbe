"""Which blocks can have their heads or hidden width in parts, each on another rank (tensor parallelism).

Such a block takes its input by weights x @ w, of which a rank has some columns, works on heads or hidden entries one by
one, and gives its result by weights h @ w, of which it has the rows of those: the sum over the ranks is the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from math import gcd

from fastgrad_compiler.ir.flatten import flatten
from fastgrad_compiler.ir.graph import Graph, Node, Program, integer
from fastgrad_compiler.ir.ops import ARITHMETIC, FUNCTIONS

_ENTRYWISE = frozenset((*FUNCTIONS, "neg", "abs", "clamp", "cast"))
_SERVED = _ENTRYWISE.union(
    ARITHMETIC,
    (
        "weight",
        "constant",
        "matmul",
        "attention",
        "poly_attention",
        "rotary",
        "unit",
        "rms_norm",
        "layer_norm",
    ),
    ("split_heads", "merge_heads", "permute", "slice", "concat", "sum", "mean"),
)
"""What a block may do to values that are whole: PyTorch's DTensors, as which it runs, have it in every form."""
_HEADS, _HIDDEN = -3, -1  # axes
_AXES = {"near_q": _HEADS, "near_k": _HEADS, "forget": -2}  # of heads, by the role of an operand


@dataclass(frozen=True)
class Parts:
    """How a block is divided.

    Args:
        dims: by the path of each weight below the block's own, along which of its dims; others are whole.
        units: of which each rank has as many: heads, or entries of the hidden width.
    """

    dims: Mapping[str, int]
    units: int


@dataclass(frozen=True)
class _Divided:
    """A value that is in parts along an axis, because these weights are; of so many units."""

    axis: int
    weights: frozenset[str]
    units: int


class _Whole(Exception):
    """These weights cannot be in parts."""

    def __init__(self, weights: frozenset[str]) -> None:
        super().__init__()
        self.weights = weights


def divisible_blocks(program: Program) -> dict[str, Parts]:
    """By path in the model, the innermost blocks that can be divided, each into two parts at least."""
    graph = flatten(program)
    weights = [node.name for node in graph.nodes if node.op == "weight"]
    paths = {name.rpartition(".")[0] for name in weights}
    found: dict[str, Parts] = {}
    for path in sorted(paths - {""}, key=lambda path: (-path.count("."), path)):
        if any(other.startswith(f"{path}.") for other in found):
            continue
        parts = _parts(graph, path)
        if parts is not None:
            found[path] = parts
    order = {path: place for place, (path, _) in enumerate(groupby(weights, lambda n: n.rpartition(".")[0]))}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _parts(graph: Graph, path: str) -> Parts | None:
    block = _Block(graph, path)
    if not all(node.op in _SERVED for node in block.nodes):
        return None
    whole: frozenset[str] = frozenset()
    while True:
        try:
            return block.divided(whole)
        except _Whole as error:
            whole |= error.weights


class _Block:
    def __init__(self, graph: Graph, path: str) -> None:
        self.graph, self.inside = graph, f"{path}."
        self.nodes = [node for node in graph.nodes if node.name.startswith(self.inside)]
        self.own = {
            node.name
            for node in self.nodes
            if node.op == "weight" and "." not in node.name.removeprefix(self.inside)
        }
        self.outputs = set(graph.outputs)

    def divided(self, whole: frozenset[str]) -> Parts | None:
        """The parts, where the weights `whole` are in none. Raises _Whole where more of them cannot be."""
        values: dict[str, _Divided] = {}
        dims: dict[str, int] = {}
        rows: set[str] = set()
        for node in self.nodes:
            found = self._value(node, values, dims, rows, whole)
            if found is None:
                continue
            values[node.name] = found
            outside = [user for user in self.graph.users[node.name] if not user.name.startswith(self.inside)]
            if outside or node.name in self.outputs:
                raise _Whole(found.weights)
        ended = frozenset(name for value in values.values() for name in value.weights)
        units = gcd(*(value.units for value in values.values()))
        if not rows or units < 2:
            return None
        self._check_single_use(dims, ended)
        return Parts({name.removeprefix(self.inside): dim for name, dim in dims.items()}, units)

    def _check_single_use(self, dims: Mapping[str, int], ended: frozenset[str]) -> None:
        for name in dims:
            if len(self.graph.users[name]) != 1:
                raise _Whole(ended)

    def _value(
        self,
        node: Node,
        values: Mapping[str, _Divided],
        dims: dict[str, int],
        rows: set[str],
        whole: frozenset[str],
    ) -> _Divided | None:
        given = [values.get(name) for name in node.inputs]
        divided = [value for value in given if value is not None]
        if node.op == "matmul" and node.inputs[1] in self.own:
            weight = node.inputs[1]
            if len(self.graph[weight].tensor.shape) != 2:
                return self._none(divided)
            if not divided:
                width = self.graph[weight].tensor.shape[1].constant
                if weight in whole or width is None:
                    return None
                dims[weight] = 1
                return _Divided(_HIDDEN, frozenset((weight,)), width)
            if given[0] is not None and given[1] is None and given[0].axis == _HIDDEN:
                dims[weight] = 0
                rows.add(weight)
                return None
            return self._none(divided)
        if not divided:
            return None
        one = divided[0]
        joined = frozenset(name for value in divided for name in value.weights)
        units = gcd(*(value.units for value in divided))
        axis = self._axis(node, given, one, dims)
        if axis is None:
            raise _Whole(joined)
        if node.op == "split_heads":
            units = gcd(units, integer(node["heads"]))
        return _Divided(axis, joined, units)

    @staticmethod
    def _none(divided: list[_Divided]) -> None:
        if divided:
            raise _Whole(frozenset(name for value in divided for name in value.weights))

    def _axis(
        self, node: Node, given: list[_Divided | None], one: _Divided, dims: dict[str, int]
    ) -> int | None:
        """Along which axis the result is in parts; None where it is not."""
        axis = one.axis
        if node.op in _ENTRYWISE:
            return axis
        if node.op in ARITHMETIC:
            return axis if self._fit(node, given, axis, dims) else None
        if node.op == "split_heads":
            return _HEADS if axis == _HIDDEN else None
        if node.op == "merge_heads":
            return _HIDDEN if axis == _HEADS else None
        if node.op in ("rotary", "unit") or (node.op == "rms_norm" and given[1] is None):
            return axis if axis == _HEADS else None
        if node.op == "permute":
            axes = node["axes"]
            assert isinstance(axes, tuple)
            return list(axes).index(len(axes) + axis) - len(axes)
        if node.op in ("attention", "poly_attention"):
            return _HEADS if _by_head(node, given) else None
        return None

    def _fit(self, node: Node, given: list[_Divided | None], axis: int, dims: dict[str, int]) -> bool:
        """Whether both operands are in parts alike, or one is a single number, or a weight that can be."""
        for name, value in zip(node.inputs, given, strict=True):
            if value is not None:
                if value.axis != axis:
                    return False
                continue
            tensor = self.graph[name].tensor
            if not tensor.shape:
                continue
            if name not in self.own or len(tensor.shape) != 1 or axis != _HIDDEN:
                return False
            if tensor.shape[0].constant != node.tensor.shape[-1].constant:
                return False
            dims[name] = 0
        return True


def _by_head(node: Node, given: list[_Divided | None]) -> bool:
    """Whether each head has its own q, k and v, and everything else that has heads."""
    roles = node.get("roles") or ()
    assert isinstance(roles, tuple)
    if node.get("alibi") or node.get("window") or isinstance(node.get("bound"), tuple):
        return False
    wanted = [_HEADS] * 3 + [_AXES.get(str(role)) for role in roles]
    axes = [None if value is None else value.axis for value in given]
    return axes == wanted
