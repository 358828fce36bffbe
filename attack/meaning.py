"""What a program means: the oracle, which shares no code with recognition, emitters or kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastgrad_compiler.ir.graph import Node, Program
from fastgrad_compiler.reference.oracle import Run, evaluate, sizes_of
from fastgrad_compiler.reference.oracle_operations import MEANING, Rule, Sizes

Array = np.ndarray[Any, np.dtype[Any]]
Watch = Callable[[str, Node, Array], None]

ROUNDING = 1e-13  # relative: what the order of sums and the choice of formulas may do to one result
# fmt: off
EXACT = frozenset([
    "constant", "fill", "literal", "reshape", "permute", "split_heads", "merge_heads", "repeat_heads",
    "concat", "stack", "slice", "select", "pad", "patches", "broadcast_to", "embedding", "arange",
    "one_hot", "minimum", "maximum", "neg", "relu", "abs", "logical_not", "less", "less_equal", "equal",
    "cast", "clamp", "where", "amax", "causal", "window", "padding", "documents", "prefix",
    "near_far", "shift", "assume_bound", "dropout",
])
# fmt: on


def meaning(
    program: Program, inputs: Mapping[str, Array], weights: Mapping[str, Array], watch: Watch | None = None
) -> list[Array]:
    """The results of the main graph in float64; `watch` gets (path, node, value)."""
    with np.errstate(all="ignore"):
        return list(map(np.asarray, evaluate(program, inputs, weights, watch=watch)))


def rounded_otherwise(
    program: Program, inputs: Mapping[str, Array], weights: Mapping[str, Array], draws: np.random.Generator
) -> list[Array]:
    """As `meaning`, each result of an operation that rounds moved by a relative 1e-13 at random.

    So a jump shows where two right ways to compute differ: x / |x| is 1 by one, a rounding below 1 by the other, and
    int makes 1 and 0 of them.
    """

    def moved(rule: Rule) -> Rule:
        def found(node: Node, given: list[Array], sizes: Sizes) -> Array:
            result = rule(node, given, sizes)
            if result.dtype != np.float64:
                return result
            return result * (1.0 + ROUNDING * draws.uniform(-1.0, 1.0, result.shape))

        return found

    rules = {op: rule if op in EXACT else moved(rule) for op, rule in MEANING.items()}
    source = program[program.main]
    given = [np.asarray(inputs[node.name]) for node in source.inputs]
    with np.errstate(all="ignore"):
        found = Run(program, sizes_of(source, inputs), weights, meaning=rules).graph(source.name, given)
    return list(map(np.asarray, found))
