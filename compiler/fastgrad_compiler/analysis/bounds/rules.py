"""BOUND: for each operation, what its inputs' bounds say of its result.

A rule takes a `Step` and returns a Fact without proof; `bounds.py` adds the sentence and the premises.
Every rule is sound for real arithmetic, of what docs/operations.md says of its operation; a rule that knows nothing
returns `unknown`. `DECLINED` names the operations that have no rule, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf, nextafter

from fastgrad_compiler.analysis.bounds.arithmetic import ARITHMETIC
from fastgrad_compiler.analysis.bounds.facts import (
    Fact,
    interval,
    join,
    product,
    root_size,
    size,
    total,
    unknown,
)
from fastgrad_compiler.analysis.bounds.outward import add_down, add_up, over_up, root_up, times_down, times_up
from fastgrad_compiler.analysis.bounds.shapes import SHAPES
from fastgrad_compiler.analysis.bounds.step import Rule, Step
from fastgrad_compiler.ir.graph import Attribute, integer, sequence
from fastgrad_compiler.ir.masks import GATED, MASKS
from fastgrad_compiler.ir.ops import COMPARISONS

_ROOT_2 = root_up(2.0)
_LIMIT = 2.0**63  # of ints of 64 bits: from its negative to one below it
_WRAPPING = frozenset(["add", "sub", "mul", "neg", "abs", "sum"])  # on ints, which may overflow


def _nothing(step: Step) -> Fact:
    return unknown(step.rank)


def _rows(step: Step, norm: float) -> tuple[float, ...]:
    """Norms of a result of which those of rows alone are known."""
    return (*(inf,) * (step.rank - 1), norm)


def _range(low: float, high: float) -> Rule:
    return lambda step: interval(low, high, step.rank)


# ---------------------------------------------------------------- constants


def _constant(step: Step) -> Fact:
    value = step.number("value")
    if value == step.node["value"]:
        return interval(value, value, step.rank)
    return interval(nextafter(value, -inf), nextafter(value, inf), step.rank)  # an int of more than 53 bits


def _literal(step: Step) -> Fact:
    numbers = list(_numbers(step.node["values"]))
    return interval(min(numbers), max(numbers), step.rank)


def _numbers(values: Attribute) -> Iterator[float]:
    if isinstance(values, tuple):
        for value in values:
            yield from _numbers(value)
    elif isinstance(values, int | float):
        yield float(values)


# ---------------------------------------------------------------- reductions and normalisations


def _axes(step: Step) -> set[int]:
    return {integer(axis) % len(step.shapes[0]) for axis in sequence(step.node["axes"])}


def _sum(step: Step) -> Fact:
    return interval(*total(step.fact, (step.shapes[0][axis] for axis in _axes(step))), step.rank)


def _mean(step: Step) -> Fact:
    """A mean of vectors is no longer than the longest."""
    fact, reduced, keep = step.fact, _axes(step), bool(step.node["keepdim"])
    norms = [
        inf if axis in reduced else norm
        for axis, norm in enumerate(fact.norms)
        if keep or axis not in reduced
    ]
    return Fact(fact.low, fact.high, tuple(norms))


def _softmax(step: Step) -> Fact:
    norms = [inf] * step.rank
    norms[step.axis()] = 1.0
    return Fact(0.0, 1.0, tuple(norms))


def _normalize_rows(step: Step) -> Fact:
    """Shares of a sum of what is not negative."""
    if step.fact.low < 0:
        return unknown(step.rank)
    return Fact(0.0, 1.0, _rows(step, 1.0))


def _rms_norm(step: Step) -> Fact:
    """Rows of norm sqrt(d), each entry times its weight."""
    row = times_up(root_size(step.shape[-1]), step.facts[1].magnitude)
    return Fact(-row, row, _rows(step, row))


def _layer_norm(step: Step) -> Fact:
    scaled = times_up(root_size(step.shape[-1]), step.facts[1].magnitude)
    row = add_up(scaled, step.facts[2].norms[-1])
    return Fact(-row, row, _rows(step, row))


def _unit(step: Step) -> Fact:
    fact = step.fact
    low, high = (0.0 if fact.low >= 0 else -1.0), (0.0 if fact.high <= 0 else 1.0)
    return Fact(low, high, _rows(step, 1.0))


# ---------------------------------------------------------------- attention, position, other


def _mask(step: Step) -> Fact:
    fact, fill = step.fact, step.node.get("fill", -inf)
    norms = (inf,) * step.rank
    if not isinstance(fill, int | float) or fill == -inf:
        return replace(fact, norms=norms, masked=True)
    return replace(fact, low=min(fact.low, fill), high=max(fact.high, fill), norms=norms)


def _forget(step: Step) -> Fact:
    """Scores plus a sum of any number of log gates, which may be none."""
    fact, gate = step.facts
    low = fact.low if gate.low >= 0 and not gate.masked else -inf
    return replace(fact, low=low, high=fact.high if gate.high <= 0 else inf, norms=(inf,) * step.rank)


def _decay(step: Step) -> Fact:
    """Weights times the exponential of such a sum, which is in [0, 1] where no log gate is above 0."""
    fact, gate = step.facts
    if gate.high <= 0:
        return replace(fact, low=min(fact.low, 0.0), high=max(fact.high, 0.0))
    low, high = (-inf if fact.low < 0 else 0.0), (inf if fact.high > 0 else 0.0)
    return replace(fact, low=low, high=high, norms=(inf,) * step.rank)


def _assume_bound(step: Step) -> Fact:
    """The user's word, where it is taken (`bounds.py`)."""
    fact, limit = step.fact, step.number("bound")
    low, high = max(min(fact.low, limit), -limit), min(max(fact.high, -limit), limit)
    return replace(fact, low=low, high=high)


