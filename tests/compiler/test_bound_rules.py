"""Each bound rule alone: no tensor that meets the facts of the inputs leaves what the rule says of the result.

Facts are drawn at random, and tensors that reach them: corners of boxes, vectors at the limit of a norm, zeros, tiny
and huge entries, infinities, what a mask hides. A short ascent moves one entry at a time towards the end of a claim.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import inf, isfinite, isinf, nextafter

import numpy as np
import pytest

from fastgrad_compiler.analysis.bounds import outward as rounding
from fastgrad_compiler.analysis.bounds.facts import Fact, tighten, unknown
from fastgrad_compiler.analysis.bounds.rules import BOUND, DECLINED
from fastgrad_compiler.analysis.bounds.step import Rule, Step
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Node, TensorType, attributes
from fastgrad_compiler.ir.ops import OPS, STEP_ATTRIBUTES
from tests.compiler.reference import Array, reference
from tests.compiler.rule_cases import CASES, Case, evaluated

ROUNDING = 1e-12  # of the definitions in float64, relative to what they add up
EXTREMES = (0.0, -0.0, inf, -inf, np.nan, 1e308, -1e308, 5e-324, 1.0, -745.0, 710.0)


@dataclass(frozen=True)
class Drawn:
    """What is claimed of one input, and tensors of which it is true; `ball` is the axis whose norm they reach."""

    fact: Fact
    tensors: tuple[Array, ...]
    ball: int | None = None


def norms_of(x: Array) -> list[float]:
    """The largest norm along each axis, and 0 where there is none."""
    with np.errstate(all="ignore"):
        found = [np.sqrt((x * x).sum(axis)) for axis in range(x.ndim)]
    return [float(np.max(norm[~np.isnan(norm)], initial=0.0)) for norm in found]


ENDS = (-30.0, -2.0, -0.6, -1e-3, 0.0, 1e-3, 0.5, 1.0, 3.0, 30.0)


def box(rng: np.random.Generator, shape: tuple[int, ...], possible: Sequence[float] = ENDS) -> Drawn:
    """Entries of an interval, most of them at its ends."""
    low, high = sorted(rng.choice(possible, 2))
    ends = [low, high, *([0.0] if low <= 0 <= high else []), float(rng.uniform(low, high))]
    tensors = [rng.choice(ends, shape) for _ in range(3)] + [np.full(shape, low), np.full(shape, high)]
    low, high = (value if rng.random() < 0.8 else wide for value, wide in ((low, -inf), (high, inf)))
    return Drawn(Fact(low, high, (inf,) * len(shape)), tuple(map(np.asarray, tensors)))


def ball(rng: np.random.Generator, shape: tuple[int, ...]) -> Drawn:
    """Vectors along one axis that have the largest norm."""
    if not shape:
        return box(rng, shape)
    axis, radius = int(rng.integers(len(shape))), float(rng.choice([1e-7, 0.7, 1.0, 5.0]))
    spike = np.zeros(shape)
    np.moveaxis(spike, axis, 0)[int(rng.integers(shape[axis])) : shape[axis]][:1] = 1.0
    raw = [np.ones(shape), rng.choice([-1.0, 1.0], shape), rng.normal(size=shape), spike, np.zeros(shape)]
    norms = tuple(radius if a == axis else inf for a in range(len(shape)))
    return Drawn(Fact(-inf, inf, norms), tuple(projected(x, axis, radius) for x in raw), axis)


def projected(x: Array, axis: int, radius: float) -> Array:
    """Vectors scaled to the radius, never above it."""
    norm = np.linalg.norm(x, axis=axis, keepdims=True)
    return np.asarray(x * np.where(norm > 0, radius * (1 - 1e-15) / np.where(norm == 0, 1.0, norm), 0.0))


def derived(rng: np.random.Generator, shape: tuple[int, ...]) -> Drawn:
    """Any tensors, with the tightest facts, or some of these, that are true of all."""
    scale = float(rng.choice([1e-3, 1.0, 20.0]))
    shift = float(rng.choice([0.0, 0.0, 1.5, -1.5])) * scale
    tensors = [scale * rng.normal(size=shape) + shift for _ in range(4)]
    if rng.random() < 0.4:
        tensors = [np.abs(x) for x in tensors]
    low, high = (
        min(float(x.min(initial=inf)) for x in tensors),
        max(float(x.max(initial=-inf)) for x in tensors),
    )
    norms = [(1 + 1e-14) * max(each) for each in zip(*map(norms_of, tensors), strict=True)]
    kept = tuple(norm if rng.random() < 0.7 else inf for norm in norms)
    low, high = (value if rng.random() < 0.8 else wide for value, wide in ((low, -inf), (high, inf)))
    return Drawn(Fact(low, high, kept), tuple(map(np.asarray, tensors)))


def wild(rng: np.random.Generator, shape: tuple[int, ...]) -> Drawn:
    """Entries of which nothing is known, or one side only."""
    low = float(rng.choice([-inf, -inf, 0.0, -3.0]))
    allowed = [x for x in EXTREMES if np.isnan(x) or x >= low]
    tensors = tuple(np.asarray(rng.choice(allowed, shape)) for _ in range(5))
    return Drawn(Fact(low, inf, (inf,) * len(shape)), tensors)


def hidden(rng: np.random.Generator, drawn: Drawn) -> Drawn:
    """With entries that a mask hides."""
    tensors = tuple(np.where(rng.random(x.shape) < 0.5, x, -inf) for x in drawn.tensors)
    return Drawn(replace(drawn.fact, norms=(inf,) * len(drawn.fact.norms), masked=True), tensors)


def floats(rng: np.random.Generator, shape: tuple[int, ...]) -> Drawn:
    drawn = (box, box, ball, derived, wild)[int(rng.integers(5))](rng, shape)
    return hidden(rng, drawn) if shape and rng.random() < 0.2 else drawn


def ints(rng: np.random.Generator, shape: tuple[int, ...], limit: int | None) -> Drawn:
    ranges = [
        (-3, 3),
        (0, 5),
        (2, 2),
        (-(2**62), 2**62),
        (2**53, 2**53 + 2),
        (-(2**63), 2**63 - 1),
        (1, 2**62),
    ]
    low, high = (0, limit - 1) if limit else ranges[int(rng.integers(len(ranges)))]
    tensors = (
        *(np.asarray(rng.choice(np.array([low, high]), shape)) for _ in range(3)),
        np.asarray(rng.integers(low, high, shape, endpoint=True)),
    )
    known = rng.random() < 0.8
    fact = Fact(float(low), float(high), (inf,) * len(shape)) if known else unknown(len(shape))
    return Drawn(fact, tensors)


def kept_promise(drawn: Drawn, case: Case) -> Drawn:
    """What a mask shows is as small as the file says."""
    bound = float(case.values({})["bound"])
    tensors = (
        np.where(np.isneginf(x) & drawn.fact.masked, x, np.clip(x, -bound, bound)) for x in drawn.tensors
    )
    return replace(drawn, tensors=tuple(tensors))


def drawn_input(case: Case, type_: TensorType, sizes: Mapping[str, int], rng: np.random.Generator) -> Drawn:
    shape = tuple(dim.evaluate(sizes) for dim in type_.shape)
    if type_.dtype == "float":
        positive = case.positive and rng.random() < 0.6
        drawn = box(rng, shape, ENDS[5:]) if positive else floats(rng, shape)
        return kept_promise(drawn, case) if case.node.op == "assume_bound" else drawn
    if type_.dtype == "int":
        limit = case.ids if case.ids is None or isinstance(case.ids, int) else sizes[case.ids]
        return ints(rng, shape, limit)
    fact = Fact(0.0, 1.0, (inf,) * len(shape)) if rng.random() < 0.5 else unknown(len(shape))
    return Drawn(fact, tuple(rng.random(shape) < share for share in (0.0, 0.5, 1.0)))


def sizes_of(case: Case, rng: np.random.Generator) -> dict[str, int]:
    least = 2 if "slice" in case.expression and rng.random() < 0.5 else 1
    return {
        "b": int(rng.integers(1, 3)),
        "n": 2 * int(rng.integers(1, 3)) if case.even else int(rng.integers(least, 5)),
        "m": int(rng.integers(1, 4)),
    }


def specialised(node: Node, inputs: Sequence[Node], known: Mapping[str, int | Dim]) -> Step:
    """The node and its inputs' shapes where some of the dims are numbers; facts are still to come."""

    def shape(each: Node) -> tuple[Dim, ...]:
        return tuple(dim.substitute(known) for dim in each.tensor.shape)

    values = {
        key: value.substitute(known) if isinstance(value, Dim) else value for key, value in node.attributes
    }
    own = replace(node, attributes=attributes(**values), type=TensorType(node.tensor.dtype, shape(node)))
    return Step(own, (), tuple(map(shape, inputs)))


