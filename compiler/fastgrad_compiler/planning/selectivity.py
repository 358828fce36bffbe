"""What a limit of the logits does to retrieval: how much of a row's weight one key can get."""

from __future__ import annotations

from math import exp, isfinite, log

from fastgrad_compiler.attention.table import AttentionEntry, Lengths

LEAST_SHARE = 0.05  # below it an attention averages: no key stands out among all that a query sees


def largest_share(bound: float, keys: int) -> float:
    """The most that one of `keys` keys can get of a row's weight where |s| <= bound, from 1 / keys to 1.

    e^(2R) / (e^(2R) + keys - 1): its logit is R, and those of the others are -R (docs/mathematics.md, section 7).
    """
    return 1 / (1 + (keys - 1) * exp(-2 * bound))


def least_bound(share: float, keys: int) -> float:
    """R from which on one of `keys` keys can get that share, in (0, 1)."""
    return max(0.0, log((keys - 1) * share / (1 - share)) / 2) if keys > 1 else 0.0


def averages(entry: AttentionEntry, lengths: Lengths) -> str | None:
    """A warning that an attention cannot pick out one key at its longest declared length, with what would help.

    None where it can, where nothing limits its logits or declares a length, and for the model's own polynomials.
    """
    attention, keys = entry.attention, lengths.longest(entry.keys)
    limit = attention.range.limit
    if attention.is_own or not isfinite(limit) or keys is None or attention.mask.window is not None:
        return None
    share = largest_share(limit, keys)
    if share >= LEAST_SHARE:
        return None
    beyond = f" beyond its blocks of {attention.near}" if attention.near is not None else ""
    return (
        f"it averages: with |s| <= {limit:.3g} no key{beyond} gets more than {100 * share:.2g} % of a query's weight "
        f"among {keys:,}; one could get half from |s| <= {least_bound(0.5, keys):.2g} on, or without a limit by a "
        "polynomial of the model's own (std.kernel_attention)"
    )
