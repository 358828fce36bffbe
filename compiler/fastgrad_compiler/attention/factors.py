"""Constant factors and transpositions of tensors, read off the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite, sqrt

from fastgrad_compiler.approximation.elementary import exp, log
from fastgrad_compiler.ir.graph import Node


def constant(nodes: Mapping[str, Node], name: str) -> float | None:
    """The finite value of a scalar that is computed, in floats, from numbers only."""
    return _folded(nodes, name, {})


def _folded(nodes: Mapping[str, Node], name: str, known: dict[str, float | None]) -> float | None:
    """The same; what is `known` is not computed again, however many read it."""
    if name not in known:
        node = nodes[name]
        if node.tensor.shape:
            known[name] = None
        elif node.op in ("constant", "fill"):
            value, number = node["value"], node.tensor.dtype != "bool"
            known[name] = _finite(float(value)) if isinstance(value, int | float) and number else None
        elif node.op in _CONSTANT and node.tensor.dtype == "float":
            known[name] = _applied(node.op, [_folded(nodes, each, known) for each in node.inputs])
        else:
            known[name] = None
    return known[name]


def _applied(op: str, values: list[float | None]) -> float | None:
    operands = [value for value in values if value is not None]
    if len(operands) != len(values):
        return None
    try:
        return _finite(_CONSTANT[op](*operands))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


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
    """(the other operand, c) where the node is c times it for a constant c, and of its type: not 0.5 times an int."""
    found = _factor(nodes, node)
    return found if found is not None and nodes[found[0]].tensor.dtype == node.tensor.dtype else None


def _factor(nodes: Mapping[str, Node], node: Node) -> tuple[str, float] | None:
    if node.op == "neg":
        return node.inputs[0], -1.0
    if node.op not in ("mul", "div"):
        return None
    left, right = node.inputs
    value = constant(nodes, right)
    if node.op == "div":
        inverse = None if not value else _finite(1 / value)
        return None if inverse is None else (left, inverse)
    if value is not None:
        return left, value
    value = constant(nodes, left)
    return None if value is None else (right, value)


def swaps(node: Node) -> bool:
    """Whether the node exchanges its last two axes and no others."""
    rank = len(node.tensor.shape)
    return node.op == "permute" and node["axes"] == (*range(rank - 2), rank - 1, rank - 2)
