"""How messages and proofs name a node, its place in the file and a bound."""

from __future__ import annotations

from fastgrad_compiler.ir.graph import Node

_LONGEST = 40  # characters of source text that stand for an expression without a name


def describe(node: Node) -> str:
    """How to name a node to the user: the variable's name, or the expression's text."""
    if not node.name.startswith("_") or node.span is None:
        return node.name
    text = " ".join(node.span.text.split())
    if not text:
        return node.name
    return f"`{text if len(text) <= _LONGEST else text[: _LONGEST - 2] + '..'}`"


def place(node: Node) -> str:
    """` (gpt.tfg:12)`, or nothing where the node has no source."""
    return f" ({node.span.short_place})" if node.span else ""


def number(value: float) -> str:
    """A bound as text: 1, 0.25, 2.828."""
    return f"{value:.4g}"


def counted(number: int, noun: str) -> str:
    """`1 value`, `2 values`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
