"""What is known of an attention's logits: R for each head, where it comes from, and the vectors that centre the keys.

Softmax ignores a constant for each row, so that one vector c may be subtracted from all keys of a head:
q.(k - c) = q.k - q.c. Where keys share a part, that narrows the range (docs/mathematics.md, section 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Source: TypeAlias = Literal["program", "weights", "data", "asserted"]
SOURCES: tuple[Source, ...] = get_args(Source)  # best first; all but the first are guarded at run time


@dataclass(frozen=True, slots=True)
class LogitRange:
    """The range of the logits of one attention, scale included.

    Args:
        source: where the numbers come from.
        heads: R of each query head, |s_ij| <= R on the pairs that a polynomial would serve; infinite where nothing is
            known.
        reasons: the chain of reasons, one sentence each, first cause first.
        centre: what is subtracted from the keys, one vector of width d for each key head; None: nothing.
        norms: |scale| max ||q|| max ||k|| of each query head, from the same source; None: not known apart from R.
    """

    source: Source
    heads: tuple[float, ...]
    reasons: tuple[str, ...]
    centre: tuple[tuple[float, ...], ...] | None = None
    norms: tuple[float, ...] | None = None

    @property
    def bound(self) -> float:
        """R of the whole attention: the largest of its heads'."""
        return max(self.heads)

    @property
    def reach(self) -> float:
        """Bound of |scale| sum_a |q_a k_a| for the whole attention: R where it is not known apart (section 10)."""
        return max(max(self.norms), self.bound) if self.norms else self.bound
