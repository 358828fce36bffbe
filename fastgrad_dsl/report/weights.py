"""What the weights of an attention can be and are: the largest share of one key, and how widely rows spread theirs."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING

from fastgrad_compiler.attention.value import OWN
from fastgrad_compiler.ir.masks import FORGET
from fastgrad_compiler.planning.selectivity import far_keys, largest_share
from fastgrad_dsl.documents.plan import Attention, lengths_of
from fastgrad_dsl.documents.report import Entropy, Spread

if TYPE_CHECKING:
    from fastgrad_dsl.models.measure import ModelErrors
    from fastgrad_dsl.models.spread import Spread as Found


def largest_share_of(entry: Attention, sizes: Mapping[str, int]) -> float | None:
    """The most that one key beyond a near field gets of a row's weight, where a query sees all keys of these sizes.

    None where nothing bounds it: without R, beyond no near field, and where weights depend on more than the logits (a
    window, a forget gate, slopes of `alibi`).
    """
    others = entry.window is not None or entry.alibi or FORGET in entry.roles
    if entry.family == OWN or entry.bound is None or others:
        return None
    keys = far_keys(lengths_of(entry, sizes)[1], entry.near, causal=entry.causal)
    return largest_share(entry.bound, keys, entry.eps or 0.0) if keys else None


def spread_of(entry: Attention, errors: ModelErrors | None) -> Spread | None:
    """What was measured of an attention that a polynomial serves."""
    found = errors.spreads.get(entry.path) if errors is not None else None
    if found is None or found.planned is None or found.exact is None:
        return None
    return Spread(found.planned.visible, _entropy(found.planned), _entropy(found.exact))


def _entropy(found: Found) -> Entropy | None:
    return Entropy(found.entropy, found.keys) if isfinite(found.entropy) else None
