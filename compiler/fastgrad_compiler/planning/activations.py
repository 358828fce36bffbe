"""What a training step holds: the values that each operation keeps for its backward pass, as generated code runs it.

A value that several operations keep is held once, and a view is held with what it views. Weights are not counted: they
are there anyway. What the backward pass needs beyond that, for the gradients that it works on, is counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TypeAlias

from fastgrad_compiler.attention.value import ATTENTION, Attention
from fastgrad_compiler.ir.calls import callees, graphs_with, reachable, runs
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import FUSED, Graph, Node, Program, TensorType, integer
from fastgrad_compiler.ir.masks import GATED, MASKS
from fastgrad_compiler.ir.ops import COMPARISONS
from fastgrad_compiler.planning.cost import EXACT, Way, flops, shape_of

BYTES = {"float": 4, "int": 8, "bool": 1}  # floats are float32


@dataclass(frozen=True)
class Keeps:
    """What an operation keeps: which of its inputs, its output, and tensors of its own.

    Tensors of its own are so many numbers for each entry of the output, or for each row of it.
    """

    inputs: tuple[int, ...] = ()
    output: bool = False
    entries: float = 0.0
    rows: int = 0


NOTHING = Keeps()
_INPUT, _OUTPUT, _BOTH = Keeps((0,)), Keeps(output=True), Keeps((0, 1))

KEEPS: dict[str, Keeps] = {
    **dict.fromkeys(("mul", "div", "minimum", "maximum", "matmul"), _BOTH),
    **dict.fromkeys(("exp", "sqrt", "rsqrt", "tanh", "sigmoid", "relu", "softmax"), _OUTPUT),
    **dict.fromkeys(("log", "gelu", "silu", "softplus", "erf", "abs", "clamp", "polynomial"), _INPUT),
    **dict.fromkeys(("amax", "normalize_rows"), Keeps((0,), output=True)),
    **dict.fromkeys((*MASKS, "near_far", "where"), Keeps(entries=0.25)),  # which entries are hidden
    **dict.fromkeys(GATED, Keeps((0, 1), output=True)),
    "cross_entropy": Keeps((1,), entries=1),
    "log_sigmoid": Keeps((0,), entries=1),
    "rms_norm": Keeps((0,), entries=1, rows=1),
    "layer_norm": Keeps(entries=1, rows=2),
    "unit": Keeps((0,), rows=2),
    "depthwise": _BOTH,
    "embedding": Keeps((1,)),
    "dropout": Keeps(entries=1),
    "mse": _BOTH,
    "linear_cross_entropy": Keeps((0, 2), entries=1),  # its gradients are formed in the forward pass
}
"""Of the operations of a model."""

NOTHING_KEPT = frozenset(
    (
        *("input", "weight", "buffer", "constant", "fill", "literal", "arange", "sinusoid", "one_hot"),
        *("add", "sub", "neg", "sum", "mean", "concat", "stack", "pad", "patches", "merge_heads"),
        *("repeat_heads", "sum_to", "rotary", "shift", "alibi", "logical_not", *COMPARISONS),
    )
)
"""Sums, what only moves entries, and what has no gradient."""

DECLINED = {
    **dict.fromkeys(("call", "repeat"), "what it runs is counted"),
    **dict.fromkeys(ATTENTION, "it keeps all inputs, its output, and numbers of rows: `_keeps`"),
    **dict.fromkeys(
        (
            *("embedding_gradient", "depthwise_weights", "poly_attention_backward", "repeat_backward"),
            "weight_gradient",
        ),
        "stands in derived gradients alone",
    ),
}
"""Operations without a rule, and why."""

VIEWS = frozenset(
    ("reshape", "permute", "split_heads", "slice", "select", "broadcast_to", "item", "assume_bound", "cast")
)


def entries_of(shape: Iterable[Dim], sizes: Mapping[str, int]) -> int:
    """The number of entries of a shape at these sizes of its dims."""
    return prod(dim.evaluate(sizes) for dim in shape)


@dataclass(frozen=True)
class Held:
    """What a graph holds when its forward pass is over.

    own: bytes of values that are its own; inputs: places of the inputs that it keeps, which whoever calls it counts;
    outputs: places of outputs that are in `own`; peak: the most bytes at once, when the backward pass has gradients to
    work on, or what it makes again; again: flops of the forward pass that are done a second time.
    """

    own: float
    inputs: frozenset[int]
    outputs: frozenset[int]
    peak: float
    again: float = 0.0


Decisions: TypeAlias = Mapping[tuple[str, str], int]
"""By graph and call: in how many iterations of the repeat around it, from the first on, its values are made again."""
ALWAYS = 2**31


class Activations:
    """What the graphs of a program hold at some sizes of the run-time dims."""

    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        self.program, self.sizes = program, sizes
        self.trained = graphs_with(program, lambda node: node.op == "weight")
        self.reach = {
            name: frozenset(graph.name for graph in reachable(program.by_name, [name]))
            for name in program.by_name
        }
        self._known: dict[object, Held] = {}
        self._flops: dict[str, float] = {}

    def held(self, name: str, decisions: Decisions, iteration: int = 0) -> Held:
        """What a graph holds; iteration: of the repeat of which it is the body."""
        relevant = {place: times for place, times in decisions.items() if place[0] in self.reach[name]}
        own = frozenset(
            node for (graph, node), times in relevant.items() if graph == name and iteration < times
        )
        key = name, own, frozenset(relevant.items())
        if key not in self._known and FUSED in name:
            self._known[key] = self._of_kernel(self.program[name])
        elif key not in self._known:
            self._known[key] = _Count(self, self.program[name], own, relevant).held()
        return self._known[key]

    def _of_kernel(self, graph: Graph) -> Held:
        """A kernel of rows keeps what it reads, and makes the rest again."""
        places = frozenset(place for place, node in enumerate(graph.inputs) if node.tensor.dtype == "float")
        inputs = [self.bytes(node.tensor) for node in graph.inputs]
        gradients = sum(inputs) - max(inputs) + sum(self.bytes(graph[name].tensor) for name in graph.outputs)
        return Held(0.0, places, frozenset(), gradients)  # whoever calls it counts the largest

    def bytes(self, type_: TensorType) -> float:
        """Of a tensor."""
        return entries_of(type_.shape, self.sizes) * BYTES[type_.dtype]

    def flops(self, name: str) -> float:
        """Of the forward pass of a graph: of products exactly, of attention by its model, of the rest by its bytes."""
        if name not in self._flops:
            graph = self.program[name]
            self._flops[name] = sum(self._flops_of(graph, node) for node in graph.nodes)
        return self._flops[name]

    def _flops_of(self, graph: Graph, node: Node) -> float:
        if inner := runs(node):
            return sum(times * self.flops(callee) for callee, times in inner)
        if node.op in ("input", "weight", "buffer", "constant", "literal", *VIEWS) or isinstance(
            node.type, tuple
        ):
            return 0.0
        entries = entries_of(node.tensor.shape, self.sizes)
        if node.op == "matmul":
            return 2.0 * entries * graph[node.inputs[0]].tensor.shape[-1].evaluate(self.sizes)
        if node.op == "linear_cross_entropy":  # its gradients are products too
            x, w = (graph[name].tensor.shape for name in node.inputs[:2])
            return 6.0 * entries_of(x, self.sizes) * w[-1].evaluate(self.sizes)
        if node.op in ATTENTION:
            return self._attention_flops(graph, node)
        return POINTWISE * entries

    def _attention_flops(self, graph: Graph, node: Node) -> float:
        q, k, v = ([dim.evaluate(self.sizes) for dim in graph[name].tensor.shape] for name in node.inputs[:3])
        attention = Attention.of(node)
        shape = shape_of(attention, q[-2], k[-2], q[-1], v[-1])
        polynomial = attention.polynomial
        way = EXACT if polynomial is None else Way(polynomial.degree, attention.near)
        return prod(q[:-2]) * flops(shape, way).forward


LEAST_ENTRIES = 1 << 20  # as `runtime/linear_loss.py` has it
LOSSES = ("cross_entropy", "linear_cross_entropy")
POINTWISE = 20.0  # flops that a machine could do while it reads and writes a number


class _Count:
    """The values of one graph, as they are kept one after the other."""

    def __init__(self, whole: Activations, graph: Graph, again: frozenset[str], decisions: Decisions) -> None:
        self.whole, self.graph, self.made_again, self.decisions = whole, graph, again, decisions
        self.root: dict[str, str] = {}
        self.kept: set[str] = set()  # what is held: of the graph's own values, in `own`
        self.derived = {node.name for node in graph.inputs if node.tensor.dtype == "float"}
        self.own = self.peak = self.again = 0.0

    def held(self) -> Held:
        """Of the graph."""
        graph = self.graph
        for node in graph.nodes:
            if node.name in graph.alive:
                self._visit(node)
        outputs = (place for place, name in enumerate(graph.outputs) if self.root[name] in self.kept)
        inputs = (place for place, node in enumerate(graph.inputs) if node.name in self.kept)
        return Held(self.own, frozenset(inputs), frozenset(outputs), max(self.own, self.peak), self.again)

    def _visit(self, node: Node) -> None:
        self.root[node.name] = self.root[node.inputs[0]] if node.op in VIEWS else node.name
        if node.op == "weight":
            self.derived.add(node.name)
        if self.derived.isdisjoint(node.inputs) and not self.whole.trained.intersection(callees(node)):
            return
        self.derived.add(node.name)
        if node.op == "call":
            self._call(node)
        elif node.op == "repeat":
            self._repeat(node)
        elif node.op not in VIEWS:
            self._operation(node)

    def _keep(self, name: str) -> None:
        root = self.root[name]
        node = self.graph[root]
        if root in self.kept or node.op in ("weight", "buffer", "constant", "literal", "fill"):
            return
        self.kept.add(root)
        if node.op != "input":
            self.own += self.whole.bytes(node.tensor)

    def _operation(self, node: Node) -> None:
        keeps = self._keeps(node)
        for place in keeps.inputs:
            if place < len(node.inputs) and self._is_needed(node, place):
                self._keep(node.inputs[place])
        if keeps.output:
            self._keep(node.name)
        given = self.graph[node.inputs[0]].tensor
        shape = given.shape if node.op in LOSSES else node.tensor.shape
        size = self.whole.bytes(TensorType("float", shape))
        rows = size / max(1, shape[-1].evaluate(self.whole.sizes)) if shape else 0
        self.own += keeps.entries * size + keeps.rows * rows
        if node.op == "linear_cross_entropy":
            self._loss_of_product(node, size)
            return
        floats = [self.graph[name] for name in node.inputs if self.graph[name].tensor.dtype == "float"]
        moved = sum(self.whole.bytes(x.tensor) for x in floats if x.op not in ("weight", "constant"))
        self.peak = max(self.peak, self.own + moved + size)

    def _loss_of_product(self, node: Node, size: float) -> None:
        """The gradient of the weight, and in its forward pass the logits of a chunk, twice."""
        weights = self.whole.bytes(self.graph[node.inputs[1]].tensor)
        self.own += weights
        tokens = entries_of(self.graph[node.inputs[2]].tensor.shape, self.whole.sizes)
        classes = self.graph[node.inputs[1]].tensor.shape[-1].evaluate(self.whole.sizes)
        chunk = BYTES["float"] * max(2 * (size + weights) / BYTES["float"], LEAST_ENTRIES)
        logits = min(chunk, BYTES["float"] * tokens * classes)
        self.peak = max(self.peak, self.own + 2 * logits, self.own + size + weights)

    def _keeps(self, node: Node) -> Keeps:
        if node.op in ATTENTION:
            rows = 2 if Attention.of(node).near is not None else 1
            return Keeps(tuple(range(len(node.inputs))), output=True, rows=rows)
        return KEEPS.get(node.op, NOTHING)

    def _is_needed(self, node: Node, place: int) -> bool:
        """Whether the gradient of another input reads this one: not that of a product with a number."""
        if node.op not in ("mul", "matmul", "depthwise", "div"):
            return True
        others = [name for other, name in enumerate(node.inputs) if other != place]
        return not self.derived.isdisjoint(others) or (node.op == "div" and place == 1)

    def _call(self, node: Node) -> None:
        callee = str(node["graph"])
        held, again = self.whole.held(callee, self.decisions), node.name in self.made_again
        self._run(node, held, self.whole.flops(callee) if again else None)
        if not again and not isinstance(node.type, tuple) and held.outputs:
            self.kept.add(node.name)  # it is in what the callee owns

    def _repeat(self, node: Node) -> None:
        carried, first = integer(node["carried"]), 0
        for body, times in runs(node):
            graph = self.whole.program[body]
            for start, count in self._stretches(body, first, times):
                held = self.whole.held(body, self.decisions, start)
                # what an iteration was given is what the one before gave
                moved = sum(
                    self.whole.bytes(graph.inputs[place].tensor) for place in held.inputs if place < carried
                )
                if start == 0:
                    self._run(node, held, None)
                    count, start = count - 1, 1
                if count:
                    self.own += (count - 1) * (held.own + moved)
                    self.again += (count - 1) * held.again
                    self._run(node, held, None)
                    self.own += moved
            first += times

    def _stretches(self, body: str, first: int, times: int) -> Iterator[tuple[int, int]]:
        """(first, count) of the iterations that are alike: decisions change at certain ones."""
        own = {limit for (graph, _), limit in self.decisions.items() if graph == body}
        edges = sorted({first, first + times, *(edge for edge in own if first < edge < first + times)})
        for start, end in pairwise(edges):
            yield start, end - start

    def _run(self, node: Node, held: Held, again: float | None) -> None:
        """A graph that the node runs; again: flops where its values are made again."""
        given = [self.graph[name].tensor for name in node.inputs]
        moving = max((self.whole.bytes(x) for x in given if x.dtype == "float"), default=0.0)
        self.peak = max(self.peak, self.own + held.peak + moving)
        self.again += held.again + (again or 0.0)  # what is made again within is so twice
        self.own += held.own if again is None else 0.0
        for place, name in enumerate(node.inputs):
            if again is not None or place in held.inputs:
                self._keep(name)
