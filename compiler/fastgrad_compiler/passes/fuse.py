"""The pass `fuse`: operations on rows, token by token, become one kernel, with a derived backward.

A group is a connected part of a graph whose values are rows [.., d] of one shape, numbers of each row [.., 1], weights
[d], or numbers. It becomes a graph of its own, G@fused, which a `call` runs, and the kernel of that graph and of its
backward goes over the rows once each (`codegen/cpp/rows.py`). The kernel keeps what the group reads, and nothing else:
a backward pass computes the rest again. Groups are made for targets with C++ kernels, and not in step forms.
"""

from __future__ import annotations

from dataclasses import replace

from fastgrad_compiler.ir.calls import reachable
from fastgrad_compiler.ir.graph import FUSED, STEP, Graph, Node, Program, TensorType, attributes
from fastgrad_compiler.ir.names import UniqueNames
from fastgrad_compiler.ir.rows import ELEMENTWISE, NORMS, REDUCTIONS, Shape, kind_of, row_shape
from fastgrad_compiler.passes.backward import Derivation
from fastgrad_compiler.targets import BACKENDS

LEAST_WIDTH, MOST_WIDTH = 8, 1 << 14  # of a row


def fuse_rows(program: Program, target: str = "auto") -> Program:
    """The program with a call of a new graph in place of each group, and those graphs with their backward ones."""
    if not BACKENDS[target].cpp:
        return program
    run = {graph.name for graph in reachable(program.by_name, program.roots)}
    groups: list[Graph] = []
    rest = [
        _fused(graph, groups, program) if graph.name in run and STEP not in graph.name else graph
        for graph in program.graphs
    ]
    whole = program.with_graphs((*groups, *rest))
    derivation = Derivation(whole)
    for group in groups:
        derivation.backward(group.name)
    return whole.with_graphs((*whole.graphs, *derivation.graphs))


def _fused(graph: Graph, groups: list[Graph], program: Program) -> Graph:
    names = UniqueNames((*program.by_name, *(group.name for group in groups)))
    for members in _groups(graph):
        body = _body(graph, members, names.take(f"{graph.name}{FUSED}"))
        if body is not None and _is_served(body, program):
            groups.append(body)
            graph = _with_call(graph, members, body)
    return graph


# ---------------------------------------------------------------- groups


def _groups(graph: Graph) -> list[frozenset[str]]:
    """The names of each group's nodes: as many as may run at one time, of one row shape."""
    found: list[tuple[Shape, frozenset[str]]] = []
    for node in graph.nodes:
        shape = _shape(graph, node)
        if shape is None:
            continue
        merged = frozenset((node.name,))
        for other, group in list(found):
            near = other == shape and not group.isdisjoint(node.inputs)
            if near and _is_convex(graph, merged | group):
                merged |= group
                found.remove((other, group))
        found.append((shape, merged))
    return [group for _, group in found]


def _shape(graph: Graph, node: Node) -> Shape | None:
    """The shape of the rows that a node works on, None where a kernel does not do what it does."""
    if node.op not in (*ELEMENTWISE, *REDUCTIONS, *NORMS) or not isinstance(node.type, TensorType):
        return None
    operands = [graph[name].tensor for name in node.inputs]
    shape = row_shape([node.type, *operands])
    width = None if shape is None else shape[-1].constant
    if shape is None or width is None or not LEAST_WIDTH <= width <= MOST_WIDTH:
        return None
    kinds = [kind_of(each, shape) for each in (node.type, *operands)]
    is_reduction = node.op in REDUCTIONS and (node["axes"] != (-1,) or not node["keepdim"])
    return None if None in kinds or kinds[0] in ("column", "number") or is_reduction else shape


def _is_convex(graph: Graph, members: frozenset[str]) -> bool:
    """Whether no way leads out of a group and back into it."""
    after: set[str] = set()
    for node in graph.nodes:
        if node.name in members:
            if not after.isdisjoint(node.inputs):
                return False
        elif not (after.isdisjoint(node.inputs) and members.isdisjoint(node.inputs)):
            after.add(node.name)
    return True


def _body(graph: Graph, members: frozenset[str], name: str) -> Graph | None:
    """The graph of a group; None where it has several results, or is one operation that PyTorch does as fast."""
    visible = [
        each
        for each in members
        if each in graph.outputs or any(user.name not in members for user in graph.users[each])
    ]
    operations = [node for node in graph.nodes if node.name in members]
    if len(visible) != 1 or not (len(operations) > 1 or operations[0].op in NORMS):
        return None
    given = [
        graph[source]
        for source in dict.fromkeys(source for node in operations for source in node.inputs)
        if source not in members
    ]
    constants = [node for node in given if node.op == "constant"]
    inputs = [
        Node(node.name, "input", type=node.type, span=node.span) for node in given if node.op != "constant"
    ]
    nodes = (*inputs, *constants, *(replace(node, bound=None) for node in operations))
    return Graph(name, nodes, tuple(visible), span=graph[visible[0]].span)


def _is_served(body: Graph, program: Program) -> bool:
    """Whether kernels can do both the group and its derived backward."""
    shape = body[body.outputs[0]].tensor.shape
    alone = program.with_graphs((body,))
    derivation = Derivation(replace(alone, main=body.name, objective=None, training=None))
    backward = derivation.derived(body)
    return all(is_kernel_graph(graph, shape) for graph in (body, backward))


def is_kernel_graph(graph: Graph, shape: Shape) -> bool:
    """Whether each node of a graph is one that a kernel of rows of this shape has code for."""
    return all(
        _is_kernel_node(graph, node, shape) for node in graph.nodes if node.op not in ("input", "constant")
    )


def _is_kernel_node(graph: Graph, node: Node, shape: Shape) -> bool:
    if not isinstance(node.type, TensorType):
        return False
    kinds = [kind_of(each, shape) for each in (node.type, *(graph[name].tensor for name in node.inputs))]
    if None in kinds:
        return False
    if node.op == "sum_to":
        return node.name in graph.outputs or kinds[0] == "each"
    return node.op in (*ELEMENTWISE, *REDUCTIONS, *NORMS, "broadcast_to")


def _with_call(graph: Graph, members: frozenset[str], body: Graph) -> Graph:
    """The graph with one call in place of the members, under the name of the one that others read."""
    (result,) = body.outputs
    values = attributes(graph=body.name, label=body.name)
    given = tuple(node.name for node in body.inputs)
    call = replace(graph[result], op="call", inputs=given, attributes=values)
    nodes = (call if node.name == result else node for node in graph.nodes)
    return replace(graph, nodes=tuple(n for n in nodes if n is call or n.name not in members))
