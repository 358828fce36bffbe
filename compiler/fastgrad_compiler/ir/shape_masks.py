"""Shape rules of what stands around attention: masks on scores, positions, and losses."""

from __future__ import annotations

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


# ---------------------------------------------------------------- position, other


def _rotary(site: Site) -> Type:
    found = want_float(site, 0, 2)
    divide(site, -1, 2, "rotary turns pairs of entries")
    return found


def _cross_entropy(site: Site) -> Type:
    logits, targets = want_dtype(site, 0, "float"), want_dtype(site, 1, "int", help_="class ids are ints")
    want_rank(site, 0, 1)
    want_rank(site, 1, len(logits.shape) - 1, len(logits.shape) - 1)
    text = f"cross_entropy of logits {show(logits.shape)} and targets {show(targets.shape)}"
    want_axes(site, 0, 1, range(len(targets.shape)), text)
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
    "sinusoid": lambda site: TensorType("float", (site.dim("length"), site.dim("width"))),
    "cross_entropy": _cross_entropy,
    "mse": _mse,
}