def _rotary(step: Step) -> Fact:
    """Pairs of a row are rotated: rows keep their norm; along other axes two entries mix, at most sqrt(2)
    of either.
    """
    fact = step.fact
    most = min(fact.norms[-1], times_up(_ROOT_2, fact.magnitude))
    others = tuple(times_up(_ROOT_2, norm) for norm in fact.norms[:-1])
    return Fact(-most, most, (*others, fact.norms[-1]))


def _depthwise(step: Step) -> Fact:
    """A product for each k, or 0 where there is no such token, as there is for k = 0.

    A vector along any axis grows at most by width times the largest entry of w, and by sqrt(width) times
    the longest column of w, by Cauchy-Schwarz.
    """
    x, w, width = step.facts[0], step.facts[1], step.shapes[1][0]
    low, high = product(x, w)
    below, above = total(interval(min(low, 0.0), max(high, 0.0), step.rank), (width - 1,))
    gain = min(times_up(size(width), w.magnitude), times_up(root_size(width), w.norms[0]))
    most = times_up(gain, x.magnitude)
    norms = tuple(times_up(gain, norm) for norm in x.norms)
    return Fact(max(add_down(low, below), -most), min(add_up(high, above), most), norms)


def _dropout(step: Step) -> Fact:
    """The identity, or in training 0 or scaled up."""
    fact, p = step.fact, step.number("p")
    if p == 0:
        return fact
    scale = over_up(1.0, add_down(1.0, -p)) if p < 1 else 1.0
    norms = tuple(times_up(scale, norm) for norm in fact.norms)
    return Fact(min(times_down(scale, fact.low), 0.0), max(times_up(scale, fact.high), 0.0), norms)


def _attention(step: Step) -> Fact:
    """Rows of the result are convex combinations of values, or zero where a query sees no key."""
    value = step.facts[2]
    return Fact(min(value.low, 0.0), max(value.high, 0.0), _rows(step, value.norms[-1]))


_RULES: dict[str, Rule] = {
    **SHAPES,
    **ARITHMETIC,
    **dict.fromkeys(("weight", "buffer"), _nothing),  # they train, or come from a file
    "constant": _constant,
    "fill": _constant,
    "literal": _literal,
    "arange": lambda step: interval(0.0, max(size(step.shape[0]) - 1, 0.0), 1),
    "one_hot": lambda step: Fact(0.0, 1.0, _rows(step, 1.0)),
    **dict.fromkeys(("logical_not", *COMPARISONS), _range(0.0, 1.0)),
    "sum": _sum,
    "mean": _mean,
    "amax": lambda step: interval(step.fact.low, step.fact.high, step.rank),
    "softmax": _softmax,
    "normalize_rows": _normalize_rows,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "unit": _unit,
    **dict.fromkeys(MASKS, _mask),
    "forget": _forget,
    "decay": _decay,
    "near_far": lambda step: replace(join(step.facts), norms=(inf,) * step.rank),
    "assume_bound": _assume_bound,
    "rotary": _rotary,
    "shift": SHAPES["pad"],
    "depthwise": _depthwise,
    "sinusoid": _range(-1.0, 1.0),
    "alibi": lambda step: Fact(-inf, step.fact.high, (inf,) * step.rank, masked=step.fact.masked),
    "dropout": _dropout,
    **dict.fromkeys(("cross_entropy", "linear_cross_entropy", "mse"), _range(0.0, inf)),
    "attention": _attention,
}

MASK_AWARE = frozenset(
    (
        *(*MASKS, *GATED, *COMPARISONS, "logical_not", "near_far", "assume_bound", "alibi", "softmax", "exp"),
        *("clamp", "cast", "mul", "div", "reshape", "permute", "slice"),
    )
)
"""Operations whose rules know of -inf, what a mask hides; of the others' results nothing is known then."""


def _guarded(op: str, rule: Rule) -> Rule:
    """The rule, for inputs that a mask hides in part and for ints that may leave 64 bits."""

    def guarded(step: Step) -> Fact:
        hidden = any(fact.masked for fact in step.facts)
        fact = unknown(step.rank) if hidden and op not in MASK_AWARE else rule(step)
        whole = op in _WRAPPING and step.node.tensor.dtype == "int"
        if fact.known and not (whole and not -_LIMIT <= fact.low <= fact.high < _LIMIT):
            return fact
        return unknown(step.rank, fact.masked or (hidden and op not in _MIXING))

    return guarded


BOUND: dict[str, Rule] = {op: _guarded(op, rule) for op, rule in _RULES.items()}

_MIXING = frozenset(
    ("matmul", "sum", "mean", "normalize_rows", "unit", "rms_norm", "layer_norm", "cross_entropy", "mse")
)
"""Operations whose results are no pairs any more: none of them is hidden."""

DECLINED: dict[str, str] = {
    "input": "its facts come from the call sites",
    "call": "the analysis enters the graph that it names",
    "repeat": "the analysis enters its bodies",
    "item": "the analysis keeps a fact for each result of a node",
    **dict.fromkeys(
        [
            "sum_to",
            "embedding_gradient",
            "depthwise_weights",
            "poly_attention_backward",
            "repeat_backward",
            "weight_gradient",
        ],
        "it stands only in gradient graphs, where no bound is asked for",
    ),
    "poly_attention": "it stands only after the recognition of attention, where no bound is asked for",
}