def claim_of(step: Step, facts: tuple[Fact, ...]) -> Fact:
    return tighten(BOUND[step.node.op](replace(step, facts=facts)), step.shape)


def beyond(claim: Fact, y: Array, scale: float) -> float:
    """How far a result is outside of what is claimed of it, as a share of what rounding explains; 1 is the limit."""
    with np.errstate(all="ignore"):
        return _beyond(claim, y.astype(np.float64), scale)


def _beyond(claim: Fact, y: Array, scale: float) -> float:
    shown = ~np.isnan(y) & ~(np.isneginf(y) if claim.masked else np.zeros(y.shape, dtype=bool))
    worst = 0.0
    for end, out in ((claim.low, claim.low - y[shown]), (claim.high, y[shown] - claim.high)):
        if isfinite(end) and out.size:
            worst = max(worst, float(out.max()) / (ROUNDING * (abs(end) + scale) + 1e-300))
    if claim.low == inf or claim.high == -inf:
        worst = max(worst, inf if shown.any() else 0.0)
    if not claim.masked:
        for norm, found in zip(claim.norms, norms_of(y), strict=True):
            if isfinite(norm):
                worst = max(worst, (found - norm) / (ROUNDING * (norm + scale) + 1e-300))
    return worst


def scale_of(inputs: Sequence[Array]) -> float:
    """What rounding is relative to: the size of the finite inputs, where it is not extreme."""
    finite = [np.abs(x[np.isfinite(x)]).max(initial=0.0) for x in inputs if x.dtype == np.float64]
    largest = max([float(x) for x in finite], default=0.0)
    return largest if largest < 1e3 else 0.0


