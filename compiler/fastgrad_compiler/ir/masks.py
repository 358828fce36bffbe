"""The masks on scores [.., n, m]: what each reads, and what follows from it in every table of rules.

Padding aside, what a query sees through a mask is an interval of the keys (`runtime/sight.py`). The names are those of
the operations, of the roles of an attention's operands, and of the fields of `attention.value.Mask`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Operand:
    """What a mask reads beside the scores: `dtype`[b, m], or [b] without `tokens`; `phrase` and `help` are for
    diagnostics.
    """

    name: str
    dtype: str
    phrase: str
    help: str | None = None
    tokens: bool = True


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
OPERANDS: dict[str, Operand] = {
    name: mask.operand for name, mask in MASKS.items() if mask.operand and not mask.splits
}
"""The operands of masks by the role that they have in an attention, in order."""
