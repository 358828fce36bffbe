"""ROWS: for each operation, what its inputs' rows say of the rows of its result, given the values of the weights.

A rule takes a `Step` and returns Rows, or None where it knows nothing; then what was proved from the program serves
(`Node.bound`). Operations in `DECLINED` have that alone, with the reason. Nodes that are computed from weights and
constants alone need no rule: `weight_ranges.py` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, isfinite, sqrt
from typing import TypeAlias

import torch
from torch import Tensor

from fastgrad_compiler.dim import Dim
from fastgrad_compiler.graph import Attribute, Node
from fastgrad_compiler.passes.bound_proof import number
from fastgrad_compiler.torch_env import integer, sequence
from fastgrad_compiler.torch_env import number as float_of
from fastgrad_compiler.weight_rows import (
    Rows,
    Term,
    add,
    ball,
    merge,
    releaded,
    split,
    swap_heads,
    through,
    times,
)


@dataclass(frozen=True, slots=True)
class Step:
    """What a rule sees: the node, its inputs, and what is known of them (None: nothing)."""

    node: Node
    inputs: tuple[Node, ...]
    rows: tuple[Rows | None, ...]

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Of the result."""
        return self.node.tensor.shape

    @property
    def rank(self) -> int:
        """Of the result."""
        return len(self.shape)

    @property
    def width(self) -> int | None:
        """Of a row of the result, None where it is known at run time only."""
        return self.shape[-1].constant if self.shape else None

    def size(self, key: str) -> int | None:
        """A dim among the attributes, None where it is known at run time only."""
        value: Attribute = self.node[key]
        return value.constant if isinstance(value, Dim) else integer(value)

    def axis(self, rank: int | None = None) -> int:
        """The attribute `axis`, counted from the front."""
        return integer(self.node["axis"]) % (rank or self.rank)

    def ball(self, radius: Tensor | float, *because: Rows, source: str = "") -> Rows | None:
        """Rows of norm at most `radius`, a number or [..], and at most what the program proves."""
        if self.width is None:
            return None
        if not isinstance(radius, Tensor):
            radius = torch.tensor(radius, dtype=torch.float64)
        radius = radius.reshape((*[1] * (self.rank - 1 - radius.dim()), *radius.shape))
        bound = self.node.bound
        if bound is not None and not bound.asserted:
            radius = radius.clamp(max=bound.norm)
        return ball(radius, self.width, (source,) if source else ()).because(*because)


Rule: TypeAlias = Callable[[Step], "Rows | None"]


def _broadcast(step: Step) -> tuple[Rows | None, ...]:
    """The inputs' rows, as many and as wide as the result's."""
    width = step.width
    if width is None:
        return (None,) * len(step.rows)
    return tuple(rows and rows.shaped(step.rank, width) for rows in step.rows)


# ---------------------------------------------------------------- sources


def _weight_name(step: Step, place: int) -> str:
    rows = step.rows[place]
    return f"`{rows.weights[0]}`" if rows is not None and rows.weights else "its weight"


def _rms_norm(step: Step) -> Rows | None:
    if len(step.rows) < 2 or (gamma := step.rows[1]) is None or gamma.terms or step.width is None:
        return None
    root = sqrt(step.width)
    row = ball(torch.full((1,) * (step.rank - 1), root, dtype=torch.float64), step.width)
    scaled = times(row, replace(gamma, weights=()).shaped(step.rank, step.width))
    most = number(float(scaled.norm.max()))
    source = f"row norm at most {most} through the rms norm {_weight_name(step, 1)} (sqrt(d) max|gamma|)"
    return replace(scaled, sources=(source,))


def _layer_norm(step: Step) -> Rows | None:
    gamma, beta = step.rows[1:]
    if gamma is None or beta is None or gamma.terms or beta.terms or step.width is None:
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


def _unit(step: Step) -> Rows | None:
    return step.ball(1.0, source="row norm at most 1: unit divides each row by its norm")


def _embedding(step: Step) -> Rows | None:
    table = step.rows[0]
    if table is None:
        return None
    longest = float(table.norm.max())
    source = f"row norm at most {number(longest)}: the longest row of {_weight_name(step, 0)}"
    return step.ball(longest, source=source)


def _sinusoid(step: Step) -> Rows | None:
    """A sine and a cosine of each angle."""
    return None if step.width is None else step.ball(sqrt(ceil(step.width / 2)))


# ---------------------------------------------------------------- arithmetic


def _add(step: Step) -> Rows | None:
    left, right = _broadcast(step)
    return None if left is None or right is None else add(left, right)


def _neg(step: Step) -> Rows | None:
    rows = step.rows[0]
    return None if rows is None else _scaled(rows, -1.0)


