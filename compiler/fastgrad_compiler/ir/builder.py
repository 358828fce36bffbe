"""Building graphs by expressions: `g * y` on values adds a `mul` node, with its type and its span."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Node, TensorType, Type, attributes
from fastgrad_compiler.ir.names import UniqueNames
from fastgrad_compiler.ir.shapes import infer
from fastgrad_grammar.source import Span

Operand: TypeAlias = "Value | float"
Shape: TypeAlias = tuple[Dim, ...]


class Builder:
    """Nodes in the order they were added; names are unique, `_op`, `_op_2` unless one is given."""

    def __init__(self, nodes: Iterable[Node] = (), multiples: Mapping[str, int] | None = None) -> None:
        self.nodes = list(nodes)
        self.multiples: Mapping[str, int] = multiples or {}
        self.span: Span | None = None  # given to each new node
        self._names = UniqueNames(node.name for node in self.nodes)
        self._constants: dict[float, Value] = {}

    def fresh(self, stem: str) -> str:
        """`stem`, or the first of `stem_2`, `stem_3`... that is free."""
        return self._names.take(stem)

    def emit(
        self,
        op: str,
        inputs: Sequence[Value] = (),
        values: Mapping[str, Attribute] | None = None,
        *,
        name: str | None = None,
        type: Type | None = None,
    ) -> Value:
        """A new node with the attributes `values`; its type is inferred unless given."""
        values = values or {}
        if type is None:
            type = infer(op, tuple(value.node.tensor for value in inputs), values, self.multiples)
        names = tuple(value.name for value in inputs)
        node = Node(self.fresh(name or f"_{op}"), op, names, attributes(**values), type, span=self.span)
        self.nodes.append(node)
        return Value(self, node)

    def constant(self, value: float) -> Value:
        """The scalar `value`; one node, however often it is asked for."""
        if value not in self._constants:
            self._constants[value] = self.emit("constant", (), {"value": value}, type=TensorType("float", ()))
        return self._constants[value]

    def fill(self, shape: Shape, value: float) -> Value:
        """A float tensor of one value."""
        return self.emit("fill", (), {"shape": shape, "value": value}, type=TensorType("float", shape))

    def count(self, shape: Shape) -> Operand:
        """The number of entries of a tensor: a number, or a scalar value where a dim is known at run time."""
        size = prod(shape, start=Dim.of(1))
        return float(size.constant) if size.constant is not None else self.fill((size,), 1.0).sum((-1,))

    def parts(self, value: Value) -> tuple[Value, ...]:
        """The results of a node: itself, or an `item` for each member of a tuple."""
        if isinstance(value.node.type, TensorType):
            return (value,)
        types = value.node.type or ()
        return tuple(self.emit("item", (value,), {"index": i}, type=member) for i, member in enumerate(types))


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """A node of a graph under construction."""

    builder: Builder
    node: Node

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name

    @property
    def shape(self) -> Shape:
        """The tensor's dims."""
        return self.node.tensor.shape

    def __getitem__(self, key: str) -> Attribute:
        return self.node[key]

    def op(self, name: str, *others: Operand, **values: Attribute) -> Value:
        """The operation `name` on this value and `others`; numbers become constants."""
        lifted = [other if isinstance(other, Value) else self.builder.constant(other) for other in others]
        return self.builder.emit(name, (self, *lifted), values)

    def __add__(self, other: Operand) -> Value:
        return self.op("add", other)

    def __sub__(self, other: Operand) -> Value:
        return self.op("sub", other)

    def __rsub__(self, other: float) -> Value:
        return self.builder.constant(other) - self

    def __mul__(self, other: Operand) -> Value:
        return self.op("mul", other)

    def __truediv__(self, other: Operand) -> Value:
        return self.op("div", other)

    def __neg__(self) -> Value:
        return self.op("neg")

    def __matmul__(self, other: Value) -> Value:
        return self.op("matmul", other)

    def __lt__(self, other: Operand) -> Value:
        return self.op("less", other)

    def __gt__(self, other: Operand) -> Value:
        return (other if isinstance(other, Value) else self.builder.constant(other)) < self

    def __le__(self, other: Operand) -> Value:
        return self.op("less_equal", other)

    def __ge__(self, other: Operand) -> Value:
        return (other if isinstance(other, Value) else self.builder.constant(other)) <= self

    @property
    def T(self) -> Value:
        """The last two axes exchanged."""
        return self.permute((*range(len(self.shape) - 2), -1, -2))

    def permute(self, axes: Iterable[int]) -> Value:
        """Axes in another order."""
        return self.op("permute", axes=tuple(axis % len(self.shape) for axis in axes))

    def reshape(self, shape: Shape) -> Value:
        """The same entries in another shape."""
        return self if shape == self.shape else self.op("reshape", shape=shape)

    def sum(self, axes: tuple[int, ...] = (-1,), keepdim: bool = False) -> Value:
        """The sum over `axes`, negative numbers."""
        return self.op("sum", axes=axes, keepdim=keepdim)

    def mean(self, axes: tuple[int, ...] = (-1,), keepdim: bool = False) -> Value:
        """The mean over `axes`, negative numbers."""
        return self.op("mean", axes=axes, keepdim=keepdim)

    def only(self, condition: Value) -> Value:
        """This value where `condition` holds, 0 elsewhere."""
        return self.builder.emit("where", (condition, self, self.builder.constant(0.0)))

    def fit(self, shape: Shape) -> Value:
        """This value in `shape`: summed over axes that were broadcast, or broadcast if it is smaller."""
        if self.shape == shape:
            return self
        grown = len(self.shape) > len(shape) or any(
            mine != theirs and theirs == Dim.of(1)
            for mine, theirs in zip(reversed(self.shape), reversed(shape), strict=False)
        )
        return self.op("sum_to" if grown else "broadcast_to", shape=shape)
