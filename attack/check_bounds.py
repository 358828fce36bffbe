"""(b) No input and no weight leads beyond a claimed range, norm or sign, at any node; nor beyond the R of a logit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite

import numpy as np
import torch
from torch import Tensor

from attack.cases import Case, Finding, Point, built, draw, moderate, walk, wild
from attack.logits import far_logits
from fastgrad_compiler.attention.table import is_own
from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.ir.flatten import flatten
from fastgrad_compiler.ir.graph import Node, Program

STARTS = 6  # structured points at which every claim is looked at
CLIMBS = 3  # claims that are climbed towards by gradients
STEPS = 12
LARGEST_INT = 2.0**53
SLACK = 1e-9  # of the rounding of float64, relative to the claim


@dataclass(frozen=True)
class Claim:
    """That `reach` of a node's value is at most `limit`. `asserted`: where what was asserted holds."""

    node: Node
    what: str
    limit: float
    asserted: bool
    reach: Callable[[Mapping[str, Tensor]], Tensor]

    def excess(self, values: Mapping[str, Tensor]) -> float:
        """By how much the claim is broken; not above 0 where it holds within rounding."""
        reached = float(self.reach(values).detach())
        return reached - self.limit - SLACK * (1.0 + abs(self.limit)) if isfinite(reached) else -inf


def check_bounds(case: Case) -> None:
    """Bounds of the proof, then R of the attentions that run, then what the weights prove."""
    for stage, claims in (("bounds", _node_claims), ("served", _range_claims)):
        program = case.served if stage == "served" else case.stage(stage)
        found = list(claims(program))
        if found:
            _attack(case, program, found)
    _certificates(case)


# ---------------------------------------------------------------- claims


def _node_claims(program: Program) -> Iterator[Claim]:
    for node in flatten(program).nodes:
        bound = node.bound
        if bound is None or node.op in ("constant", "fill"):
            continue
        for what, limit, reach in (
            ("above", bound.high, _highest),
            ("below", -bound.low, lambda x: _highest(-x.double())),
            ("norm", bound.norm, _longest),
        ):
            if limit < inf:
                yield Claim(node, what, limit, bound.asserted, partial(_reached, reach, node.name))


def _reached(reach: Callable[[Tensor], Tensor], name: str, values: Mapping[str, Tensor]) -> Tensor:
    return reach(values[name])


def _highest(x: Tensor) -> Tensor:
    x = x.double()
    return torch.where(x.isfinite(), x, -inf).max() if x.numel() else torch.tensor(-inf)


def _longest(x: Tensor) -> Tensor:
    return _highest(torch.linalg.vector_norm(x.double(), dim=-1)) if x.dim() else _highest(x.double().abs())


def _range_claims(program: Program) -> Iterator[Claim]:
    """R of each attention that is proved from the program, on the pairs that a polynomial serves."""
    for node in flatten(program).nodes:
        if node.op not in ("attention", "poly_attention") or is_own(node):
            continue
        known = Attention.of(node).range
        if known.origin == "program":
            yield Claim(node, "R", known.limit, False, partial(_logit, node))


def _logit(node: Node, values: Mapping[str, Tensor]) -> Tensor:
    return _highest(far_logits(node, [values[name] for name in node.inputs]).abs())


# ---------------------------------------------------------------- the attack


def _attack(case: Case, program: Program, claims: list[Claim]) -> None:
    rng = case.random("bounds")
    points = [case.point, *(draw(case, rng, rng.choice((wild, wild, moderate))) for _ in range(STARTS))]
    for point in points:
        with torch.no_grad():
            _look(program, claims, point)
    for claim in rng.sample(claims, min(CLIMBS, len(claims))):
        _climb(program, claim, claims, rng.choice(points), rng)


def _look(program: Program, claims: list[Claim], point: Point) -> None:
    inputs, weights = point.tensors()
    values = walk(program, flatten(program), inputs, weights)
    if _overflows(program, values):
        return
    for claim in claims:
        _check(program, claim, values)


def _check(program: Program, claim: Claim, values: Mapping[str, Tensor]) -> None:
    """Raises Finding where a claim is broken, and what it rests on is so."""
    if claim.excess(values) > 0 and (not claim.asserted or assertions_hold(program, values)):
        words = _words(claim, float(claim.reach(values).detach()))
        raise Finding("b", f"{claim.node.op} {claim.what}", words)


