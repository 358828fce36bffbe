"""The masks on scores [.., n, m], and forget gates: what each reads, and what follows from it in every table of rules.

Padding aside, what a query sees through a mask is an interval of the keys (`runtime/sight.py`). The names are those of
the operations, of the roles of an attention's operands, and of the fields of `attention.value.Mask`. A forget gate
hides no pair: it makes those of the past weigh less.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Operand:
    """What a mask reads beside the scores: `dtype`[b, m], [b] without `tokens`, [b, hk, m] in an attention with
    `heads`; `phrase` and `help` are for diagnostics.
    """

    name: str
    dtype: str
    phrase: str
    help: str | None = None
    tokens: bool = True
    heads: bool = False


@dataclass(frozen=True, slots=True)
class MaskOp:
    """A mask: its operand, if it has one; the name of its `size`, an int of at least 1, if it has one.

    square: it is for scores of a sequence with itself. empties: it may leave a query without any key. splits: its
    attention is split by queries into several with other masks (`attention/recognise.py`), so that none has it.
    """

    name: str
    operand: Operand | None = None
    size: str | None = None
    square: bool = False
    empties: bool = False
    splits: bool = False


MASKS: dict[str, MaskOp] = {
    mask.name: mask
    for mask in (
        MaskOp("causal", square=True),  # j <= i, of query i and key j
        MaskOp("window", size="width", empties=True),  # |i - j| < width
        MaskOp(
            "padding",
            Operand("mask", "bool", "a mask", help="compare it, for instance padding(s, tokens != 0)"),
            empties=True,
        ),
        MaskOp("documents", Operand("ids", "int", "ids"), square=True, empties=True),
        # j <= i or j < length
        MaskOp("prefix", Operand("length", "int", "lengths", tokens=False), square=True, splits=True),
    )
}
FORGET = "forget"
GATE = Operand("log_gate", "float", "a log gate", heads=True)
GATED: dict[str, str] = {FORGET: "scores", "decay": "weights"}
"""The operations of a forget gate, and what each is applied to: one adds the sum of the log gates after key j up to
query i, the other multiplies by its exponential; an attention has the role `forget` for both.
"""
LEAST_LOG_GATE = (
    -1000.0
)  # a log gate below it counts as this: all is forgotten, and no -inf is taken from another

OPERANDS: dict[str, Operand] = {
    FORGET: GATE,
    **{name: mask.operand for name, mask in MASKS.items() if mask.operand and not mask.splits},
}
"""The operands of masks and gates by the role that they have in an attention, in order: floats first."""
