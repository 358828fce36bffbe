"""What moves along the tokens of x [.., n, c], in numpy: each a sum over tokens of one document, or of all.

`ids` is empty, or holds int[b, n] of packed documents: then x is [b, .., n, c], and of another document all is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastgrad_compiler.reference.oracle_attention import Array, runs


def moved(x: Array, by: int, ids: Sequence[Array]) -> Array:
    """x_(t - by) at the place of token t, 0 where there is none."""
    n, found = x.shape[-2], np.zeros_like(x)
    here = slice(max(by, 0), max(n + min(by, 0), 0))
    there = slice(max(-by, 0), max(n - max(by, 0), 0))
    found[..., here, :] = x[..., there, :]
    for each in ids:
        run = runs(each)
        other = (run[:, here] != run[:, there]).reshape(len(run), *[1] * (x.ndim - 3), -1, 1)
        found[..., here, :] = np.where(other, 0.0, found[..., here, :])
    return found


def depthwise(x: Array, w: Array, ids: Sequence[Array], reverse: bool) -> Array:
    """The sum over k of w_k x_(t - k), or of w_k x_(t + k) in reverse; w [width, c]."""
    sign = -1 if reverse else 1
    return np.asarray(sum(w[k] * moved(x, sign * k, ids) for k in range(len(w))))


def depthwise_weights(cotangent: Array, x: Array, ids: Sequence[Array], width: int) -> Array:
    """Of each k the sum over all tokens t of g_t x_(t - k): [width, c]."""
    tokens = tuple(range(x.ndim - 1))
    return np.stack([(cotangent * moved(x, k, ids)).sum(axis=tokens) for k in range(width)])