def _scaled(rows: Rows, factor: float) -> Rows:
    terms = tuple(replace(term, matrix=term.matrix * factor) for term in rows.terms)
    return replace(rows, terms=terms, offset=rows.offset * factor)


def _sub(step: Step) -> Rows | None:
    left, right = _broadcast(step)
    return None if left is None or right is None else add(left, _scaled(right, -1.0))


def _mul(step: Step) -> Rows | None:
    """By a known factor; else no entry of a row grows by more than the other's largest."""
    pair = _broadcast(step)
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
    """The largest entry, from the program or as the norm of its row."""
    if node.bound is not None and not node.bound.asserted and isfinite(node.bound.magnitude):
        return torch.tensor(node.bound.magnitude, dtype=torch.float64)
    return None if rows is None else rows.norm


def _div(step: Step) -> Rows | None:
    rows, divisor = _broadcast(step)
    if rows is None or divisor is None or divisor.terms or not bool(divisor.offset.all()):
        return None
    return times(rows, replace(divisor, offset=divisor.offset.reciprocal()))


def _matmul(step: Step) -> Rows | None:
    rows, weight = step.rows
    size = tuple(dim.constant for dim in step.inputs[1].tensor.shape[-2:])
    if rows is None or weight is None or weight.terms or weight.offset.shape[-2:] != size:
        return None
    return through(rows, weight)


def _shrinking(most: float = 1.0) -> Rule:
    """f(x) with |f(x)| <= most |x|."""

    def rule(step: Step) -> Rows | None:
        rows = step.rows[0]
        return None if rows is None else step.ball(rows.norm * most, rows)

    return rule


def _clamp(step: Step) -> Rows | None:
    low, high = step.node["low"], step.node["high"]
    around_zero = (low is None or float_of(low) <= 0) and (high is None or float_of(high) >= 0)
    return _shrinking()(step) if around_zero else None


def _either(step: Step) -> Rows | None:
    """Entries of one or the other."""
    left, right = _broadcast(step)[-2:]
    if left is None or right is None:
        return None
    return step.ball((left.norm.square() + right.norm.square()).sqrt(), left, right)


def _dropout(step: Step) -> Rows | None:
    """What is not dropped in training is scaled up."""
    rows, p = step.rows[0], float_of(step.node["p"])
    if rows is None or p == 0:
        return rows
    return step.ball(rows.norm / (1 - p), rows) if p < 1 else step.ball(0.0)


# ---------------------------------------------------------------- shapes


def _same(step: Step) -> Rows | None:
    return step.rows[0]


def _cast(step: Step) -> Rows | None:
    floats = step.inputs[0].tensor.dtype == step.node.tensor.dtype == "float"
    return step.rows[0] if floats else None


def _reshape(step: Step) -> Rows | None:
    rows, source, target = step.rows[0], step.inputs[0].tensor.shape, step.shape
    if rows is None or not source or not target or source[-1].constant is None or step.width is None:
        return None
    if source[-1] == target[-1]:
        return releaded(rows, source[:-1], target[:-1])
    if len(target) > 1 and target[-2] * target[-1] == source[-1]:
        heads = integer(target[-2].constant)
        return releaded(split(rows, heads), (*source[:-1], target[-2]), target[:-1])
    if len(source) > 1 and source[-2] * source[-1] == target[-1]:
        heads = integer(source[-2].constant)
        return releaded(merge(rows, heads), source[:-2], target[:-1])
    if source[-1].divide(target[-1]) is not None:  # shorter rows, cut from the old ones
        return step.ball(rows.norm.max(), rows)
    return None


def _permute(step: Step) -> Rows | None:
    rows, axes = step.rows[0], [integer(axis) % step.rank for axis in sequence(step.node["axes"])]
    if rows is None or axes[-1] != step.rank - 1:
        return None

    def moved(x: Tensor, further: int) -> Tensor:
        return x.permute(*axes[:-1], *range(x.dim() - further, x.dim()))

    return rows.on_lead(moved)


def _split_heads(step: Step) -> Rows | None:
    rows, heads = step.rows[0], step.size("heads")
    return None if rows is None or heads is None else swap_heads(split(rows, heads))


def _merge_heads(step: Step) -> Rows | None:
    rows, heads = step.rows[0], step.inputs[0].tensor.shape[-3].constant
    return None if rows is None or heads is None else merge(swap_heads(rows), heads)


def _repeated(rows: Rows, count: int) -> Rows:
    """Each head `count` times in a row."""

    def repeat(x: Tensor, further: int) -> Tensor:
        axis = x.dim() - further - 2
        return x if x.shape[axis] == 1 else x.repeat_interleave(count, axis)

    return rows.on_lead(repeat)