def moved(rng: np.random.Generator, drawn: Drawn, x: Array) -> Array:
    """The tensor with one entry elsewhere in its range."""
    fact, place = drawn.fact, tuple(int(rng.integers(size)) for size in x.shape)
    near = float(x[place])
    ends = [
        end for end in (fact.low, fact.high, 0.0, -near, near + 0.3 * near) if fact.low <= end <= fact.high
    ]
    new = x.copy()
    new[place] = rng.choice([e for e in ends if isfinite(e)] or [near])
    return projected(new, drawn.ball, fact.norms[drawn.ball]) if drawn.ball is not None else new


def ascend(
    rng: np.random.Generator,
    given: Sequence[Drawn],
    start: list[Array],
    score: Callable[[list[Array]], float],
) -> float:
    """The largest score that moves of single entries find."""
    places = [i for i, each in enumerate(given) if start[i].dtype == np.float64 and start[i].size]
    simple = all(isinf(norm) or i == each.ball for each in given for i, norm in enumerate(each.fact.norms))
    if not places or not simple or any(np.isnan(x).any() for x in start if x.dtype == np.float64):
        return score(start)
    best, current = score(start), start
    for _ in range(12):
        place = places[int(rng.integers(len(places)))]
        tried = [*current]
        tried[place] = moved(rng, given[place], current[place])
        found = score(tried)
        if found >= best:
            best, current = found, tried
    return best


def rounds(case: Case, count: int) -> Iterator[tuple[np.random.Generator, dict[str, int]]]:
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    for _ in range(count):
        yield rng, sizes_of(case, rng)


def attack(case: Case, count: int) -> None:
    inputs, node = case.graph.inputs, case.node
    for rng, sizes in rounds(case, count):
        known = {name: Dim.of(size) for name, size in sizes.items() if rng.random() < 0.5}
        step = specialised(node, inputs, known)
        given = [drawn_input(case, each.tensor, sizes, rng) for each in inputs]
        read = [next(i for i, each in enumerate(inputs) if each.name == name) for name in node.inputs]
        step = replace(step, shapes=tuple(step.shapes[i] for i in read))
        claim = claim_of(step, tuple(given[i].fact for i in read))
        assert claim.low <= claim.high or not all(dim.evaluate(sizes) for dim in node.tensor.shape)
        values = case.values(sizes)

        def score(xs: list[Array]) -> float:
            y = reference(node.op, [xs[i] for i in read], values)  # noqa: B023
            return beyond(claim, y, scale_of(xs))  # noqa: B023

        for _ in range(4):
            start = [each.tensors[int(rng.integers(len(each.tensors)))] for each in given]
            worst = score(start)
            assert worst <= 1, f"{case}: {claim} from {[each.fact for each in given]}: {start}"
        if node.op != "assume_bound":  # a step may break the promise
            assert ascend(rng, given, start, score) <= 1, (
                f"{case}: {claim} from {[each.fact for each in given]}"
            )


def attack_all(op: str, count: int = 20) -> None:
    for case in CASES[op]:
        attack(case, count)


