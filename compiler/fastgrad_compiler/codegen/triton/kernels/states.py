"""The states of chunks, and the sums of those before or after each."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgrad_compiler.codegen.triton.kernels.features import transposed_features
from fastgrad_compiler.codegen.triton.kernels.helpers import (
    difference,
    load_rows,
    load_sum,
    load_sums,
    load_tokens,
)
from fastgrad_compiler.codegen.triton.kernels.specification import (
    BLOCK,
    CAUSAL,
    D_LOADED,
    DV_LOADED,
    FORGET,
    NEAR,
    PADDING,
    RANK,
    SPECIFICATION,
    STATE_SIZE,
    STATE_WIDTH,
    VALUES,
    WIDE,
    D,
)


@triton.jit
def state_kernel(
    X, Y, SUMS, MASK, INVERSE, DELTA, MAXIMUM, INDEX, ORIGIN, STATE, LIVE,
    x_batch, x_head, x_row, y_batch, y_head, y_row,
    tokens, chunk, chunks, shift, heads, groups,
    UPSTREAM: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, KEY: tl.constexpr = SPECIFICATION,
):  # fmt: skip
    """The state of one chunk, S = sum of phi(x) y^T and the sum of phi(x) e, over its tokens.

    Keys: x, y, e = k, v, 1. Queries (UPSTREAM): x, y, e = q, u, -delta, over the `groups` query heads of a key head;
    with a near field times e^-m.
    FORGET: a term is times e^(gates between), those from a key to the chunk's last token, or to a query from the last
    token before the chunk.
    LIVE, of queries if CAUSAL: how many of the chunk have a gradient.
    The chunk is tokens [c * chunk + shift, (c + 1) * chunk + shift). Program: a row of `heads` key heads, c, a tile of
    features.
    """
    tiles: tl.constexpr = RANK // FEATURES
    program = tl.program_id(0)
    first_feature, c, row = program % tiles * FEATURES, program // tiles % chunks, program // tiles // chunks
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    low, high = tl.maximum(c * chunk + shift, 0), tl.minimum((c + 1) * chunk + shift, tokens)
    state = tl.zeros((FEATURES, VALUES), tl.float32)
    total = tl.zeros((FEATURES,), tl.float32)
    live = tl.zeros((TOKENS,), tl.float32)
    if FORGET:
        sums = SUMS + row.to(tl.int64) * 2 * tokens
        base_sum, base_rest = load_sum(sums, low - 1 if UPSTREAM else high - 1, tokens)
    for group in range(groups):
        own = head * groups + group
        x_start, y_start = X + batch * x_batch + own * x_head, Y + batch * y_batch + own * y_head
        saved = (batch * heads * groups + own) * tokens
        for first in range(low, high, TOKENS):
            y = load_rows(y_start, y_row, first, high, DV_LOADED, TOKENS, VALUES)
            if FORGET:
                token_sum, token_rest = load_sums(sums, first, high, tokens, TOKENS)
            if UPSTREAM:
                scale = load_tokens(INVERSE + saved, first, high, 0.0, TOKENS)
                kept = scale != 0.0
                if CAUSAL:
                    live += kept.to(tl.float32)
                if NEAR:
                    decay = tl.exp(-tl.maximum(load_tokens(MAXIMUM + saved, first, high, 0.0, TOKENS), 0.0))
                    scale = tl.where(kept, scale * decay, 0.0)
                if FORGET:
                    decay = tl.exp(difference(token_sum, token_rest, base_sum, base_rest))
                    scale = tl.where(kept, scale * decay, 0.0)
                extra = -load_tokens(DELTA + saved, first, high, 0.0, TOKENS) * scale
                y = (y.to(tl.float32) * scale[:, None]).to(OPERAND)
            else:
                kept = first + tl.arange(0, TOKENS) < high
                if PADDING:
                    kept = load_tokens(MASK + batch * tokens, first, high, 0, TOKENS) != 0
                    y = tl.where(kept[:, None], y, 0.0).to(OPERAND)
                extra = kept.to(tl.float32)
            x = load_rows(x_start, x_row, first, high, D_LOADED, TOKENS, WIDE)
            if D <= BLOCK:
                x = tl.where(kept[:, None], x, 0.0).to(x.dtype)
            phi = transposed_features(
                x, kept, x_start, x_row, first, high, INDEX, ORIGIN, first_feature,
                TOKENS, FEATURES, PRECISION,
            )  # fmt: skip
            if FORGET and not UPSTREAM:
                phi *= tl.exp(difference(base_sum, base_rest, token_sum, token_rest))[None, :]
            total += tl.sum(phi * extra[None, :], 1)
            state = tl.dot(phi.to(OPERAND), y.to(OPERAND), state, input_precision=PRECISION)
    if CAUSAL and UPSTREAM:
        if first_feature == 0:
            tl.store(LIVE + program // tiles, tl.sum(live, 0))
    feature, column = first_feature + tl.arange(0, FEATURES), tl.arange(0, VALUES)
    start = STATE + program.to(tl.int64) // tiles * STATE_SIZE
    rows = start + feature[:, None] * STATE_WIDTH + column[None, :]
    tl.store(rows, state, mask=(column < STATE_WIDTH)[None, :])
    tl.store(start + RANK * STATE_WIDTH + feature, total)


@triton.jit
def scan_kernel(
    STATE, WEIGHT, SUMS, tokens, chunk, chunks, shift,
    MODE: tl.constexpr, SIZE: tl.constexpr, KEY: tl.constexpr = SPECIFICATION,
):  # fmt: skip
    """W times the sum of the states of the chunks before c (MODE 0), after c (1) or of all, at c = 0 (2), in place.

    FORGET: terms are times e^(gates between), those from a key to the last token before the chunk c (MODE 0), or to a
    query from the last token of the chunk c (1). Chunks are those of state_kernel, so each one's sum is times
    e^(all its gates).
    Program: a row, SIZE numbers of its state.
    """
    parts: tl.constexpr = (STATE_SIZE + SIZE - 1) // SIZE
    program = tl.program_id(0)
    element = program % parts * SIZE + tl.arange(0, SIZE)
    inside = element < STATE_SIZE
    feature = tl.where(element < RANK * STATE_WIDTH, element // STATE_WIDTH, element - RANK * STATE_WIDTH)
    weight = tl.load(WEIGHT + feature, mask=inside, other=0.0)
    start = STATE + (program // parts).to(tl.int64) * chunks * STATE_SIZE
    total = tl.zeros((SIZE,), tl.float32)
    for step in range(chunks):
        c = chunks - 1 - step if MODE == 1 else step
        place = tl.cast(c, tl.int64) * STATE_SIZE + element
        own = tl.load(start + place, mask=inside, other=0.0)
        if MODE != 2:
            tl.store(start + place, weight * total, mask=inside)
        if FORGET:
            sums = SUMS + (program // parts).to(tl.int64) * 2 * tokens
            last, last_rest = load_sum(sums, (c + 1) * chunk + shift - 1, tokens)
            before, before_rest = load_sum(sums, c * chunk + shift - 1, tokens)
            decay = tl.exp(difference(last, last_rest, before, before_rest))
            total = tl.where(total == 0.0, 0.0, total * decay)
        total += own
    if MODE == 2:
        tl.store(start + element, weight * total, mask=inside)
