"""ROWS: for each operation, what its inputs' rows say of the rows of its result, given the values of the weights.

A rule takes a `Step` and returns Rows, or None where it knows nothing; then what was proved from the program serves
(`Node.bound`). Operations in `DECLINED` have that alone, with the reason. Nodes that are computed from weights and
constants alone need no rule: `weight_ranges.py` runs them.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, isfinite, sqrt

import torch
from torch import Tensor

from fastgrad_compiler.analysis.weights.rows import Rows, Term, add, ball, through, times
from fastgrad_compiler.analysis.weights.shapes import SHAPES, repeated
from fastgrad_compiler.analysis.weights.step import Rule, Step, broadcast, known, known_pair
from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Node
from fastgrad_compiler.ir.graph import number as float_of
from fastgrad_compiler.ir.masks import GATED, MASKS
from fastgrad_compiler.ir.ops import COMPARISONS, limits
from fastgrad_compiler.ir.words import number

# ---------------------------------------------------------------- sources


def _weight_name(step: Step, place: int) -> str:
    rows = step.rows[place]
    return f"`{rows.weights[0]}`" if rows is not None and rows.weights else "its weight"


def _rms_norm(step: Step, gamma: Rows) -> Rows | None:
    if gamma.terms or step.width is None:
        return None
    root = sqrt(step.width)
    row = ball(torch.full((1,) * (step.rank - 1), root, dtype=torch.float64), step.width)
    scaled = times(row, replace(gamma, weights=()).shaped(step.rank, step.width))
    most = number(float(scaled.norm.max()))
    source = f"row norm at most {most} through the rms norm {_weight_name(step, 1)} (sqrt(d) max|gamma|)"
    return replace(scaled, sources=(source,))


def _layer_norm(step: Step, gamma: Rows, beta: Rows) -> Rows | None:
    if gamma.terms or beta.terms or step.width is None:
        return None
    radius = torch.full((1,) * (step.rank - 1), sqrt(step.width), dtype=torch.float64)
    matrix = gamma.shaped(step.rank, step.width).offset.unsqueeze(-2)
    offset = beta.shaped(step.rank, step.width).offset
    rows = Rows((Term(radius, matrix, "centred"),), offset)
    most = number(float(rows.norm.max()))
    source = (
        f"row norm at most {most} through the layer norm {_weight_name(step, 1)}, {_weight_name(step, 2)} "
        "(sqrt(d) max|gamma| + ||beta||)"
    )
    return replace(rows, sources=(source,))


def _embedding(step: Step, table: Rows) -> Rows | None:
    longest = float(table.norm.max())
    source = f"row norm at most {number(longest)}: the longest row of {_weight_name(step, 0)}"
    return step.ball(longest, source=source)


def _sinusoid(step: Step) -> Rows | None:
    """A sine and a cosine of each angle."""
    return None if step.width is None else step.ball(sqrt(ceil(step.width / 2)))


# ---------------------------------------------------------------- arithmetic


def _scaled(rows: Rows, factor: float) -> Rows:
    terms = tuple(replace(term, matrix=term.matrix * factor) for term in rows.terms)
    return replace(rows, terms=terms, offset=rows.offset * factor)


def _mul(step: Step) -> Rows | None:
    """By a known factor; else no entry of a row grows by more than the other's largest."""
    pair = broadcast(step)
    found: list[Rows] = []
    for place in (0, 1):
        rows, other = pair[place], pair[1 - place]
        if rows is None:
            continue
        if other is not None and not other.terms:
            return times(rows, other)
        most = _magnitude(step.inputs[1 - place], other)
        bounded = _bounded(step, rows, most, step.inputs[1 - place]) if most is not None else None
        found += [bounded] if bounded is not None else []
    return min(found, key=lambda rows: float(rows.norm.max()), default=None)


def _bounded(step: Step, rows: Rows, most: Tensor, factor: Node) -> Rows | None:
    """Times entries of at most `most` in size; one factor for the whole row leaves its direction."""
    shape = factor.tensor.shape
    if (shape and shape[-1] != Dim.of(1)) or step.width == 1:
        return step.ball(rows.norm * most, rows)
    shrunk = _with_origin(rows)
    terms = tuple(replace(term, radius=term.radius * most) for term in shrunk.terms)
    return replace(shrunk, terms=terms)


def _with_origin(rows: Rows) -> Rows:
    """Rows as they are, shortened or turned round: the offset becomes a term."""
    one = torch.ones((1,) * (rows.rank - 1), dtype=torch.float64)
    terms = (*rows.terms, Term(one, rows.offset.unsqueeze(-2)))
    return replace(rows, terms=terms, offset=torch.zeros_like(rows.offset))


def _magnitude(node: Node, rows: Rows | None) -> Tensor | None:
    """The largest entry, from the program (unless a mask may hide entries, which have no norm then) or as the norm of
    its row.
    """
    if node.bound is not None and not node.bound.asserted and isfinite(node.bound.norm):
        return torch.tensor(node.bound.magnitude, dtype=torch.float64)
    return None if rows is None else rows.norm


def _div(step: Step, rows: Rows, divisor: Rows) -> Rows | None:
    if divisor.terms or not bool(divisor.offset.all()):
        return None
    return times(rows, replace(divisor, offset=divisor.offset.reciprocal()))


def _matmul(step: Step, rows: Rows, weight: Rows) -> Rows | None:
    size = tuple(dim.constant for dim in step.inputs[1].tensor.shape[-2:])
    return None if weight.terms or weight.offset.shape[-2:] != size else through(rows, weight)


