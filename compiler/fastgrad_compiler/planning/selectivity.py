"""What a limit of the logits does to retrieval: how much of a row's weight one key can get."""

from __future__ import annotations

from math import exp, isfinite, log

from fastgrad_compiler.attention.table import AttentionEntry, Lengths

LEAST_SHARE = 0.05  # below it an attention averages: no key stands out among all that a query sees


def largest_share(bound: float, keys: int, eps: float = 0.0) -> float:
    """The most that one of `keys` keys can get of a row's weight where |s| <= bound, from 1 / keys to 1.

    e^(2R) / (e^(2R) + keys - 1): its logit is R, and those of the others are -R (docs/mathematics.md, section 7). eps:
    the relative error of a polynomial's weights, by which they are further apart.
    """
    return 1 / (1 + (keys - 1) * exp(-2 * bound) * max(0.0, 1 - eps) / (1 + eps))


def far_keys(keys: int, near: int | None, *, causal: bool) -> int:
    """Of the keys that a query sees, those beyond a near field with blocks of `near` tokens, at least."""
    blocks = 2 if causal else 3
    return keys if near is None else max(0, keys - blocks * near)


def least_bound(share: float, keys: int) -> float:
    """R from which on one of `keys` keys can get that share, in (0, 1)."""
    return max(0.0, log((keys - 1) * share / (1 - share)) / 2) if keys > 1 else 0.0


def averages(entry: AttentionEntry, lengths: Lengths) -> str | None:
    """A warning that an attention cannot pick out one key at its longest declared length, with what would help.

    None where it can, where nothing limits its logits or declares a length, and for the model's own polynomials. Nor
    with what leaves few keys their weight: a window, a forget gate, slopes of `alibi`.
    """
    attention, longest = entry.attention, lengths.longest(entry.keys)
    limit = attention.range.limit
    if attention.is_own or not isfinite(limit) or longest is None:
        return None
    if attention.unservable or attention.mask.forget:
        return None
    keys = far_keys(longest, attention.near, causal=attention.mask.causal)
    eps = attention.polynomial.eps if attention.polynomial else None
    share = largest_share(limit, keys, eps or 0.0) if keys else 1.0
    if share >= LEAST_SHARE:
        return None
    beyond = f" beyond its blocks of {attention.near}" if attention.near is not None else ""
    return (
        f"it averages: with |s| <= {limit:.3g} no key{beyond} gets more than {100 * share:.2g} % of a query's weight "
        f"among {keys:,}; one could get half from |s| <= {least_bound(0.5, keys):.2g} on, or without a limit by a "
        "polynomial of the model's own (std.kernel_attention)"
    )
