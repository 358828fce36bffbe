"""The sentences of a proof: what a step shows, why, and where it stands in the file."""

from __future__ import annotations

from math import isfinite

from fastgrad_compiler.analysis.bounds.facts import Fact
from fastgrad_compiler.analysis.bounds.outward import times_up
from fastgrad_compiler.analysis.bounds.shapes import SHAPES
from fastgrad_compiler.ir.graph import Node
from fastgrad_compiler.ir.masks import GATED, MASKS
from fastgrad_compiler.ir.words import describe, number, place

ASSUMED = "assumed in the file, not proved"

# Operations that are not worth a sentence where they leave the numbers as they are.
_QUIET = frozenset(
    (
        *SHAPES,
        *MASKS,
        "arange",
        "one_hot",
        "cast",
        *GATED,
        "near_far",
        "shift",
        "alibi",
        "where",
        "amax",
        "mean",
        "assume_bound",
    )
)

_REASONS = {
    "unit": "unit divides each row by its norm",
    "rotary": "rotary is a rotation",
    "depthwise": "a sum of bounded products",
    "softmax": "weights of a softmax",
    "normalize_rows": "shares of a row's sum",
    "sigmoid": "range of sigmoid",
    "tanh": "range of tanh",
    "add": "triangle inequality",
    "sub": "triangle inequality",
    "assume_bound": ASSUMED,
    "merge_heads": "rows of all heads joined",
    "attention": "a weighted mean of values",
}


def sentence(node: Node, fact: Fact, inputs: tuple[Fact, ...]) -> str:
    """One line of a proof; empty where the step shows nothing that its inputs did not show."""
    if node.op in ("constant", "fill") or (_is_quiet(node, inputs) and _same(fact, inputs)):
        return ""
    if node.op == "matmul":
        return _matmul(node, fact, inputs)
    reason = _REASONS.get(node.op) or _scaling(node, inputs) or node.op
    return f"{_claim(node, fact)}: {reason}{place(node)}"


def _is_quiet(node: Node, inputs: tuple[Fact, ...]) -> bool:
    """Whether the operation is of no interest in itself; so is a factor of 1."""
    one = node.op in ("mul", "div") and inputs[1].low == inputs[1].high == 1
    return one or node.op in _QUIET or (node.op == "mul" and inputs[0].low == inputs[0].high == 1)


def _same(fact: Fact, inputs: tuple[Fact, ...]) -> bool:
    """The entries of the first input and rows that are no longer or unknown; permuted axes keep their norms
    in another place.
    """
    if not inputs:
        return True
    source = max(inputs, key=lambda each: len(each.norms)) if len(inputs) == 2 else inputs[0]
    rows = max(fact.norms[-1:], default=0.0) <= max(source.norms, default=0.0) or not isfinite(fact.norms[-1])
    return (fact.low, fact.high) == (source.low, source.high) and rows


def _claim(node: Node, fact: Fact) -> str:
    if _speaks_of_rows(node, fact):
        rows = fact.norms[-1]
        return f"rows of {describe(node)} have norm at most {number(rows)}"
    if not isfinite(fact.magnitude):
        return _one_sided(node, fact)
    if fact.low == -fact.high:
        name = describe(node)
        size = f"entries of {name} are at most {number(fact.high)} in size"
        return size if name.startswith("`") else f"|{name}| is at most {number(fact.high)}"
    return f"{describe(node)} lies in [{number(fact.low)}, {number(fact.high)}]"


def _one_sided(node: Node, fact: Fact) -> str:
    if isfinite(fact.low):
        return f"{describe(node)} is at least {number(fact.low)}"
    if isfinite(fact.high):
        return f"{describe(node)} is at most {number(fact.high)}"
    return f"norms of {describe(node)} are bounded"


def _speaks_of_rows(node: Node, fact: Fact) -> bool:
    """Whether the norm of rows says more than the entries: the whole row is no longer than one entry may
    be.
    """
    several = bool(fact.norms) and node.tensor.shape[-1].constant != 1
    return several and node.op != "softmax" and isfinite(fact.norms[-1]) and fact.norms[-1] <= fact.magnitude


def _matmul(node: Node, fact: Fact, inputs: tuple[Fact, ...]) -> str:
    left, right = inputs[0].norms[-1], inputs[1].norms[-2]
    if times_up(left, right) <= fact.magnitude * (1 + 1e-12):
        reason = f"Cauchy-Schwarz with norms {number(left)} and {number(right)}"
    else:
        reason = "a sum of bounded products"
    return f"{_claim(node, fact)}: {reason}{place(node)}"


def _scaling(node: Node, inputs: tuple[Fact, ...]) -> str:
    """`times 2`, `divided by 4`, or what kind of product it is."""
    if node.op not in ("mul", "div"):
        return ""
    verb = "times" if node.op == "mul" else "divided by"
    for factor in reversed(inputs if node.op == "mul" else inputs[1:]):
        if factor.low == factor.high:
            return f"{verb} {number(factor.low)}"
    factor = inputs[1] if len(inputs[1].norms) <= len(inputs[0].norms) else inputs[0]
    if isfinite(factor.magnitude):
        return f"{verb} a factor in [{number(factor.low)}, {number(factor.high)}]"
    return f"{verb} a factor"
