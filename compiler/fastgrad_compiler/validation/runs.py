"""One graph before and after a pass, run on its cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from fastgrad_compiler.ir.graph import Graph, Node, Program, integer
from fastgrad_compiler.reference.oracle import Run, Values
from fastgrad_compiler.reference.oracle_attention import Array
from fastgrad_compiler.reference.oracle_operations import MEANING, Rule
from fastgrad_compiler.validation.cases import Case, Weights, drawn
from fastgrad_compiler.validation.cone import Pair, cut, fresh_nodes, kept_nodes
from fastgrad_compiler.validation.shrink import Fit, fits
from fastgrad_compiler.validation.structure import Claim, pairs
from fastgrad_compiler.validation.values import is_as_proved, is_extreme, is_rounding, unequal

NOISE = 1e-13  # of inputs, to see what rounding of 1e-16 may do at most
ATTEMPTS = 12  # halvings of inputs until a run stays within float64

Pass: TypeAlias = Callable[[Program], Program]


@dataclass(frozen=True)
class Difference:
    """Where two programs differ: the graph, the claim that fails and its place, on which inputs, and how."""

    graph: str
    claim: Claim
    place: str
    case: Case
    text: str


@dataclass(frozen=True)
class Checked:
    """What was compared of a graph that changed: how many claims, and in how many runs."""

    graph: str
    claims: int
    runs: int


def compare_graphs(given: Pair, again: Pass | None, seed: int) -> Checked | Difference:
    """Run the pair on every case that is small enough; the first difference, or what was compared.

    `again` is the pass: what differs only where sizes were made smaller is told if the pass does the same to those.
    """
    runs, whole = 0, cut(given)
    for fit in fits(whole.program, whole.later, whole.before.name, whole.after.name):
        pair = _fitted(whole, fit)
        for case in fit.cases:
            if runs and case.spare:
                continue
            case = replace(case, seed=case.seed + 1000 * seed)
            outcome = _run(pair, case)
            if isinstance(outcome, Difference) and (
                not fit.shrunk or _confirmed(given, pair, fit, case, again)
            ):
                return outcome
            runs += outcome is True
    return Checked(whole.before.name, len(whole.found.claims), runs)


def _fitted(pair: Pair, fit: Fit) -> Pair:
    old, new = fit.before[pair.before.name], fit.after[pair.after.name]
    return Pair(fit.before, fit.after, old, new, pair.found, pair.free and not fit.shrunk)


def _confirmed(given: Pair, small: Pair, fit: Fit, case: Case, again: Pass | None) -> bool:
    """Whether the pass itself makes the difference of the smaller program that it is given.

    It may have read a size that was made smaller; then the two programs are none of one pass.
    """
    if again is None:
        return False
    program = fit.smaller(given.program)
    later = again(program)
    for old, new, found in pairs(program, later):
        if old.name == small.before.name:
            return isinstance(_run(cut(Pair(program, later, old, new, found, False)), case), Difference)
    return False


def _run(pair: Pair, case: Case) -> Difference | bool | None:
    """The first difference of a case, True where there is none, None where the case says nothing.

    What is proved of a node may rest on facts that drawn inputs do not have; such a run says nothing.
    """
    for _ in range(ATTEMPTS):
        try:
            reference = _reference(pair, case)
        except (ValueError, IndexError):
            return None  # the program has no value at these sizes
        if not is_extreme(pair.before, reference):
            difference = _first_difference(pair, case, reference)
            if difference is None:
                return True
            if pair.free or is_as_proved(pair.before, reference):
                return difference
        case = case.smaller()
    return None


def _reference(pair: Pair, case: Case) -> dict[str, Values]:
    """The values of the earlier graph."""
    run = _start(pair.program, pair.before, case)
    read = {name for node in pair.before.nodes for name in node.inputs}
    read |= kept_nodes(pair) | {claim.old for claim in pair.found.claims}
    values: dict[str, Values] = {}
    for node in pair.before.nodes:
        if node.name in read:
            values[node.name] = _value(run, node, values, case)
    return values


def _value(run: Run, node: Node, values: Mapping[str, Values], case: Case) -> Values:
    if node.op == "input":
        return drawn(node, case)
    with np.errstate(all="ignore"):
        return run.node(node, [values[name] for name in node.inputs])


def _start(program: Program, graph: Graph, case: Case) -> Run:
    return Run(program, case.sizes, Weights(program, graph, case), meaning=_TOTAL)


def _wrapped(op: str, ids: int, count: Callable[[Node, list[Array]], int]) -> Rule:
    """The rule of a lookup, with ids modulo what there is: drawn ids know nothing of tables."""

    def rule(node: Node, inputs: list[Array], sizes: Mapping[str, int]) -> Array:
        wrapped = list(inputs)
        wrapped[ids] = inputs[ids] % max(count(node, inputs), 1)
        return MEANING[op](node, wrapped, sizes)

    return rule


_TOTAL: Mapping[str, Rule] = {
    **MEANING,
    "embedding": _wrapped("embedding", 1, lambda node, inputs: len(inputs[0])),
    "cross_entropy": _wrapped("cross_entropy", 1, lambda node, inputs: inputs[0].shape[-1]),
    "linear_cross_entropy": _wrapped("linear_cross_entropy", 2, lambda node, inputs: inputs[1].shape[-1]),
    "one_hot": _wrapped("one_hot", 0, lambda node, inputs: integer(node["classes"])),
}


def _first_difference(pair: Pair, case: Case, reference: Mapping[str, Values]) -> Difference | None:
    """The first claim that fails; everything around it is as the earlier graph has it."""
    fresh = fresh_nodes(pair)
    values: dict[str, Values] = {name: reference[name] for name in kept_nodes(pair)}
    run = _start(pair.later, pair.after, case)
    for node in pair.after.nodes:
        claims = [claim for claim in pair.found.claims if claim.new == node.name]
        if node.name in fresh:
            try:
                values[node.name] = _value(run, node, values, case)
            except (ValueError, IndexError, TypeError) as error:
                claim = claims[0] if claims else pair.found.claims[0]
                return _difference(pair, claim, case, f"{node.op} {node.name} cannot run: {error}")
        for claim in claims:
            text = unequal(reference[claim.old], values[node.name])
            if text is not None and not _is_rounding(pair, claim, case, reference, values):
                return _difference(pair, claim, case, text)
        if claims and node.name in fresh:
            values[node.name] = reference[claims[0].old]
    return None


def _is_rounding(
    pair: Pair, claim: Claim, case: Case, reference: Mapping[str, Values], values: Mapping[str, Values]
) -> bool:
    noisy = (_reference(pair, replace(case, noise=NOISE * factor))[claim.old] for factor in (1.0, 1.3, 1.7))
    return is_rounding(reference[claim.old], values[claim.new], noisy)


def _difference(pair: Pair, claim: Claim, case: Case, text: str) -> Difference:
    node = pair.before.by_name.get(claim.old)
    place = node.span.place if node is not None and node.span is not None else ""
    return Difference(pair.before.name, claim, place, case, text)
