"""The vocabulary of operations: name, arity and attributes. What an op means lives in the rule tables of the passes.

Each rule table (SHAPE, BOUND, VJP, TORCH ...) is keyed by these names; a test asserts that it covers each of them or
declines it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from fastgrad_compiler.ir.graph import Node, number
from fastgrad_compiler.ir.masks import GATED, MASKS, MaskOp


@dataclass(frozen=True)
class Op:
    """`arity` is (least, most) inputs, most None for any; `attributes` are required, `optional` ones may be absent."""

    name: str
    arity: tuple[int, int | None]
    attributes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def _op(name: str, least: int, most: int | None = -1, attributes: str = "", optional: str = "") -> Op:
    arity = least, least if most == -1 else most
    return Op(name, arity, tuple(attributes.split()), tuple(optional.split()))


def _mask(mask: MaskOp) -> Op:
    """On scores [.., n, m], and what the mask reads; `fill` (default -inf) is what masked entries become."""
    return _op(mask.name, 2 if mask.operand else 1, attributes=mask.size or "", optional="fill")


ARITHMETIC = ("add", "sub", "mul", "div", "minimum", "maximum")
COMPARISONS = ("less", "less_equal", "equal")
FUNCTIONS = (
    *(
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "tanh",
        "sigmoid",
        "relu",
        "gelu",
        "silu",
        "log_sigmoid",
        "softplus",
        "erf",
    ),
)
"""Of floats, entry by entry."""

# In a step form, whose inputs are the next tokens (`passes/step.py`): `past` says that positions go on from those of
# the calls before; `state` is the label under which a node keeps what it needs of the tokens before, `memory` that of
# the keys of another sequence, which are the same in every call.
_OPS = (
    # structure. weight, buffer: `init` is (kind, argument...) as in ("normal", 0.0, 0.02); `label` ends its path.
    _op("input", 0),
    _op("weight", 0, attributes="label init"),
    _op("buffer", 0, attributes="label init"),
    _op("constant", 0, attributes="value"),  # a scalar; its dtype follows from the value
    _op("fill", 0, attributes="shape value"),  # a float tensor of one value
    _op("literal", 0, attributes="label values"),  # a float tensor of given values, nested tuples; no weight
    # recompute: True, or in how many first iterations of the repeat around it its values are made again in the backward
    # pass;
    # `once`: run by the first call of a step form alone, which keeps the results for the later ones
    _op("call", 0, None, "graph label", "once recompute"),
    # bodies: ((graph, times), ...); inputs: `carried` values, then invariants
    _op("repeat", 0, None, "bodies carried"),
    _op("item", 1, attributes="index"),
    # shape
    _op("reshape", 1, attributes="shape"),
    _op("permute", 1, attributes="axes"),
    _op("split_heads", 1, attributes="heads"),  # [.., n, h*d] -> [.., h, n, d]
    _op("merge_heads", 1),  # [.., h, n, d] -> [.., n, h*d]
    # [.., h, n, d] -> [.., h*times, n, d], each head `times` in a row
    _op("repeat_heads", 1, attributes="times"),
    _op("concat", 1, None, "axis"),
    _op("stack", 1, None, "axis"),
    _op("slice", 1, attributes="axis start stop", optional="past"),
    _op("select", 1, attributes="axis index"),
    _op("pad", 1, attributes="axis before after"),  # zeros; what slice's gradient needs
    _op("patches", 1, attributes="size"),  # [b, c, H, W] -> [b, H/s * W/s, c*s*s]
    _op("broadcast_to", 1, attributes="shape"),
    _op("sum_to", 1, attributes="shape"),  # the transpose of broadcasting
    # lookup
    _op("embedding", 2),
    _op("embedding_gradient", 2, attributes="rows"),  # (cotangent, ids) -> [rows, d]
    _op("arange", 0, attributes="stop", optional="past"),  # int[stop]
    _op("one_hot", 1, attributes="classes"),
    # arithmetic
    *(_op(name, 2) for name in (*ARITHMETIC, *COMPARISONS)),
    *(_op(name, 1) for name in (*FUNCTIONS, "neg", "abs", "logical_not")),
    _op("cast", 1, attributes="dtype"),
    _op("clamp", 1, attributes="low high"),
    _op("where", 3),
    _op("matmul", 2),
    # reduce: `axes` a tuple of negative ints
    *(_op(name, 1, attributes="axes keepdim") for name in ("sum", "mean", "amax")),
    # normalise
    _op("softmax", 1, attributes="axis"),
    _op("layer_norm", 3, attributes="eps"),
    _op("rms_norm", 2, attributes="eps"),
    _op("unit", 1),  # x / ||x||, 0 where ||x|| is tiny; last axis
    *map(_mask, MASKS.values()),
    # (scores or weights [.., n, n], log gate [.., n]): those of the past less or times less by the gates since
    *(_op(name, 2) for name in GATED),
    _op("near_far", 2, attributes="block"),  # (local, far)
    # p(s), and 0 where s is -inf, as exp has it; `coefficients` are ascending
    _op("polynomial", 1, attributes="coefficients"),
    # weights over their sum (last axis); -inf counts as 0, and a row of nothing else is 0
    _op("normalize_rows", 1),
    _op("assume_bound", 1, attributes="bound"),  # the identity, with the user's word that |s| <= bound
    # position
    _op("rotary", 1, attributes="base", optional="inverse past stretch"),  # [.., n, d], pairs (i, i + d/2)
    # along the tokens of [.., n, c]: (x[, documents int[b, n]]), (x, w [width, c][, documents])
    _op("shift", 1, 2, "by", "state"),  # y_t = x_(t - by)
    _op("depthwise", 2, 3, optional="reverse state"),  # y_t = sum_k w_k x_(t - k), or x_(t + k) in reverse
    _op("depthwise_weights", 2, 3, "width"),  # (g, x[, documents]) -> w_k = sum_t g_t x_(t - k)
    _op("sinusoid", 0, attributes="length width", optional="past"),  # float[length, width]
    _op("alibi", 1),  # scores [b, h, n, m] + slopes of h heads * -|i - j|
    # other
    _op("dropout", 1, attributes="p"),
    # (logits [.., c], targets int[..]), and of x @ w as (x [.., d], w [d, c], targets[, bias [c]]): the mean over all
    # positions but those of the target `ignored`; the truth is spread over all classes to the share `smoothing`
    _op("cross_entropy", 2, optional="smoothing ignored"),
    _op("linear_cross_entropy", 3, 4, optional="smoothing ignored"),
    _op("mse", 2),
    # attention. Inputs q [.., h, n, d], k [.., hk, m, d], v [.., hk, m, dv] and then what `roles` names in order:
    # near_q, near_k (own logits of the near pairs, already scaled), forget (float[b, hk, n], log gates of at most 0,
    # only with causal), padding (bool[b, m]), documents (int[b, n]).
    # causal: bool; scale: float, of q.k; near: int | None; window: int | None; alibi: bool; bound: float | None is a
    # proved or asserted R of |scale * q.k| on the pairs that a polynomial would serve; proof: tuple of str;
    # asserted: bool. After `plan` also decision "exact" | "polynomial", why, family, degree, coefficients, eps,
    # eps_prime, break_even, break_even_gpu, positive_from, `source` of R: "program", "weights", "data" or "asserted",
    # `reach`: bound of |scale| sum_a |q_a k_a| (none: R is), and `precision` of the arithmetic at least: "float32" or
    # "float64".
    _op(
        "attention",
        3,
        None,
        "roles causal scale near window alibi bound asserted proof",
        "decision why family degree coefficients eps eps_prime break_even break_even_gpu positive_from source reach "
        "precision state",
    ),
    _op(
        "poly_attention",
        3,
        None,
        "roles causal scale near bound coefficients",
        "why family degree eps eps_prime break_even break_even_gpu positive_from asserted proof source reach precision "
        "state memory",
    ),
    # (inputs of poly_attention, cotangent) -> cotangents of its float inputs, a tuple
    _op("poly_attention_backward", 4, None, "roles causal scale near bound coefficients", "precision"),
    # the gradient graph: a `call` of a graph's backward gives cotangents of its float inputs
    _op("repeat_backward", 1, None, "bodies backward carried"),
    _op("weight_gradient", 1, attributes="label"),  # a sink: the cotangent of this graph's weight `label`
)

STEP_ATTRIBUTES = frozenset(("past", "state", "memory", "once"))
"""Of nodes in a step form alone."""

OPS: dict[str, Op] = {op.name: op for op in _OPS}


def limits(clamp: Node) -> tuple[float, float]:
    """The limits of a clamp; one that is left out is infinite."""
    low, high = clamp["low"], clamp["high"]
    return -inf if low is None else number(low), inf if high is None else number(high)
