"""Features of a tile of tokens, the states that they are summed in, and what pulls a gradient back through them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgrad_compiler.codegen.triton.kernels.specification import (
    BLOCK,
    DEGREE,
    RANK,
    STATE_WIDTH,
    TILE,
    VALUES,
    WIDE,
    D,
)


@triton.jit
def load_block(X, row_stride, first, limit, origin, TOKENS: tl.constexpr):
    """The BLOCK components of X from `origin` on, [TOKENS, BLOCK]; 0 from token `limit` on and beyond D."""
    token, column = tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    origin, row_stride = tl.multiple_of(origin, BLOCK), tl.multiple_of(row_stride, 8)
    start = X + tl.cast(first, tl.int64) * row_stride + origin
    seen = (first + token < limit)[:, None] & (origin + column < D)[None, :]
    return tl.load(start + token[:, None] * row_stride + column[None, :], mask=seen, other=0.0)


@triton.jit
def load_index(INDEX, p: tl.constexpr, first_feature, FEATURES: tl.constexpr):
    """The components, within their block, that the p-th factors of a tile of features are; -1 for a factor of 1."""
    feature = first_feature + tl.arange(0, FEATURES)
    return tl.load(INDEX + p * RANK + feature)


@triton.jit
def load_origin(ORIGIN, p: tl.constexpr, first_feature):
    """The first component of the block that the p-th factors of a tile of features are from; D > BLOCK."""
    return tl.load(ORIGIN + p * (RANK // TILE) + first_feature // TILE)


@triton.jit
def factor(
    x, X, row_stride, first, limit, INDEX, ORIGIN, first_feature, p: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x @ E + [index < 0], float32 [TOKENS, FEATURES]: the component of x that each feature's p-th factor is, or 1.

    x: tokens [first : first + TOKENS] of X, [TOKENS, WIDE]. If that is more than a block, the factors' is loaded here.
    """
    index = load_index(INDEX, p, first_feature, FEATURES)
    if D > BLOCK:
        x = load_block(X, row_stride, first, limit, load_origin(ORIGIN, p, first_feature), TOKENS)
    chosen = (tl.arange(0, BLOCK)[:, None] == index[None, :]).to(x.dtype)
    return tl.dot(x, chosen, input_precision=PRECISION) + tl.where(index < 0, 1.0, 0.0)[None, :]


@triton.jit
def transposed_factor(
    x, kept, X, row_stride, first, limit, INDEX, ORIGIN, first_feature, p: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The transpose of `factor`, [FEATURES, TOKENS]. kept: tokens that count; those of x are 0 elsewhere."""
    index = load_index(INDEX, p, first_feature, FEATURES)
    if D > BLOCK:
        x = load_block(X, row_stride, first, limit, load_origin(ORIGIN, p, first_feature), TOKENS)
        x = tl.where(kept[:, None], x, 0.0).to(x.dtype)
    chosen = (index[:, None] == tl.arange(0, BLOCK)[None, :]).to(x.dtype)
    return tl.dot(chosen, tl.trans(x), input_precision=PRECISION) + tl.where(index < 0, 1.0, 0.0)[:, None]


@triton.jit
def features(
    x, X, row_stride, first, limit, INDEX, ORIGIN, first_feature,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Features [first_feature : first_feature + FEATURES] of tokens, [TOKENS, FEATURES]; arguments as of `factor`."""
    phi = factor(x, X, row_stride, first, limit, INDEX, ORIGIN, first_feature, 0, TOKENS, FEATURES, PRECISION)
    for p in tl.static_range(1, DEGREE):
        phi *= factor(
            x, X, row_stride, first, limit, INDEX, ORIGIN, first_feature, p, TOKENS, FEATURES, PRECISION
        )
    return phi


@triton.jit
def transposed_features(
    x, kept, X, row_stride, first, limit, INDEX, ORIGIN, first_feature,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The transpose of `features`, [FEATURES, TOKENS]; arguments as of `transposed_factor`."""
    phi = transposed_factor(
        x, kept, X, row_stride, first, limit, INDEX, ORIGIN, first_feature, 0, TOKENS, FEATURES, PRECISION
    )
    for p in tl.static_range(1, DEGREE):
        phi *= transposed_factor(
            x, kept, X, row_stride, first, limit, INDEX, ORIGIN, first_feature, p, TOKENS, FEATURES, PRECISION
        )
    return phi


@triton.jit
def pull_back(
    gradient, upstream, x, X, row_stride, first, limit, INDEX, ORIGIN, first_feature,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gradient [TOKENS, WIDE] += J_phi(x)^T upstream: what reached a feature, [TOKENS, FEATURES], to x's components.

    A factor is given the upstream times the others. The compiler makes each of them once, however often it is named.
    """
    for p in tl.static_range(DEGREE):
        reached = upstream
        for other in tl.static_range(DEGREE):
            if other != p:
                reached *= factor(
                    x, X, row_stride, first, limit, INDEX, ORIGIN, first_feature, other,
                    TOKENS, FEATURES, PRECISION,
                )  # fmt: skip
        component = load_index(INDEX, p, first_feature, FEATURES)
        if D > BLOCK:
            component = tl.where(component < 0, -1, component + load_origin(ORIGIN, p, first_feature))
        chosen = (component[:, None] == tl.arange(0, WIDE)[None, :]).to(OPERAND)
        gradient = tl.dot(reached.to(OPERAND), chosen, gradient, input_precision=PRECISION)
    return gradient


@triton.jit
def load_state(STATE, first, FEATURES: tl.constexpr):
    """Rows [first : first + FEATURES] of a state, [FEATURES, VALUES], and of its sum of features, [FEATURES]."""
    feature, column = first + tl.arange(0, FEATURES), tl.arange(0, VALUES)
    rows = STATE + feature[:, None] * STATE_WIDTH + column[None, :]
    inside = None if VALUES == STATE_WIDTH else (column < STATE_WIDTH)[None, :]
    state = tl.load(rows, mask=inside, other=None if VALUES == STATE_WIDTH else 0.0)
    return state, tl.load(STATE + RANK * STATE_WIDTH + feature)
