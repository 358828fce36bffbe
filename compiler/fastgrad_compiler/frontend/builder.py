"""Building one graph: names, labels, nodes with their types and where their dims came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fastgrad_compiler.frontend.values import Origin, Tensor, ValueProblem, check_dim
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Graph, Node, TensorType, Type, attributes
from fastgrad_compiler.ir.names import UniqueNames
from fastgrad_grammar.source import Span

MAX_RANK = 16


class Builder:
    """The nodes of a graph under construction.

    `reserved` are names that nodes must not take; `labels` are the labels in use in this block instance, shared by the
    bodies of its repeats; `weights` are the names of all its weights, which no call's label takes.
    """

    def __init__(
        self, reserved: Iterable[str] = (), labels: UniqueNames | None = None, weights: Iterable[str] = ()
    ) -> None:
        self.nodes: list[Node] = []
        self.inputs: list[Node] = []
        self.labels = UniqueNames() if labels is None else labels
        self.weights = frozenset(weights)
        self._names = UniqueNames(reserved)
        self._place: dict[str, int] = {}

    # ------------------------------------------------------------ names

    def label(self, wanted: str, *, weight: bool = False) -> str:
        """A label that is not in use yet: `wanted`, or `wanted_2`, `wanted_3` ...; calls avoid weights' names."""
        return self.labels.take(wanted, frozenset() if weight else self.weights)

    def rename(self, tensor: Tensor, name: str) -> Tensor:
        """Give a fresh temporary the user's name; what already has a name keeps it."""
        if not tensor.node.startswith("_") or tensor.node not in self._place or tensor.owner is not self:
            return tensor
        place = self._place[tensor.node]
        if place < len(self.nodes) - 1 and self.nodes[place].op != "item":
            return tensor
        new = self._names.take(name)
        self.nodes[place] = replace(self.nodes[place], name=new)
        self._names.free(tensor.node)
        del self._place[tensor.node]
        self._place[new] = place
        return replace(tensor, node=new)

    # ------------------------------------------------------------ nodes

    def input(
        self, name: str, kind: TensorType, origins: tuple[Origin | None, ...], span: Span | None
    ) -> Tensor:
        """An input of the graph; its name is the caller's to keep free."""
        self._names.add(name)
        self.inputs.append(Node(name, "input", type=kind, span=span))
        return Tensor(name, kind, origins, self)

    def add(
        self,
        op: str,
        operands: Sequence[str],
        kind: Type,
        span: Span,
        values: Mapping[str, Attribute],
        name: str | None = None,
    ) -> Node:
        """One more node of a known type, called `name` or after its operation."""
        node_name = self._names.take(name or f"_{op}")
        node = Node(node_name, op, tuple(operands), attributes(**values), kind, span=span)
        self._place[node_name] = len(self.nodes)
        self.nodes.append(node)
        return node

    def graph(self, name: str, outputs: Sequence[str], block: str, span: Span | None) -> Graph:
        """The finished graph."""
        return Graph(name, (*self.inputs, *self.nodes), tuple(outputs), block, span)


def check_size(kind: TensorType) -> None:
    """FG219 where a tensor has more dims, or larger ones, than a model can need."""
    if len(kind.shape) > MAX_RANK:
        raise ValueProblem("FG219", f"a tensor of more than {MAX_RANK} dimensions")
    for dim in kind.shape:
        check_dim(dim)


def trace_origins(shape: Sequence[Dim], operands: Sequence[Tensor]) -> tuple[Origin | None, ...]:
    """Where the dims of a result came from: an operand's dim of the same size, at the same place if there is one."""
    known = [
        (axis - len(operand.type.shape), dim, origin)
        for operand in operands
        for axis, (dim, origin) in enumerate(zip(operand.type.shape, operand.origins, strict=True))
        if origin is not None
    ]

    def trace(axis: int, wanted: Dim) -> Origin | None:
        found = [(place, origin) for place, dim, origin in known if dim == wanted]
        there = (origin for place, origin in found if place == axis)
        return next(there, found[0][1] if found else None)

    return tuple(trace(index - len(shape), dim) for index, dim in enumerate(shape))
