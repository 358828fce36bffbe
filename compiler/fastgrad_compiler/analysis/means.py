"""Whether an objective is a sum of means over tokens, which those of pieces of a sequence give together."""

from __future__ import annotations

from fastgrad_compiler.ir.graph import Graph, Node
from fastgrad_grammar.diagnostics import Diagnostic

MEANS = frozenset(("mean", "cross_entropy", "linear_cross_entropy", "mse"))
LINEAR = frozenset(("add", "sub", "neg", "mean", "sum", "cast", "reshape"))


def problem(graph: Graph, along: str) -> Diagnostic | None:
    """Why an objective is no sum of means over tokens with constant factors; None if it is."""
    of_tokens: set[str] = set()
    means: set[str] = set()
    for node in graph.nodes:
        given = of_tokens.intersection(node.inputs)
        if any(along in dim.names for dim in node.tensor.shape):
            bad = bool(means.intersection(node.inputs))
            of_tokens.add(node.name)
        elif given:
            # pieces differ in how many targets are not ignored
            bad = node.op not in MEANS or node.get("ignored") is not None
            means.add(node.name)
        else:
            bad = not _is_linear(node, means)
            means.update([node.name] if means.intersection(node.inputs) else [])
        if bad:
            message = f"no value in pieces along {along}: an objective is a sum of means over tokens there"
            return Diagnostic("FG501", message, node.span or graph.span)
    return None


def _is_linear(node: Node, means: set[str]) -> bool:
    """Whether a value changes in proportion with the means that it is made of."""
    of_means = [name in means for name in node.inputs]
    if not any(of_means) or node.op in LINEAR:
        return True
    return (node.op == "mul" and sum(of_means) == 1) or (node.op == "div" and of_means == [True, False])
