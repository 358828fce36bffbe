"""Constant factors and transpositions of tensors, read off the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt

from fastgrad_compiler.elementary import exp, log
from fastgrad_compiler.graph import Node


def constant(nodes: Mapping[str, Node], name: str) -> float | None:
    """The value of a scalar that is computed from constants only."""
    node = nodes[name]
    if node.op in ("constant", "fill"):
        value = node["value"]
        return float(value) if isinstance(value, int | float) and not node.tensor.shape else None
    if node.op not in _CONSTANT or node.tensor.shape:
        return None
    values = [constant(nodes, each) for each in node.inputs]
    known = [value for value in values if value is not None]
    if len(known) != len(values):
        return None
    try:
        return _CONSTANT[node.op](*known)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


_CONSTANT: dict[str, Callable[..., float]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x: -x,
    "sqrt": sqrt,
    "rsqrt": lambda x: 1 / sqrt(x),
    "exp": exp,
    "log": log,
    "cast": lambda x: x,
}


def factor_of(nodes: Mapping[str, Node], node: Node) -> tuple[str, float] | None:
    """(the other operand, c) where the node is c times it for a constant c."""
    if node.op == "neg":
        return node.inputs[0], -1.0
    if node.op not in ("mul", "div"):
        return None
    left, right = node.inputs
    value = constant(nodes, right)
    if value is not None and (node.op == "mul" or value != 0):
        return left, value if node.op == "mul" else 1 / value
    value = constant(nodes, left)
    return (right, value) if node.op == "mul" and value is not None else None


def swaps(node: Node) -> bool:
    """Whether the node exchanges its last two axes and no others."""
    rank = len(node.tensor.shape)
    return node.op == "permute" and node["axes"] == (*range(rank - 2), rank - 1, rank - 2)
