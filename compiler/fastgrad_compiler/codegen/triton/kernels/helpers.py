"""Loads and stores of tokens, sums of gates, and the polynomial."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgrad_compiler.codegen.triton.kernels.specification import COEFFICIENTS, DEGREE, LIVE_CHUNKS, SLOPE


@triton.jit
def load_rows(X, row_stride, first, limit, width: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """X [first : first + TOKENS, : width] as [TOKENS, WIDTH]; 0 from token `limit` on and beyond `width`."""
    token, column = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    row_stride = tl.multiple_of(row_stride, 8)
    start = X + tl.cast(first, tl.int64) * row_stride
    seen = (first + token < limit)[:, None] & (column < width)[None, :]
    return tl.load(start + token[:, None] * row_stride + column[None, :], mask=seen, other=0.0)


@triton.jit
def store_rows(X, value, first, limit, width: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Write [TOKENS, WIDTH] to X [first :, : width], whose rows are dense, up to token `limit`."""
    token, column = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    start = X + tl.cast(first, tl.int64) * width
    seen = (first + token < limit)[:, None] & (column < width)[None, :]
    tl.store(start + token[:, None] * width + column[None, :], value.to(X.dtype.element_ty), mask=seen)


@triton.jit
def load_tokens(X, first, limit, other, TOKENS: tl.constexpr):
    """X [first : first + TOKENS], `other` from token `limit` on."""
    token = first + tl.arange(0, TOKENS)
    return tl.load(X + token, mask=token < limit, other=other)


@triton.jit
def load_sums(SUMS, first, limit, tokens, TOKENS: tl.constexpr):
    """G of tokens [first : first + TOKENS] as G and rest; from token `limit` on that of the last one before."""
    token = tl.minimum(first + tl.arange(0, TOKENS), limit - 1)
    return tl.load(SUMS + token), tl.load(SUMS + tokens + token)


@triton.jit
def load_sum(SUMS, token, tokens):
    """G of one token as G and rest; before the first token that of the first, from which nothing is forgotten."""
    token = tl.minimum(tl.maximum(token, 0), tokens - 1)
    return tl.load(SUMS + token), tl.load(SUMS + tokens + token)


@triton.jit
def difference(later, later_rest, earlier, earlier_rest):
    """G of a later token less G of an earlier one: at most 0, and rounded only after it is taken."""
    return (later - earlier) + (later_rest - earlier_rest)


@triton.jit
def inverse(denominator):
    """1 / D, and 0 where D is 0: such a row sees no key."""
    return tl.where(denominator == 0, 0.0, 1.0 / tl.where(denominator == 0, 1.0, denominator))


@triton.jit
def live_behind(LIVE, c, chunks):
    """How many queries of the chunks after c have a gradient."""
    total = tl.zeros((LIVE_CHUNKS,), tl.float32)
    for start in range(c + 1, chunks, LIVE_CHUNKS):
        total += load_tokens(LIVE, start, chunks, 0.0, LIVE_CHUNKS)
    return tl.sum(total, 0)


@triton.jit
def finite(x):
    """x, and 0 where it is not a finite number: a weight of 0 times it is to be 0."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def not_a_number(v):
    """NaN for rows of v [TOKENS, VALUES] that hold a number that is not finite, and 0 for others, [TOKENS]."""
    return tl.sum(v.to(tl.float32) * 0.0, 1)


@triton.jit
def polynomial(s):
    """p(s), by Horner's rule."""
    value = COEFFICIENTS.value[DEGREE] * s + COEFFICIENTS.value[DEGREE - 1]
    for step in tl.static_range(2, DEGREE + 1):
        value = value * s + COEFFICIENTS.value[DEGREE - step]
    return value


@triton.jit
def slope(s):
    """p'(s)."""
    if DEGREE == 1:
        value = s * 0.0 + SLOPE.value[0]
    else:
        value = SLOPE.value[DEGREE - 1] * s + SLOPE.value[DEGREE - 2]
        for step in tl.static_range(2, DEGREE):
            value = value * s + SLOPE.value[DEGREE - 1 - step]
    return value
