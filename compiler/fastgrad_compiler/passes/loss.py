"""The passes `training` and `loss`: a graph from the model's inputs and targets to the loss, which never makes logits.

`training` joins the model and its objective where the loss is a cross entropy of a product: G@loss takes what the graph
G takes, then what the objective takes beyond its results. Where the product stands in a block that G calls last, that
block has such a graph too. `loss` then rewrites each cross_entropy of x @ w, also with a bias, a factor or a slice of
tokens between them, to one operation, which works on a chunk of tokens at a time (`runtime/linear_loss.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain

from fastgrad_compiler.ir.builder import Builder, Value
from fastgrad_compiler.ir.graph import Graph, Node, Program, attributes, integer, loss_form
from fastgrad_compiler.ir.names import UniqueNames

RUNS = ("call", "repeat")


def derive_training(program: Program) -> Program:
    """The program with the graphs of its loss from inputs and targets, or as it is where logits have other uses."""
    if program.objective is None or any(node.op in RUNS for node in program[program.objective].nodes):
        return program
    derived = _joined(program, program[program.main], program[program.objective])
    if derived is None:
        return program
    return replace(program, graphs=(*program.graphs, *derived), training=derived[-1].name)


def _joined(program: Program, graph: Graph, objective: Graph) -> tuple[Graph, ...] | None:
    """The graph and the objective as one, after such graphs that it runs; None if logits are made all the same."""
    last = graph[graph.outputs[0]]
    if len(graph.outputs) == 1 and last.op == "call" and not graph.users[last.name]:
        inner = _joined(program, program[str(last["graph"])], objective)
        return None if inner is None else (*inner, _calling(graph, last, inner[-1], objective))
    joined = _appended(graph, objective)
    found = any(_head(joined, node) for node in joined.nodes if node.op == "cross_entropy")
    return (joined,) if found else None


def _appended(graph: Graph, objective: Graph) -> Graph:
    """The nodes of both: the first inputs of the objective are the results of the graph."""
    taken = UniqueNames(node.name for node in graph.nodes)
    results = dict(zip((node.name for node in objective.inputs), graph.outputs, strict=False))
    names = results | {n.name: taken.take(n.name) for n in objective.nodes if n.name not in results}
    added = [node.renamed(names) for node in objective.nodes if node.name not in results]
    targets = [node for node in added if node.op == "input"]
    rest = [node for node in (*graph.nodes, *added) if node.op != "input"]
    nodes = (*graph.inputs, *targets, *rest)
    outputs = tuple(names[name] for name in objective.outputs)
    whole = Graph(loss_form(graph.name), nodes, outputs, span=objective.span)
    return replace(whole, nodes=tuple(n for n in nodes if n.op == "input" or n.name in whole.alive))


def _calling(graph: Graph, last: Node, inner: Graph, objective: Graph) -> Graph:
    """The graph with its last call replaced by one that gives the loss."""
    taken = UniqueNames(node.name for node in graph.nodes if node is not last)
    targets = [replace(n, name=taken.take(n.name)) for n in inner.inputs[len(last.inputs) :]]
    given = (*last.inputs, *(node.name for node in targets))
    values = attributes(graph=inner.name, label=last["label"])
    name = taken.take(objective.outputs[0])
    call = Node(name, "call", given, values, inner.output_type, span=last.span)
    others = tuple(node for node in graph.nodes if node.op != "input" and node is not last)
    return Graph(
        loss_form(graph.name), (*graph.inputs, *targets, *others, call), (name,), span=objective.span
    )


# ---------------------------------------------------------------- the rewrite


def fuse_loss(program: Program) -> Program:
    """The program with one operation in place of each cross_entropy of a product whose logits nothing else reads."""
    return program.with_graphs(_rewritten(graph, program.multiples) for graph in program.graphs)


@dataclass(frozen=True)
class _Head:
    """The product, and what is done to it before the loss, first things first."""

    product: Node
    between: tuple[Node, ...]

    @property
    def names(self) -> frozenset[str]:
        """What the logits are made by."""
        return frozenset(node.name for node in (self.product, *self.between))


def _rewritten(graph: Graph, multiples: Mapping[str, int]) -> Graph:
    for loss in graph.nodes:
        head = _head(graph, loss) if loss.op == "cross_entropy" else None
        if head is not None:
            added = _emitted(Builder(graph.nodes, multiples), graph, loss, head)
            kept = (
                (node,) if node is not loss else added for node in graph.nodes if node.name not in head.names
            )
            return _rewritten(replace(graph, nodes=tuple(chain.from_iterable(kept))), multiples)
    return graph


def _head(graph: Graph, loss: Node) -> _Head | None:
    """How the logits of a loss are made; None where they are no product, or have other uses, or are small.

    They are small where there are fewer classes than entries in a row of x.
    """
    name, between = loss.inputs[0], list[Node]()
    while len(graph.users[name]) == 1 and name not in graph.outputs:
        node = graph[name]
        if node.op == "matmul":
            x, w = (graph[each].tensor.shape for each in node.inputs)
            width, classes = w[0].constant, w[-1].constant
            pays = width is not None and classes is not None and classes >= width
            return _Head(node, tuple(reversed(between))) if pays and len(x) > 1 and len(w) == 2 else None
        moved = _moved(graph, node)
        if moved is None:
            return None
        between.append(node)
        name = moved
    return None


def _moved(graph: Graph, node: Node) -> str | None:
    """What a node changes, where that may as well be done to x and the bias; None for any other node."""
    shape, operands = node.tensor.shape, [graph[name].tensor.shape for name in node.inputs]
    if node.op == "slice":
        return node.inputs[0] if integer(node["axis"]) % len(shape) < len(shape) - 1 else None
    if node.op not in ("add", "mul", "div"):
        return None
    other = shape[-1:] if node.op == "add" else ()
    places = [0] if node.op == "div" else [0, 1]
    found = (i for i in places if operands[i] == shape and operands[1 - i] == other and len(shape) > 1)
    return next((node.inputs[i] for i in found), None)


def _emitted(build: Builder, graph: Graph, loss: Node, head: _Head) -> tuple[Node, ...]:
    """The nodes in place of a loss, the last with its name: what stood between is done to x and to a bias."""
    build.span = loss.span
    x, w, targets = (Value(build, graph[name]) for name in (*head.product.inputs, loss.inputs[1]))
    bias: Value | None = None
    changed = head.product.name
    for node in head.between:
        other = next((Value(build, graph[name]) for name in node.inputs if name != changed), None)
        if node.op == "slice":
            x = build.emit("slice", (x,), dict(node.attributes))
        elif node.op == "add":
            assert other is not None
            bias = other if bias is None else bias + other
        else:
            assert other is not None
            x, bias = x.op(node.op, other), None if bias is None else bias.op(node.op, other)
        changed = node.name
    given = (x, w, targets) if bias is None else (x, w, targets, bias)
    fused = build.emit("linear_cross_entropy", given, dict(loss.attributes))
    last = replace(fused.node, name=loss.name, bound=loss.bound)
    return (*build.nodes[len(graph.nodes) : -1], last)