@pytest.mark.sampled(40)
@pytest.mark.parametrize("count", [8, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", sorted(set(CASES) & set(BOUND)))
def test_no_result_leaves_what_a_rule_claims(op: str, count: int) -> None:
    attack_all(op, count)


def test_every_rule_and_attribute_is_attacked() -> None:
    assert set(BOUND) - {"weight", "buffer"} <= set(CASES)
    assert set(OPS) - set(BOUND) == set(DECLINED)
    for op in set(BOUND) & set(CASES):
        used = {key for case in CASES[op] for key, _ in case.node.attributes}
        wanted = set(OPS[op].attributes) | (set(OPS[op].optional) if op != "attention" else set())
        wanted -= STEP_ATTRIBUTES  # bounds are proved of a whole text
        assert used == wanted, op
        for key in wanted & {"fill", "keepdim", "inverse", "reverse"}:
            assert len({case.node.get(key) for case in CASES[op]}) >= 2, (op, key)
        if {"axis", "axes"} & wanted:
            axes = [evaluated(case.node.get("axis", case.node.get("axes")), {}) for case in CASES[op]]
            flat = [each for axis in axes for each in (axis if isinstance(axis, tuple) else (axis,))]
            assert op == "permute" or (min(flat) < 0 <= max(flat)), op


NO_END = {
    ("alibi", "low"),
    ("cross_entropy", "high"),
    ("linear_cross_entropy", "high"),
    ("mse", "high"),
    ("layer_norm", "high"),
}
"""Ends that rules leave open, or that no tensor of these sizes comes near."""


@pytest.mark.parametrize("end", ["low", "high"])
def test_the_attack_finds_a_rule_that_claims_too_much(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule in turn, with an end of its interval moved inwards by a third."""

    def narrowed(rule: Rule) -> Rule:
        def claim(step: Step) -> Fact:
            fact = rule(step)
            value = getattr(fact, end)
            inwards = 0.7 if (value > 0) == (end == "high") else 1 / 0.7
            shift = 1e-9 if end == "low" else -1e-9
            moved = inwards * value if value else shift
            return replace(fact, low=moved) if end == "low" else replace(fact, high=moved)

        return claim

    for op in sorted(set(CASES) & set(BOUND)):
        if (op, end) not in NO_END:
            monkeypatch.setitem(BOUND, op, narrowed(BOUND[op]))
            with pytest.raises(AssertionError):
                attack_all(op, 100)


@pytest.mark.parametrize("op", ["weight", "buffer"])
def test_nothing_is_claimed_of_what_trains(op: str) -> None:
    node = Node("w", op, (), attributes(label="w", init=("ones",)), TensorType("float", (Dim.of(3),)))
    assert BOUND[op](Step(node, (), ())) == unknown(1)


# ---------------------------------------------------------------- rounding


def test_arithmetic_is_rounded_up_and_by_one_step_at_most() -> None:
    rng = np.random.default_rng(0)
    numbers = [0.1, 0.2, -0.3, 1.0, 3.0, 1e300, -1e300, 5e-324, 1e-200, 7.0, 1.7976931348623157e308]
    numbers += [float(x) for x in rng.normal(size=20)]
    for x in numbers:
        for y in numbers:
            exact = {"add": Fraction(x) + Fraction(y), "times": Fraction(x) * Fraction(y)}
            exact["over"] = Fraction(x) / Fraction(y)
            for name, value in exact.items():
                up, down = (getattr(rounding, f"{name}_{way}")(x, y) for way in ("up", "down"))
                assert isinf(down) or Fraction(down) <= value
                assert isinf(up) or value <= Fraction(up)
                assert up == down or nextafter(down, inf) == up
        if x >= 0:
            up, down = rounding.root_up(x), rounding.root_down(x)
            assert Fraction(down) ** 2 <= Fraction(x) <= Fraction(up) ** 2
            assert up == down or nextafter(down, inf) == up


def test_infinities_are_rounded_to_what_they_may_be() -> None:
    assert rounding.add_up(inf, -inf) == inf
    assert rounding.add_down(inf, -inf) == -inf
    assert rounding.times_up(0.0, inf) == rounding.times_down(-inf, 0.0) == 0
    assert rounding.over_up(1.0, inf) == rounding.over_down(-1.0, inf) == 0
    assert rounding.over_up(inf, inf) == inf
    largest = 1.7976931348623157e308
    assert rounding.add_up(-largest, -largest) == -largest  # what overflows is finite
    assert rounding.times_down(1e200, 1e200) == largest