def _shrinking(most: float = 1.0) -> Rule:
    """f(x) with |f(x)| <= most |x|."""
    return known(lambda step, rows: step.ball(rows.norm * most, rows), 0)


def _clamp(step: Step) -> Rows | None:
    low, high = limits(step.node)
    return _shrinking()(step) if low <= 0 <= high else None


def _either(step: Step, left: Rows, right: Rows) -> Rows | None:
    """Entries of one or the other."""
    return step.ball((left.norm.square() + right.norm.square()).sqrt(), left, right)


def _dropout(step: Step, rows: Rows) -> Rows | None:
    """What is not dropped in training is scaled up."""
    p = float_of(step.node["p"])
    if p == 0:
        return rows
    return step.ball(rows.norm / (1 - p) if p < 1 else rows.norm, rows)


def _cast(step: Step) -> Rows | None:
    floats = step.inputs[0].tensor.dtype == step.node.tensor.dtype == "float"
    return step.rows[0] if floats else None


# ---------------------------------------------------------------- position, attention


def _shift(step: Step) -> Rows | None:
    """Another token's row, or 0."""
    rows = _of_any_token(step)
    return None if rows is None else _with_origin(rows)


def _of_any_token(step: Step) -> Rows | None:
    """What is known of every row of the first input."""
    rows = step.rows[0]
    if rows is None or rows.norm.shape[-1] == 1:
        return rows
    return step.ball(rows.norm.amax(-1, keepdim=True), rows)


def _depthwise(step: Step) -> Rows | None:
    """The token's own row and those of others, or 0, each entry times its weight."""
    rows, weight, width = _of_any_token(step), step.rows[1], step.inputs[1].tensor.shape[0].constant
    if rows is None or weight is None or weight.terms or width is None or step.width is None:
        return None
    first, *others = (
        replace(weight, offset=tap).shaped(step.rank, step.width)
        for tap in weight.offset.expand(width, -1).unbind()
    )
    result, other = times(rows, first), _with_origin(rows)
    for tap in others:
        result = add(result, times(other, tap))
    return result


def _attention(step: Step, values: Rows) -> Rows | None:
    """Means of values with positive weights that add up to 1, or 0 where a query sees no key."""
    heads, of = step.shape[-3].constant, step.inputs[2].tensor.shape[-3].constant
    if heads is None or of is None or Attention.of(step.node).is_polynomial:
        return None
    if values.norm.shape[-1] != 1:  # each place has rows of its own
        return step.ball(repeated(values, heads // of).norm.amax(-1, keepdim=True), values)
    return repeated(_with_origin(values), heads // of)


ROWS: dict[str, Rule] = {
    **SHAPES,
    "rms_norm": known(_rms_norm, 1),
    "layer_norm": known(_layer_norm, 1, 2),
    "unit": lambda step: step.ball(1.0, source="row norm at most 1: unit divides each row by its norm"),
    "embedding": known(_embedding, 0),
    "sinusoid": _sinusoid,
    "add": known_pair(lambda step, left, right: add(left, right)),
    "sub": known_pair(lambda step, left, right: add(left, _scaled(right, -1.0))),
    "neg": known(lambda step, rows: _scaled(rows, -1.0), 0),
    "mul": _mul,
    "div": known_pair(_div),
    "matmul": known(_matmul, 0, 1),
    **dict.fromkeys(("relu", "gelu", "silu", "tanh", "abs"), _shrinking()),
    "erf": _shrinking(1.1284),  # the slope at 0 is 2 / sqrt(pi)
    "clamp": _clamp,
    **dict.fromkeys(("where", "minimum", "maximum"), known_pair(_either)),
    "dropout": known(_dropout, 0),
    "assume_bound": lambda step: step.rows[0],
    "cast": _cast,
    "rotary": _shrinking(),  # a rotation, another for each place: norms are what it keeps
    "shift": _shift,
    "depthwise": _depthwise,
    "attention": known(_attention, 2),
}

DECLINED: dict[str, str] = {
    "input": "nothing is known of it",
    **dict.fromkeys(
        ("weight", "buffer", "constant", "fill", "literal", "arange"),
        "computed, or known from the program where it depends on the run",
    ),
    **dict.fromkeys(("call", "repeat", "item", "repeat_backward"), "a flat graph has none"),
    **dict.fromkeys(
        (
            "exp",
            "log",
            "sqrt",
            "rsqrt",
            "sigmoid",
            "log_sigmoid",
            "softplus",
            "softmax",
            "normalize_rows",
            "polynomial",
            "one_hot",
        ),
        "norms of its rows do not carry over: what the program proves of its entries serves",
    ),
    **dict.fromkeys((*COMPARISONS, "logical_not"), "its result is a mask"),
    **dict.fromkeys(
        (*MASKS, *GATED, "near_far", "alibi"),
        "it works on scores, which no row is made of",
    ),
    **dict.fromkeys(
        ("stack", "pad", "patches", "sum_to", "sum", "mean", "amax"),
        "rare before queries and keys: the program serves",
    ),
    **dict.fromkeys(("cross_entropy", "linear_cross_entropy", "mse"), "its result has no rows"),
    "poly_attention": "its weights are positive only while its logits keep their range",
    **dict.fromkeys(
        ("embedding_gradient", "depthwise_weights", "poly_attention_backward", "weight_gradient"),
        "it stands only in gradient graphs",
    ),
}

UNREAD: dict[str, tuple[int, ...]] = {
    "rms_norm": (0,),
    "layer_norm": (0,),
    "unit": (0,),
    "embedding": (1,),
    "attention": (0, 1),
}
"""Inputs whose rows a rule does not ask for, by place: what leads to them alone need not be looked at."""
