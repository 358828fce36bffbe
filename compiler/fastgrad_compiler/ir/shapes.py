"""The pass `shapes`: every node's type from its operands' types, one rule for each operation.

The elaborator asks the same rules while it builds a program, `verify` asks them again after every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fastgrad_compiler.ir.calls import reachable
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Graph, Node, Program, TensorType, Type
from fastgrad_compiler.ir.masks import FORGET, OPERANDS
from fastgrad_compiler.ir.shape_errors import (
    Blame,
    ShapeError,
    Site,
    fail,
    results,
    show,
    want_dtype,
    want_equal,
    want_float,
    want_rank,
)
from fastgrad_compiler.ir.shape_masks import MASK_RULES
from fastgrad_compiler.ir.shape_rules import RULES, shape_attribute

__all__ = ["SHAPE", "Blame", "ShapeError", "infer", "infer_shapes"]


def infer(
    op: str,
    inputs: tuple[Type, ...],
    attributes: Mapping[str, Attribute],
    multiples: Mapping[str, int] | None = None,
    *,
    declared: Type | None = None,
    graphs: Mapping[str, Graph] | None = None,
) -> Type:
    """The type of the result of `op`.

    `declared` is the type that an input, weight or buffer states; `graphs` are the typed graphs that a call or repeat
    names.
    Raises ShapeError (codes FG203-FG209, FG212, FG217) where the operands do not fit.
    """
    return SHAPE[op](Site(op, inputs, attributes, multiples or {}, declared, graphs or {}))


def infer_shapes(program: Program) -> Program:
    """The program with every type filled in; inputs, weights and buffers must state theirs.

    Raises ShapeError, its message led by `graph.node`, where operands do not fit.
    """
    done: dict[str, Graph] = {}
    for graph in reachable(program.by_name, program.by_name):
        done[graph.name] = _infer_graph(program, graph, done)
    return program.with_graphs(done[graph.name] for graph in program.graphs)


def _infer_graph(program: Program, graph: Graph, done: Mapping[str, Graph]) -> Graph:
    types: dict[str, Type] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        try:
            given = tuple(types[name] for name in node.inputs)
            types[node.name] = infer(
                node.op, given, dict(node.attributes), program.multiples, declared=node.type, graphs=done
            )
        except ShapeError as error:
            message = f"{graph.name}.{node.name}: {error.message}"
            raise ShapeError(error.code, message, error.blame, error.help) from None
        nodes.append(node if node.type is types[node.name] else replace(node, type=types[node.name]))
    return replace(graph, nodes=tuple(nodes))


# ---------------------------------------------------------------- structure


def _declared(site: Site) -> Type:
    if site.declared is None:
        fail("FG209", f"a node of op {site.op} states no type")
    return site.declared


def _constant(site: Site) -> Type:
    value = site.attributes["value"]
    dtype = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
    return TensorType(dtype, ())


def _literal(site: Site) -> Type:
    shape: list[Dim] = []
    values = site.attributes["values"]
    while isinstance(values, tuple) and values:
        shape.append(Dim.of(len(values)))
        values = values[0]
    return TensorType("float", tuple(shape))


def _item(site: Site) -> Type:
    source, index = site.inputs[0], site.integer("index")
    if isinstance(source, TensorType) or not 0 <= index < len(source):
        fail("FG209", f"item {index} of {source}", Blame(0, None, "not that many results"))
    return source[index]


def _call(site: Site) -> Type:
    graph = site.graphs[str(site.attributes["graph"])]
    _passes(site, graph, range(len(site.inputs)))
    found = graph.output_type
    if found is None:
        fail("FG209", f"graph {graph.name} has no type yet")
    return found


def _passes(site: Site, graph: Graph, given: range) -> None:
    wanted = graph.inputs
    if len(given) != len(wanted):
        fail("FG209", f"{site.op} of {graph.name} with {len(given)} inputs: it takes {len(wanted)}")
    for index, node in zip(given, wanted, strict=True):
        if site.inputs[index] != node.type:
            fail("FG209", f"{site.op} of {graph.name}: {node.name} is {node.type}, not {site.inputs[index]}",
                 site.whole(index))  # fmt: skip


def _runs(site: Site) -> list[Graph]:
    bodies = site.attributes["bodies"]
    if not isinstance(bodies, tuple):
        fail("FG217", f"attribute bodies of {site.op} is {bodies!r}, not a tuple")
    return [site.graphs[str(run[0])] for run in bodies if isinstance(run, tuple)]


def _repeat(site: Site) -> Type:
    carried = tuple(site.tensor(index) for index in range(site.integer("carried")))
    for graph in _runs(site):
        _passes(site, graph, range(len(site.inputs)))
        found = tuple(graph[name].type for name in graph.outputs)
        if found != carried:
            fail("FG221", f"repeat carries {', '.join(map(str, carried))} but {graph.name} gives {found}")
    return results(carried)


def _repeat_backward(site: Site) -> Type:
    carried = [site.tensor(index) for index in range(site.integer("carried"))]
    cotangents = sum(each.dtype == "float" for each in carried)
    forward = [site.tensor(index) for index in range(len(site.inputs) - cotangents)]
    return results([found for found in forward if found.dtype == "float"])


# ---------------------------------------------------------------- attention


def _attention(site: Site) -> Type:
    roles = {str(role): index for index, role in enumerate(_roles(site), 3)}
    floats = [0, 1, 2, *(roles[role] for role in ("near_q", "near_k") if role in roles)]
    q, k, v, *_ = [want_float(site, index, 4, 4) for index in floats]
    text = f"attention of q {show(q.shape)}, k {show(k.shape)}, v {show(v.shape)}"
    for index in floats[1:]:
        want_equal(site, (0, 0), (index, 0), f"{text}: the batch of an operand differs")
    _pair(site, 0, 1, f"{text}: q and k differ in width")
    want_equal(site, (1, -2), (2, -2), f"{text}: k and v differ in length")
    want_equal(site, (1, -3), (2, -3), f"{text}: k and v differ in heads")
    if "near_q" in roles:
        near_q, near_k = roles["near_q"], roles["near_k"]
        _pair(site, near_q, near_k, f"{text}: near q and near k differ in width")
        want_equal(site, (0, -3), (near_q, -3), f"{text}: q and near q differ in heads")
        want_equal(site, (0, -2), (near_q, -2), f"{text}: q and near q differ in length")
        want_equal(site, (1, -2), (near_k, -2), f"{text}: k and near k differ in length")
        want_equal(site, (1, -3), (near_k, -3), f"{text}: k and near k differ in heads")
    for role, operand in OPERANDS.items():
        if role in roles:
            rank = 3 if operand.heads else 2
            want_dtype(site, roles[role], operand.dtype)
            want_rank(site, roles[role], rank, rank)
            want_equal(site, (0, 0), (roles[role], 0), f"{text}: {role} differs in number")
            want_equal(site, (1, -2), (roles[role], -1), f"{text}: {role} differs in length")
            if operand.heads:
                want_equal(site, (1, -3), (roles[role], 1), f"{text}: k and {role} differ in heads")
    for role in ("documents", FORGET):
        if role in roles:
            want_equal(site, (0, -2), (1, -2), f"{text}: {role} is of one sequence, q and k differ in length")
    return TensorType("float", (*q.shape[:-1], v.shape[-1]))


def _roles(site: Site) -> tuple[Attribute, ...]:
    roles = site.attributes["roles"]
    return roles if isinstance(roles, tuple) else ()


def _pair(site: Site, queries: int, keys: int, text: str) -> None:
    want_equal(site, (queries, -1), (keys, -1), text)
    q, k = site.tensor(queries).shape, site.tensor(keys).shape
    if q[-3] != k[-3]:
        heads, groups = q[-3].constant, k[-3].constant
        if heads is None or not groups or heads % groups:
            fail("FG208", f"attention with {q[-3]} query heads over {k[-3]} key heads: not a multiple",
                 Blame(queries, -3, f"{q[-3]} here"), Blame(keys, -3, f"{k[-3]} here"))  # fmt: skip


def _attention_backward(site: Site) -> Type:
    forward = Site(site.op, site.inputs[:-1], site.attributes, site.multiples)
    result = _attention(forward)
    if site.inputs[-1] != result:
        fail("FG203", f"{site.op}: the cotangent is {site.inputs[-1]}, the result {result}",
             site.whole(len(site.inputs) - 1))  # fmt: skip
    found = [site.tensor(index) for index in range(len(site.inputs) - 1)]
    return results([each for each in found if each.dtype == "float"])


SHAPE: dict[str, Callable[[Site], Type]] = {
    **RULES,
    **MASK_RULES,
    **dict.fromkeys(("input", "weight", "buffer"), _declared),
    "constant": _constant,
    "fill": lambda site: TensorType("float", shape_attribute(site)),
    "literal": _literal,
    "call": _call,
    "repeat": _repeat,
    "item": _item,
    "attention": _attention,
    "poly_attention": _attention,
    "poly_attention_backward": _attention_backward,
    "repeat_backward": _repeat_backward,
    "weight_gradient": lambda site: want_dtype(site, 0, "float"),
}
