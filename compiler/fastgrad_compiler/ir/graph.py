"""The program: frozen graphs of frozen nodes that refer to each other by name.

A Program holds one Graph per block instance; `call` and `repeat` nodes name the graphs they run, so a deep model is as
small as a shallow one. Nothing here is changed in place: a pass is a function Program -> Program. The text form is in
`text.py`, the whole flat view in `flatten.py`, the invariants in `verify.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

from fastgrad_compiler.ir.dim import Dim
from fastgrad_grammar.source import Span

Attribute: TypeAlias = "int | float | bool | str | Dim | tuple[Attribute, ...] | None"


def integer(value: Attribute) -> int:
    """The attribute as an int; TypeError where it is none."""
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    return value


def number(value: Attribute) -> float:
    """The attribute as a float; TypeError if it is not a number."""
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def sequence(value: Attribute) -> tuple[Attribute, ...]:
    """The attribute as a tuple; TypeError where it is none."""
    if not isinstance(value, tuple):
        raise TypeError(f"{value!r} is not a tuple")
    return value


@dataclass(frozen=True)
class TensorType:
    """A tensor: `dtype` is float, int or bool (float stands for the run-time float dtype); `shape` its dims."""

    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


Type: TypeAlias = TensorType | tuple[TensorType, ...]


@dataclass(frozen=True)
class Bound:
    """What is proved of a tensor: entries in [low, high], rows (along the last axis) of Euclidean norm at most `norm`.

    `proof` is the chain of reasons, one sentence each, first cause first; it takes no part in equality.
    `asserted` is set where any step rests on `assume_bound` and not on proof.
    """

    low: float
    high: float
    norm: float
    asserted: bool = False
    proof: tuple[str, ...] = field(default=(), compare=False)

    @property
    def magnitude(self) -> float:
        """The largest absolute value of an entry."""
        return max(abs(self.low), abs(self.high))


STEP, ONCE, LOSS, FUSED = "@step", "@once", "@loss", "@fused"
"""What stands after the names of graphs that passes derive: no name of a block has the sign."""


@dataclass(frozen=True)
class Node:
    """One operation: `op` is a key of `ops.OPS`; `inputs` name nodes of the same graph, in order.

    A name that the user did not give starts with an underscore. `span` is the expression in the `.tfg` file.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    attributes: tuple[tuple[str, Attribute], ...] = ()  # sorted by key
    type: Type | None = None
    bound: Bound | None = None
    span: Span | None = field(default=None, compare=False, repr=False)

    def __getitem__(self, key: str) -> Attribute:
        """The attribute `key`; KeyError where it is not set."""
        for name, value in self.attributes:
            if name == key:
                return value
        raise KeyError(f"{self.op} {self.name} has no attribute {key}")

    def get(self, key: str, default: Attribute = None) -> Attribute:
        """The attribute `key`, or `default`."""
        return next((value for name, value in self.attributes if name == key), default)

    def with_attributes(self, **values: Attribute) -> Node:
        """A copy with these attributes set."""
        merged = {**dict(self.attributes), **values}
        return replace(self, attributes=tuple(sorted(merged.items())))

    def renamed(self, names: Mapping[str, str]) -> Node:
        """A copy in which these names of nodes are others."""
        inputs = tuple(names.get(name, name) for name in self.inputs)
        return replace(self, name=names.get(self.name, self.name), inputs=inputs)

    @property
    def is_fused(self) -> bool:
        """Whether it runs a group of operations as one kernel (`passes/fuse.py`): no block of the user's."""
        return self.op == "call" and FUSED in str(self["graph"])

    @property
    def tensor(self) -> TensorType:
        """The type of a node with one result; TypeError otherwise."""
        if not isinstance(self.type, TensorType):
            raise TypeError(f"{self.op} {self.name} has type {self.type}")
        return self.type


def step_form(graph: str) -> str:
    """The name of the step form of a graph, of which a program has one where it differs from the graph."""
    return f"{graph}{STEP}"


def loss_form(graph: str) -> str:
    """The name of the graph that gives the loss of what a graph gives (`passes/loss.py`)."""
    return f"{graph}{LOSS}"


def attributes(**values: Attribute) -> tuple[tuple[str, Attribute], ...]:
    """Attributes in the order that a Node keeps them."""
    return tuple(sorted(values.items()))