MASKS = frozenset(("causal", "window", "padding", "documents", "prefix"))


def assertions_hold(program: Program, values: Mapping[str, Tensor]) -> bool:
    """Whether what every `assume_bound` says is so; -inf is what masks hide, and else no number within a bound."""
    flat = flatten(program)
    masked = any(node.op in MASKS for node in flat.nodes)
    return all(
        _within(values[node.inputs[0]].detach(), float(str(node["bound"])), masked)
        for node in flat.nodes
        if node.op == "assume_bound"
    )


def _within(x: Tensor, bound: float, masked: bool) -> bool:
    hidden = (x == -inf) if masked else torch.zeros_like(x, dtype=torch.bool)
    return bool(((x.abs() <= bound) | hidden).all())


def _overflows(program: Program, values: Mapping[str, Tensor]) -> bool:
    """Whether a float beyond the range of ints, or none at all, becomes an int: that has no meaning."""
    casts = [node for node in flatten(program).nodes if node.op == "cast" and node["dtype"] == "int"]
    return any(not bool((values[node.inputs[0]].double().abs() < LARGEST_INT).all()) for node in casts)


def _words(claim: Claim, reached: float) -> str:
    node = claim.node
    claimed = {"above": "at most", "below": "at least", "norm": "a norm of at most", "R": "logits of at most"}
    sign = -1.0 if claim.what == "below" else 1.0
    reached, limit = sign * reached, sign * claim.limit
    return f"{node.op} {node.name}: {claimed[claim.what]} {limit:.6g} is claimed, {reached:.6g} was reached"


def _climb(program: Program, claim: Claim, claims: list[Claim], start: Point, rng: random.Random) -> None:
    """Adam on inputs and weights, each tensor with a free scale."""
    inputs, weights = start.tensors()
    leaves = [x for x in (*inputs, *weights.values()) if x.requires_grad]
    if not leaves:
        return
    flat = flatten(program)
    adam = torch.optim.Adam(leaves, lr=rng.choice((0.03, 0.3, 3.0)))
    for _ in range(STEPS):
        values = walk(program, flat, inputs, weights)
        if _overflows(program, values):
            return
        _check(program, claim, values)
        reached = claim.reach(values)
        if not reached.requires_grad or not torch.isfinite(reached):
            return
        adam.zero_grad()
        (-reached).backward()
        if any(x.grad is not None and not x.grad.isfinite().all() for x in leaves):
            return
        adam.step()
    names = [*start.inputs]
    moved = Point(
        {name: x.detach().numpy() for name, x in zip(names, inputs, strict=True)},
        {path: x.detach().numpy() for path, x in weights.items()},
    )
    with torch.no_grad():
        _look(program, claims, moved)


def _certificates(case: Case) -> None:
    """R of each head as the weights prove it (`Compiled.certify`), over inputs."""
    program, rng = case.stage("attention"), case.random("certificates")
    flat = flatten(program)
    nodes = {node.name: node for node in flat.nodes if node.op == "attention"}
    if not nodes:
        return
    point = draw(case, rng, rng.choice((wild, moderate)))
    model = built(case.compiled.program, point.weights)
    certified = case.compiled.certify(model)
    for _ in range(STARTS):
        given = Point(draw(case, rng, rng.choice((wild, moderate))).inputs, point.weights)
        inputs, weights = given.tensors()
        with torch.no_grad(), np.errstate(all="ignore"):
            values = walk(program, flat, inputs, weights)
            for each in certified:
                node = nodes.get(each.full_path)
                if node is None or each.range.source == "asserted":
                    continue  # nothing is claimed but the user's word
                logits = far_logits(node, [values[name] for name in node.inputs]).abs()
                largest = torch.where(logits.isfinite(), logits, 0.0).amax((-1, -2))
                by_head = largest.reshape(-1, largest.shape[-1]).amax(0) if largest.dim() else largest[None]
                pairs = zip(each.range.heads, by_head.tolist(), strict=False)
                for head, (limit, reached) in enumerate(pairs):
                    if reached > limit * (1.0 + 1e-6) + 1e-12:
                        words = f"{each.path}: R of head {head} is {limit:.6g}, a logit {reached:.6g}"
                        raise Finding("b", "certify", words)
