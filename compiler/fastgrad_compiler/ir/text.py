"""The text form of a program: stable, one node per line, made to be read, compared and parsed back.

    program gpt
    main gpt
    dim n <= 65536 % 64
    budget { ... }
    memory(b = 1, n = 65536) % 4096

    graph gpt {
        %x = input() : float[b, n, 16]                      # gpt.tfg:14
        %w = weight(init = ("normal", 0.0, 0.02), label = "w") : float[16, 16]
        %y = matmul(%x, %w) : float[b, n, 16] where in [-1.0, 1.0], norm <= 1.0, by "rows of x have norm 1"
        return %y
    }

Inputs come first, then attributes by name: numbers by `repr`, `inf`, strings in JSON's quotes, tuples in
parentheses, one Dim as `<n - 1>`, a tuple of Dims as `[b, n]`. Types may be left out of a text that is
parsed (`shapes` infers them). A trailing comment `# file:line` is the node's place and is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import (
    ROLES,
    Attribute,
    Bound,
    Budget,
    DimInfo,
    Graph,
    Memory,
    Node,
    Program,
    Type,
)
from fastgrad_compiler.ir.text_parser import parse_program
from fastgrad_grammar.quote import comment, json_text
from fastgrad_grammar.source import Span

__all__ = ["parse_program", "print_attribute", "print_graph", "print_node", "print_program", "print_type"]

_INDENT = "    "
_PLAIN_NAME = re.compile(r"[\w.]+", re.ASCII)


def print_program(program: Program) -> str:
    """The text of a whole program; `parse_program` gives an equal program back."""
    parts = ["\n".join(_header(program))]
    parts.extend(print_graph(graph) for graph in program.graphs)
    return "\n\n".join(parts) + "\n"


def print_graph(graph: Graph) -> str:
    """The text of one graph, without a line end."""
    block = f" block {_name(graph.block)}" if graph.block else ""
    lines = [_placed(f"graph {_name(graph.name)}{block} {{", graph.span)]
    lines.extend(_INDENT + print_node(node) for node in graph.nodes)
    lines.append(f"{_INDENT}return {', '.join(_reference(name) for name in graph.outputs)}".rstrip())
    return "\n".join([*lines, "}"])


def print_node(node: Node) -> str:
    """One line: `%name = op(%input, attribute = value) : type where bound  # place`."""
    arguments = [_reference(name) for name in node.inputs]
    arguments.extend(f"{key} = {print_attribute(value)}" for key, value in node.attributes)
    text = f"{_reference(node.name)} = {node.op}({', '.join(arguments)})"
    if node.type is not None:
        text += f" : {print_type(node.type)}"
    if node.bound is not None:
        text += f" where {_bound(node.bound)}"
    return _placed(text, node.span)


def print_type(type_: Type) -> str:
    """`float[b, n]`, or `(float[b], int[])` for several results."""
    if isinstance(type_, tuple):
        return f"({', '.join(map(str, type_))})"
    return str(type_)


def print_attribute(value: Attribute) -> str:
    """The text of an attribute's value."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return json_text(value)
    if isinstance(value, Dim):
        return f"<{value}>"
    if isinstance(value, tuple):
        return _tuple(value)
    return repr(value)


def _tuple(values: tuple[Attribute, ...]) -> str:
    if values and all(isinstance(value, Dim) for value in values):
        return f"[{', '.join(map(str, values))}]"
    items = ", ".join(map(print_attribute, values))
    return f"({items},)" if len(values) == 1 else f"({items})"


def _header(program: Program) -> Iterator[str]:
    yield f"program {_name(program.name)}"
    for role in ROLES:
        if (graph := getattr(program, role)) is not None:
            yield f"{role} {_name(graph)}"
    yield from map(_dim, program.dims)
    if program.budget is not None:
        yield from _budget(program.budget)
    if program.memory is not None:
        yield _memory(program.memory)


def _dim(dim: DimInfo) -> str:
    text = f"dim {_name(dim.name)}"
    if dim.at_most is not None:
        text += f" <= {dim.at_most}"
    if dim.multiple_of != 1:
        text += f" % {dim.multiple_of}"
    return _placed(text, dim.span)


def _memory(memory: Memory) -> str:
    sizes = ", ".join(f"{_name(name)} = {size}" for name, size in memory.sizes)
    return f"memory({sizes})" + ("" if memory.piece is None else f" % {memory.piece}")


def _budget(budget: Budget) -> Iterable[str]:
    yield _placed("budget {", budget.span)
    for key, sign in (
        ("output", "<="),
        ("gradient", "<="),
        ("memory", "<="),
        ("near", "="),
        ("trust", "="),
        ("on_violation", "="),
    ):
        if (value := getattr(budget, key)) is not None:
            yield f"{_INDENT}{key} {sign} {value}"
    for rule in budget.rules:
        given = "" if rule.value is None else f" = {print_attribute(rule.value)}"
        yield _placed(f"{_INDENT}at {json_text(rule.pattern)} {_name(rule.kind)}{given}", rule.span)
    yield "}"


def _bound(bound: Bound) -> str:
    parts = [f"in [{bound.low!r}, {bound.high!r}]", f"norm <= {bound.norm!r}"]
    if bound.asserted:
        parts.append("asserted")
    if bound.proof:
        parts.append("by " + ", ".join(map(json_text, bound.proof)))
    return ", ".join(parts)


def _name(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) else json_text(name)


def _reference(name: str) -> str:
    return "%" + _name(name)


def _placed(text: str, span: Span | None) -> str:
    return text if span is None else f"{text}  # {comment(span.short_place)}"
