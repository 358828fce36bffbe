"""The outputs of a tile of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgrad_compiler.codegen.triton.kernels.features import features, load_state
from fastgrad_compiler.codegen.triton.kernels.helpers import (
    difference,
    finite,
    inverse,
    load_rows,
    load_sum,
    load_sums,
    load_tokens,
    not_a_number,
    polynomial,
    store_rows,
)
from fastgrad_compiler.codegen.triton.kernels.places import in_near_blocks, query_tile, seen_keys
from fastgrad_compiler.codegen.triton.kernels.specification import (
    CAUSAL,
    D_LOADED,
    DV,
    DV_LOADED,
    FORGET,
    NEAR,
    NEAR_D,
    NEAR_LOADED,
    NEAR_WIDE,
    PADDING,
    RANK,
    SCALE,
    SPECIFICATION,
    STATE_SIZE,
    TOTAL,
    TWO_SIDED,
    VALUES,
    WIDE,
)


@triton.jit
def add_state(
    numerator, denominator, q, q_start, q_row, first, limit, INDEX, ORIGIN, STATE,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[N, D] + phi(q)^T W Z of a tile of queries and one state."""
    for first_feature in range(0, RANK, FEATURES):
        phi = features(
            q, q_start, q_row, first, limit, INDEX, ORIGIN, first_feature, ROWS, FEATURES, PRECISION
        )
        state, total = load_state(STATE, first_feature, FEATURES)
        denominator += tl.sum(phi * total[None, :], 1)
        numerator = tl.dot(phi.to(OPERAND), state.to(OPERAND), numerator, input_precision=PRECISION)
    return numerator, denominator


@triton.jit
def forward_kernel(
    Q, K, V, NEAR_Q, NEAR_K, SUMS, MASK, INDEX, ORIGIN, BEFORE, AFTER, OUT, DENOMINATOR, MAXIMUM,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    nq_batch, nq_head, nq_row, nk_batch, nk_head, nk_row,
    queries, keys, chunk, chunks, heads, groups,
    MIXED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, KEY: tl.constexpr = SPECIFICATION,
):  # fmt: skip
    """O = N / D and D of a tile of queries; with a near field m too.

    [N, D] = phi(q)^T W Z, unless TOTAL + the sum of the weights times [v, 1] over the keys nearby; with a near field
    the first is times e^-m. FORGET: terms are times e^(gates between).
    BEFORE: W Z of the keys before the chunk, of all keys if TOTAL; AFTER: of those after it, if TWO_SIDED. MIXED: a
    pair nearby may be far.
    Program: a row, a tile of ROWS queries; KEYS keys at a time.
    """
    first, limit, row, c, low, high = query_tile(queries, keys, chunk, chunks, ROWS)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    shared = head // groups  # the key head
    shared_row = batch * (heads // groups) + shared
    q_start = Q + batch * q_batch + head * q_head
    q = load_rows(q_start, q_row, first, limit, D_LOADED, ROWS, WIDE)
    numerator = tl.zeros((ROWS, VALUES), tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    state = (shared_row * chunks + c) * STATE_SIZE
    numerator, denominator = add_state(
        numerator, denominator, q, q_start, q_row, first, limit, INDEX, ORIGIN, BEFORE + state,
        ROWS, FEATURES, OPERAND, PRECISION,
    )  # fmt: skip
    if TWO_SIDED:
        numerator, denominator = add_state(
            numerator, denominator, q, q_start, q_row, first, limit, INDEX, ORIGIN, AFTER + state,
            ROWS, FEATURES, OPERAND, PRECISION,
        )  # fmt: skip
    if FORGET:
        sums = SUMS + shared_row * 2 * keys
        own_sum, own_rest = load_sums(sums, first, limit, keys, ROWS)
        base_sum, base_rest = load_sum(sums, low - 1, keys)
        kept = tl.exp(difference(own_sum, own_rest, base_sum, base_rest))
        denominator *= kept
        numerator *= kept[:, None]
    if NEAR:
        maximum = tl.where(denominator == 0, float("-inf"), 0.0)
    if not TOTAL:
        k_start, v_start = K + batch * k_batch + shared * k_head, V + batch * v_batch + shared * v_head
        if NEAR_D:
            nk_start = NEAR_K + batch * nk_batch + shared * nk_head
            nq_start = NEAR_Q + batch * nq_batch + head * nq_head
            near_q = load_rows(nq_start, nq_row, first, limit, NEAR_LOADED, ROWS, NEAR_WIDE)
        query = first + tl.arange(0, ROWS)
        for start in range(low, high, KEYS):
            key = start + tl.arange(0, KEYS)
            k = load_rows(k_start, k_row, start, high, D_LOADED, KEYS, WIDE)
            v = load_rows(v_start, v_row, start, high, DV_LOADED, KEYS, VALUES)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            seen = seen_keys(query, start, high, MASK, batch * keys, KEYS)
            if FORGET:
                other_sum, other_rest = load_sums(sums, start, high, keys, KEYS)
                gates = difference(
                    own_sum[:, None], own_rest[:, None], other_sum[None, :], other_rest[None, :]
                )
                gates = tl.where(seen, gates, float("-inf"))
            if PADDING:
                real = load_tokens(MASK + batch * keys, start, high, 0, KEYS) != 0
                v = tl.where(real[:, None], v, 0.0).to(v.dtype)
            if CAUSAL:
                poison = not_a_number(v)
                v = finite(v)
            if NEAR:
                is_near = in_near_blocks(query[:, None], key[None, :])
                if NEAR_D:
                    near_k = load_rows(nk_start, nk_row, start, high, NEAR_LOADED, KEYS, NEAR_WIDE)
                    t = tl.dot(near_q, tl.trans(near_k), input_precision=PRECISION)
                else:
                    t = SCALE * s
                t = tl.where(seen & is_near, t + gates if FORGET else t, float("-inf"))
                largest = tl.maximum(maximum, tl.max(t, 1))
                if MIXED:
                    is_far = seen & (is_near == 0)
                    if FORGET:
                        fade = tl.exp(gates)
                        is_far &= fade != 0.0
                    is_far = is_far.to(tl.int32)
                    largest = tl.where(tl.max(is_far, 1) != 0, tl.maximum(largest, 0.0), largest)
                unit = tl.where(largest == float("-inf"), 0.0, largest)
                weight = tl.exp(t - unit[:, None])
                if MIXED:
                    decay = tl.exp(-tl.maximum(unit, 0.0))
                    far_weight = polynomial(s) * decay[:, None]
                    weight += tl.where(is_far != 0, far_weight * fade if FORGET else far_weight, 0.0)
                if CAUSAL:
                    weight += tl.where(seen, poison[None, :], 0.0)
                shrink = tl.exp(maximum - unit)
                denominator *= shrink
                numerator *= shrink[:, None]
                maximum = largest
            else:
                weight = polynomial(s)
                if FORGET:
                    weight *= tl.exp(gates)
                weight = tl.where(seen, weight + poison[None, :], 0.0)
            denominator += tl.sum(weight, 1)
            numerator = tl.dot(weight.to(OPERAND), v.to(OPERAND), numerator, input_precision=PRECISION)
    token = first + tl.arange(0, ROWS)
    saved = row.to(tl.int64) * queries
    store_rows(OUT + saved * DV, numerator * inverse(denominator)[:, None], first, limit, DV, ROWS, VALUES)
    tl.store(DENOMINATOR + saved + token, denominator, mask=token < limit)
    if NEAR:
        maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
        tl.store(MAXIMUM + saved + token, maximum, mask=token < limit)