def _repeat_heads(step: Step) -> Rows | None:
    rows, count = step.rows[0], step.size("times")
    return None if rows is None or count is None else _repeated(rows, count)


def _broadcast_to(step: Step) -> Rows | None:
    return _broadcast(step)[0]


def _slice(step: Step) -> Rows | None:
    rows, start, stop, axis = step.rows[0], step.size("start"), step.size("stop"), step.axis()
    if rows is None or start is None or stop is None:
        return None
    if axis == step.rank - 1:
        terms = tuple(Term(t.radius, t.dense[..., start:stop]) for t in rows.terms)
        return replace(rows, terms=terms, offset=rows.offset[..., start:stop])
    return rows.on_lead(lambda x, _: x if x.shape[axis] == 1 else x.narrow(axis, start, stop - start))


def _select(step: Step) -> Rows | None:
    rows, index, axis = step.rows[0], step.size("index"), step.axis(step.rank + 1)
    if rows is None or index is None or axis == step.rank:
        return None
    return rows.on_lead(lambda x, _: x.select(axis, 0 if x.shape[axis] == 1 else index))


def _concat(step: Step) -> Rows | None:
    """Side by side along rows; along another axis, rows of any of them."""
    known = [rows for rows in step.rows if rows is not None]
    if len(known) < len(step.rows):
        return None
    if step.axis() < step.rank - 1:
        norms = [rows.norm.amax(step.axis(), keepdim=True) for rows in known]
        return step.ball(torch.stack(torch.broadcast_tensors(*norms)).amax(0), *known)
    before, total = 0, sum(rows.width for rows in known)
    parts = []
    for rows in known:
        parts.append(_padded(rows, before, total - before - rows.width))
        before += rows.width
    result = parts[0]
    for part in parts[1:]:
        result = add(result, part)
    return result


def _padded(rows: Rows, before: int, after: int) -> Rows:
    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (before, after))

    terms = tuple(Term(t.radius, pad(t.dense)) for t in rows.terms)
    return replace(rows, terms=terms, offset=pad(rows.offset))


# ---------------------------------------------------------------- position, attention


def _attention(step: Step) -> Rows | None:
    """Means of values with positive weights that add up to 1, or 0 where a query sees no key."""
    values = step.rows[2]
    if values is None or step.rank < 3 or step.node.get("decision") == "polynomial":
        return None
    heads, of = step.shape[-3].constant, step.inputs[2].tensor.shape[-3].constant
    if heads is None or of is None:
        return None
    if values.norm.shape[-1] != 1:  # each place has rows of its own
        return step.ball(_repeated(values, heads // of).norm.amax(-1, keepdim=True), values)
    return _repeated(_with_origin(values), heads // of)


ROWS: dict[str, Rule] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "unit": _unit,
    "embedding": _embedding,
    "sinusoid": _sinusoid,
    "add": _add,
    "sub": _sub,
    "neg": _neg,
    "mul": _mul,
    "div": _div,
    "matmul": _matmul,
    **dict.fromkeys(("relu", "gelu", "silu", "tanh", "abs"), _shrinking()),
    "erf": _shrinking(1.1284),  # the slope at 0 is 2 / sqrt(pi)
    "clamp": _clamp,
    **dict.fromkeys(("where", "minimum", "maximum"), _either),
    "dropout": _dropout,
    "assume_bound": _same,
    "cast": _cast,
    "reshape": _reshape,
    "permute": _permute,
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "repeat_heads": _repeat_heads,
    "broadcast_to": _broadcast_to,
    "slice": _slice,
    "select": _select,
    "concat": _concat,
    "rotary": _shrinking(),  # a rotation, another for each place: norms are what it keeps
    "attention": _attention,
}

DECLINED: dict[str, str] = {
    "input": "nothing is known of it",
    **dict.fromkeys(
        ("weight", "buffer", "constant", "fill", "arange"),
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
            "softplus",
            "softmax",
            "normalize_rows",
            "polynomial",
            "one_hot",
        ),
        "norms of its rows do not carry over: what the program proves of its entries serves",
    ),
    **dict.fromkeys(("less", "less_equal", "equal", "logical_not"), "its result is a mask"),
    **dict.fromkeys(
        ("causal", "window", "padding", "documents", "near_far", "alibi"),
        "it works on scores, which no row is made of",
    ),
    **dict.fromkeys(
        ("stack", "pad", "patches", "sum_to", "sum", "mean", "amax"),
        "rare before queries and keys: the program serves",
    ),
    **dict.fromkeys(("cross_entropy", "mse"), "its result has no rows"),
    "poly_attention": "its weights are positive only while its logits keep their range",
    **dict.fromkeys(
        ("embedding_gradient", "poly_attention_backward", "weight_gradient"),
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
