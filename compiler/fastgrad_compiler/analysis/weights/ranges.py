"""R of the logits of each attention, proved from the values of the weights (docs/mathematics.md, section 7).

The flat program is walked with what is known of the rows of each tensor (`weight_rows.py`, `weight_rules.py`); only
what queries and keys depend on is looked at. A logit is then the bilinear form (x M + a).(y N + b) on two balls, of
which the norm is bounded. Numbers speak of real arithmetic, with a relative slack of 1e-6 for the rounding of float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import TypeAlias

import torch
from torch import Tensor

from fastgrad_compiler.analysis.ranges import LogitRange
from fastgrad_compiler.analysis.weights.logits import Logits, logits
from fastgrad_compiler.analysis.weights.rows import Rows, ball
from fastgrad_compiler.analysis.weights.rules import ROWS, UNREAD
from fastgrad_compiler.analysis.weights.step import Step
from fastgrad_compiler.attention.table import is_own
from fastgrad_compiler.attention.value import ATTENTION, Attention
from fastgrad_compiler.ir.flatten import flatten
from fastgrad_compiler.ir.graph import Graph, Node, Program, TensorType
from fastgrad_compiler.ir.ops import COMPARISONS
from fastgrad_compiler.ir.words import describe, number, place
from fastgrad_compiler.reference.operations_torch import TORCH
from fastgrad_compiler.reference.torch_env import Env

_NARROWER = 0.99  # what is left of R where a centre is worth its subtraction
_HELD = ("weight", "buffer")
_ENV = Env({}, torch.float64, torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class _Lost:
    """Nothing is known of a tensor, and why."""

    reason: str


_Known: TypeAlias = "Rows | _Lost"


def weight_ranges(
    program: Program, weights: Mapping[str, Tensor], *, centring: bool = True
) -> dict[str, LogitRange]:
    """What these weights prove of each attention's logits, or the program if that is no worse, by `full_path`.

    Attentions whose weights are a polynomial of the model's own need no range and are left out.

    Args:
        program: any stage from the recognition of attention on.
        weights: every weight and buffer by path, of any float dtype and on any device.
        centring: whether an attention may be given a centre; R is then that of the centred keys.

    Raises:
        ValueError: a weight is missing or has another shape than its node.
    """
    with torch.no_grad():
        return _Walk(flatten(program), weights, centring).ranges()


class _Walk:
    """The nodes of the flat graph in their order, with what is known of those that matter."""

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor], centring: bool) -> None:
        self.graph = graph
        self.weights = weights
        self.centring = centring
        self.attentions = [node for node in graph.nodes if node.op in ATTENTION and not is_own(node)]
        self.static = _static(graph)
        self.facts: dict[str, _Known] = {}

    def ranges(self) -> dict[str, LogitRange]:
        """The range of each attention by its path; facts are dropped after their last reader."""
        last = self._last_readers()
        attended = {node.name for node in self.attentions}
        found = {}
        for index, node in enumerate(self.graph.nodes):
            if node.name in last:
                self.facts[node.name] = self._fact(node)
            if node.name in attended:
                found[node.name] = self._range(node)
            for name in {node.name, *node.inputs}:
                if last.get(name, inf) <= index:
                    self.facts.pop(name, None)
        return found

    def _last_readers(self) -> dict[str, int]:
        """For each node that matters the place of the last one that asks for it."""
        last: dict[str, int] = {}
        attended = {node.name for node in self.attentions}
        for index in range(len(self.graph.nodes) - 1, -1, -1):
            node = self.graph.nodes[index]
            read = set(self._read(node)) if node.name in last else set()
            if node.name in attended:
                read |= set(node.inputs[:2])
            for name in read:
                last.setdefault(name, index)
        return last

    def _read(self, node: Node) -> tuple[str, ...]:
        """The inputs that the rule of a node asks for."""
        if node.name in self.static:
            return node.inputs
        if node.op not in ROWS:
            return ()
        unread = UNREAD.get(node.op, ())
        return tuple(name for index, name in enumerate(node.inputs) if index not in unread)

    def _fact(self, node: Node) -> _Known:
        if node.name in self.static:
            return self._computed(node)
        known = [self.facts.get(name) for name in node.inputs]
        rows = tuple(fact if isinstance(fact, Rows) else None for fact in known)
        rule, bound = ROWS.get(node.op), node.bound
        inputs = tuple(self.graph[name] for name in node.inputs)
        found = rule(Step(node, inputs, rows)) if rule else None
        width = node.tensor.shape[-1].constant if node.tensor.shape else None
        if found is not None and width is not None:
            return found.shaped(len(node.tensor.shape), width)
        if bound is not None and not bound.asserted and isfinite(bound.norm) and width is not None:
            norm = torch.full((1,) * (len(node.tensor.shape) - 1), bound.norm, dtype=torch.float64)
            return ball(norm, width, bound.proof)
        lost = next((fact for fact in known if isinstance(fact, _Lost)), None)
        return lost or _Lost(f"nothing limits the rows of {describe(node)}{place(node)}")

    def _computed(self, node: Node) -> Rows:
        """The value of a node that depends on weights and constants alone."""
        if node.op in _HELD:
            path = str(node["label"])
            return Rows((), self._weight(node, path), weights=(path,))
        inputs = [fact for name in node.inputs if isinstance(fact := self.facts[name], Rows)]
        value = TORCH[node.op](node, [rows.offset for rows in inputs], _ENV)
        if not isinstance(value, Tensor):
            raise ValueError(f"{node.op} {node.name} has several results")
        return Rows((), value).because(*inputs)

    def _weight(self, node: Node, path: str) -> Tensor:
        if path not in self.weights:
            raise ValueError(f"there is no weight {path}")
        weight, shape = self.weights[path].detach(), _ENV.shape(node.tensor.shape)
        if tuple(weight.shape) != shape:
            raise ValueError(f"weight {path} is {node.tensor}, not of shape {tuple(weight.shape)}")
        return weight.to("cpu", torch.float64 if weight.is_floating_point() else weight.dtype)

    def _range(self, node: Node) -> LogitRange:
        attention, (q, k) = Attention.of(node), (self.facts[name] for name in node.inputs[:2])
        heads, groups = (self.graph[name].tensor.shape[-3].constant or 1 for name in node.inputs[:2])
        known = attention.range
        proved = known.limit if known.origin == "program" else inf
        lost = [fact.reason for fact in (q, k) if isinstance(fact, _Lost)]
        if attention.alibi:
            lost = ["the slopes of alibi grow with the distance of a pair"]
        if not (isinstance(q, Rows) and isinstance(k, Rows)) or lost:
            if isfinite(proved):
                return LogitRange("program", (proved,) * heads, known.proof)
            return LogitRange("weights", (inf,) * heads, tuple(dict.fromkeys(lost)))
        plain = logits(q, k, heads, groups, attention.scale, None)
        centred = None
        if self.centring and isfinite(plain.largest) and bool(plain.shared.any()):
            centred = logits(q, k, heads, groups, attention.scale, plain.shared)
        return _best(known.proof, plain, centred, proved)


def _best(proof: tuple[str, ...], plain: Logits, centred: Logits | None, proved: float) -> LogitRange:
    """The centred range where it is narrower, else the plain one, no head above what the program proves."""
    limited = min(plain.largest, proved)
    if centred is not None and centred.largest <= _NARROWER * limited:
        gain = (
            f"subtracting from the keys of a head what they share, which softmax ignores, narrows R from "
            f"{number(limited)} to {number(centred.largest)}"
        )
        reasons, centre = (*centred.reasons, gain), tuple(map(tuple, centred.shared.tolist()))
        return LogitRange("weights", centred.heads, reasons, centre, centred.norms)
    if isfinite(proved) and min(plain.heads) >= proved:
        return LogitRange("program", (proved,) * len(plain.heads), proof)
    reasons = plain.reasons
    if plain.largest > proved:
        reasons += (f"no head exceeds {number(proved)}, which the program proves",)
    elif centred is not None and centred.largest < limited:
        reasons += (f"centred keys would narrow R from {number(limited)} to {number(centred.largest)} only",)
    heads, norms = (tuple(min(r, proved) for r in found) for found in (plain.heads, plain.norms))
    return LogitRange("weights", heads, reasons, norms=norms)


def _static(graph: Graph) -> set[str]:
    """The nodes that are computed from weights and constants alone, of a shape that does not depend on the run.

    Where a float is compared or truncated, its last bits decide, which are others in the dtype of the run.
    """
    found: set[str] = set()
    for node in graph.nodes:
        if node.op in _HELD:
            found.add(node.name)
        elif _computable(graph, node) and all(name in found for name in node.inputs):
            one = isinstance(node.type, TensorType)  # and not several results
            if one and all(dim.constant is not None for dim in node.tensor.shape):
                found.add(node.name)
    return found


def _computable(graph: Graph, node: Node) -> bool:
    return node.op in TORCH and node.op != "dropout" and not _jumps(graph, node)


def _jumps(graph: Graph, node: Node) -> bool:
    """Whether the result may change by a step where a float input changes by a rounding error."""
    compares = node.op in COMPARISONS or (node.op == "cast" and node["dtype"] != "float")
    return compares and any(graph[name].tensor.dtype == "float" for name in node.inputs)