@dataclass(frozen=True)
class Graph:
    """A block instance: nodes in an order in which inputs come before uses; `input` nodes first, in signature order.

    `block` is the name of the `.tfg` block it was made from (several graphs can share one).
    """

    name: str
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    block: str = ""
    span: Span | None = field(default=None, compare=False, repr=False)

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        """Nodes by name."""
        return {node.name: node for node in self.nodes}

    def __getitem__(self, name: str) -> Node:
        return self.by_name[name]

    @cached_property
    def inputs(self) -> tuple[Node, ...]:
        """The `input` nodes."""
        return tuple(node for node in self.nodes if node.op == "input")

    @cached_property
    def users(self) -> Mapping[str, tuple[Node, ...]]:
        """For each node, the nodes that read it (a node that reads it twice stands twice)."""
        found: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in node.inputs:
                found[name].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def alive(self) -> frozenset[str]:
        """The names of the nodes that a result is computed from."""
        return self.ancestors(self.outputs)

    def ancestors(self, names: Iterable[str], stop: frozenset[str] = frozenset()) -> frozenset[str]:
        """These nodes and all that they are computed from; of the nodes in `stop`, nothing that they read."""
        found = set(names)
        for node in reversed(self.nodes):
            if node.name in found and node.name not in stop:
                found.update(node.inputs)
        return frozenset(found)

    @property
    def output_type(self) -> Type | None:
        """The type of the result, a tuple where there are several."""
        types = tuple(self[name].type for name in self.outputs)
        if len(types) == 1:
            return types[0]
        return tuple(t for t in types if isinstance(t, TensorType))


@dataclass(frozen=True)
class DimInfo:
    """What the file declares of a run-time dim: at most `at_most`, a multiple of `multiple_of`."""

    name: str
    at_most: int | None = None
    multiple_of: int = 1
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class BudgetRule:
    """One line of a budget after `at`: `kind` is relative, exact, degree, family or near; `value` None for exact."""

    pattern: str
    kind: str
    value: float | int | str | None = None
    span: Span | None = field(default=None, compare=False, repr=False)


TRUST = ("calibrated", "certified")  # what a plan may rest on; the first is taken where the file says nothing
ON_VIOLATION = (
    "warn",
    "exact",
    "clamp",
    "raise",
)  # what a run does where a logit is beyond its range; so here


@dataclass(frozen=True)
class Budget:
    """The budget of one model; None where the file says nothing. `output` and `gradient` limit relative L2
    errors, `memory` the bytes of the activations of a training step.

    `trust` is one of TRUST, `on_violation` one of ON_VIOLATION.
    """

    output: float | None = None
    gradient: float | None = None
    memory: float | None = None
    near: int | None = None
    rules: tuple[BudgetRule, ...] = ()
    trust: str | None = None
    on_violation: str | None = None
    span: Span | None = field(default=None, compare=False, repr=False)


ROLES = ("main", "objective", "gradient", "step", "along", "training")
"""The fields of a Program that name a graph, or with `along` a dim."""


@dataclass(frozen=True)
class Memory:
    """What a plan of memory is for, sizes of run-time dims, and tokens of a piece where sequences run in pieces."""

    sizes: tuple[tuple[str, int], ...]
    piece: int | None = None


@dataclass(frozen=True)
class Program:
    """All graphs of a compiled model; `main` runs the model, `objective` the loss, `gradient` the derived backward.

    `step` runs the model on the next tokens along the dim `along`, given what it kept of those before. `training` runs
    the model and the objective, from the inputs of both, without making logits. `memory` is set where the
    budget limits it.
    """

    graphs: tuple[Graph, ...]
    main: str
    objective: str | None = None
    gradient: str | None = None
    step: str | None = None
    along: str | None = None
    training: str | None = None
    dims: tuple[DimInfo, ...] = ()
    budget: Budget | None = None
    memory: Memory | None = None
    name: str = "model"

    @cached_property
    def by_name(self) -> Mapping[str, Graph]:
        """Graphs by name."""
        return {graph.name: graph for graph in self.graphs}

    def __getitem__(self, name: str) -> Graph:
        return self.by_name[name]

    @property
    def roots(self) -> tuple[str, ...]:
        """The graphs that users run: `main`, the objective and `training` where there are such."""
        return tuple(name for name in (self.main, self.objective, self.training) if name is not None)

    @cached_property
    def multiples(self) -> Mapping[str, int]:
        """What each dim is declared to be a multiple of, as `Dim.divide` takes it."""
        return {dim.name: dim.multiple_of for dim in self.dims}

    @property
    def trust(self) -> str:
        """What the plan may rest on, one of TRUST."""
        return (self.budget and self.budget.trust) or TRUST[0]

    @property
    def on_violation(self) -> str:
        """What a run does where a logit is beyond the range that the plan rests on, one of ON_VIOLATION."""
        return (self.budget and self.budget.on_violation) or ON_VIOLATION[0]

    def with_graphs(self, graphs: Iterable[Graph]) -> Program:
        """A copy with other graphs."""
        return replace(self, graphs=tuple(graphs))
