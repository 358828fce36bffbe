"""Shape rules of what stands around attention: masks on scores, positions, convolutions, and losses."""

from __future__ import annotations

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import TensorType, Type
from fastgrad_compiler.ir.masks import GATE, GATED, MASKS
from fastgrad_compiler.ir.shape_errors import (
    Blame,
    Site,
    fail,
    show,
    want_axes,
    want_dtype,
    want_equal,
    want_float,
    want_rank,
)
from fastgrad_compiler.ir.shape_rules import Rule, divide

# ---------------------------------------------------------------- masks on scores [.., n, m]


def _scores(site: Site, square: bool = False) -> TensorType:
    found = want_float(site, 0, 2)
    if square:
        text = f"{site.op} of scores {show(found.shape)}: queries and keys differ in number"
        want_equal(site, (0, -2), (0, -1), text)
    return found


def _masked(site: Site) -> Type:
    mask = MASKS[site.op]
    found = _scores(site, square=mask.square)
    if mask.operand is None:
        return found
    want_rank(site, 0, 3)
    operand = want_dtype(site, 1, mask.operand.dtype, help_=mask.operand.help)
    axes = ((0, 0), (-1, 1)) if mask.operand.tokens else ((0, 0),)
    want_rank(site, 1, len(axes), len(axes))
    for own, other in axes:
        text = f"{site.op} of scores {show(found.shape)} by {mask.operand.phrase} of {show(operand.shape)}"
        want_equal(site, (0, own), (1, other), text)
    return found


def _gated(site: Site) -> Type:
    """A gate for each token, of each head where the scores have heads."""
    found = _scores(site, square=True)
    gate = want_dtype(site, 1, GATE.dtype)
    want_rank(site, 1, len(found.shape) - 1, len(found.shape) - 1)
    text = f"{site.op} of {GATED[site.op]} {show(found.shape)} by {GATE.phrase} of {show(gate.shape)}"
    for axis in range(len(gate.shape)):
        want_equal(site, (0, axis), (1, axis), text)
    return found


def _near_far(site: Site) -> Type:
    local = _scores(site)
    rank = len(local.shape)
    far = want_float(site, 1, rank, rank)
    want_axes(site, 0, 1, range(-rank, 0), f"near_far of {show(local.shape)} and {show(far.shape)}")
    return local


def _alibi(site: Site) -> Type:
    found = _scores(site)
    want_rank(site, 0, 3)
    if found.shape[-3].constant is None:
        fail("FG212", f"alibi needs a known number of heads, not {found.shape[-3]}",
             Blame(0, -3, f"{found.shape[-3]} here"))  # fmt: skip
    return found


# ---------------------------------------------------------------- position, tokens before, other


def _rotary(site: Site) -> Type:
    found = want_float(site, 0, 2)
    pairs = divide(site, -1, 2, "rotary turns pairs of entries")
    stretch = site.attributes.get("stretch")
    if isinstance(stretch, tuple) and len(stretch) != 1 and pairs != Dim.of(len(stretch)):
        fail(
            "FG218",
            f"rotary of {pairs} pairs by a stretch of {len(stretch)} numbers: one for each or one for all",
        )
    return found


def _shift(site: Site) -> Type:
    found = want_float(site, 0, 2)
    _of_documents(site, 1)
    site.integer("by")
    return found


def _depthwise(site: Site) -> Type:
    found, weights = want_float(site, 0, 2), want_float(site, 1, 2, 2)
    text = f"depthwise of {show(found.shape)} by weights {show(weights.shape)}: the channels differ"
    want_equal(site, (0, -1), (1, -1), text)
    if weights.shape[0].constant is None:
        fail("FG212", f"depthwise needs a known width, not {weights.shape[0]}",
             Blame(1, 0, f"{weights.shape[0]} here"))  # fmt: skip
    _of_documents(site, 2)
    return found


def _depthwise_weights(site: Site) -> Type:
    cotangent = want_float(site, 0, 2)
    rank = len(cotangent.shape)
    found = want_float(site, 1, rank, rank)
    text = f"depthwise_weights of {show(cotangent.shape)} and {show(found.shape)}"
    want_axes(site, 0, 1, range(-rank, 0), text)
    _of_documents(site, 2)
    return TensorType("float", (Dim.of(site.integer("width")), found.shape[-1]))


def _of_documents(site: Site, index: int) -> None:
    """Operand `index`, if it is given: the ids of packed documents, one for each token of operand 0."""
    if len(site.inputs) <= index:
        return
    found = want_rank(site, 0, 3)
    ids = want_dtype(site, index, "int")
    want_rank(site, index, 2, 2)
    for own, other in ((0, 0), (-2, 1)):
        text = f"{site.op} of {show(found.shape)} by ids of {show(ids.shape)}"
        want_equal(site, (0, own), (index, other), text)


def _cross_entropy(site: Site) -> Type:
    logits, targets = want_dtype(site, 0, "float"), want_dtype(site, 1, "int", help_="class ids are ints")
    want_rank(site, 0, 1)
    want_rank(site, 1, len(logits.shape) - 1, len(logits.shape) - 1)
    text = f"cross_entropy of logits {show(logits.shape)} and targets {show(targets.shape)}"
    want_axes(site, 0, 1, range(len(targets.shape)), text)
    return TensorType("float", ())


def _linear_cross_entropy(site: Site) -> Type:
    want_dtype(site, 2, "int", help_="class ids are ints")
    x, w = want_rank(site, 0, 2), want_rank(site, 1, 2, 2)
    text = f"linear_cross_entropy of {show(x.shape)} by {show(w.shape)}"
    want_equal(site, (0, -1), (1, 0), text)
    want_rank(site, 2, len(x.shape) - 1, len(x.shape) - 1)
    want_axes(site, 0, 2, range(len(x.shape) - 1), text)
    if len(site.inputs) > 3:
        want_rank(site, 3, 1, 1)
        want_equal(site, (3, 0), (1, 1), text)
    return TensorType("float", ())


def _mse(site: Site) -> Type:
    first = want_float(site, 0)
    rank = len(first.shape)
    second = want_float(site, 1, rank, rank)
    want_axes(site, 0, 1, range(rank), f"mse of {show(first.shape)} and {show(second.shape)}")
    return TensorType("float", ())


MASK_RULES: dict[str, Rule] = {
    **dict.fromkeys(MASKS, _masked),
    **dict.fromkeys(GATED, _gated),
    "near_far": _near_far,
    "normalize_rows": lambda site: want_float(site, 0, 1),
    "alibi": _alibi,
    "rotary": _rotary,
    "shift": _shift,
    "depthwise": _depthwise,
    "depthwise_weights": _depthwise_weights,
    "sinusoid": lambda site: TensorType("float", (site.dim("length"), site.dim("width"))),
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "mse": _mse,
}
