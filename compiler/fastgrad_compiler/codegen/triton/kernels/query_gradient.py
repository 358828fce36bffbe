"""The gradients of a tile of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgrad_compiler.codegen.triton.kernels.features import features, load_state, pull_back
from fastgrad_compiler.codegen.triton.kernels.helpers import (
    difference,
    finite,
    inverse,
    load_rows,
    load_sum,
    load_sums,
    load_tokens,
    polynomial,
    slope,
    store_rows,
)
from fastgrad_compiler.codegen.triton.kernels.places import in_near_blocks, query_tile, seen_keys
from fastgrad_compiler.codegen.triton.kernels.specification import (
    CAUSAL,
    D_LOADED,
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
    D,
)


@triton.jit
def delta_kernel(
    GRADIENT, OUT, DENOMINATOR, DELTA, INVERSE, g_batch, g_head, g_row, o_row, queries, heads,
    ROWS: tl.constexpr, KEY: tl.constexpr = SPECIFICATION,
):  # fmt: skip
    """dO . O of a tile of queries, from which delta = dO . O / D, and 1 / D; both 0 for a row whose dO is 0.

    Such a row is left out by its 0, whatever its query and its output hold. Program: a row, a tile of ROWS queries.
    """
    tiles = tl.cdiv(queries, ROWS)
    program = tl.program_id(0)
    first, row = program % tiles * ROWS, program // tiles
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    saved = row.to(tl.int64) * queries
    g_start = GRADIENT + batch * g_batch + head * g_head
    gradient = load_rows(g_start, g_row, first, queries, DV_LOADED, ROWS, VALUES)
    out = load_rows(OUT + saved * o_row, o_row, first, queries, DV_LOADED, ROWS, VALUES)
    token = first + tl.arange(0, ROWS)
    delta = tl.sum(gradient.to(tl.float32) * out.to(tl.float32), 1)
    kept = tl.max((gradient.to(tl.float32) != 0.0).to(tl.int32), 1) != 0
    scale = inverse(load_tokens(DENOMINATOR + saved, first, queries, 0.0, ROWS))
    tl.store(DELTA + saved + token, tl.where(kept, delta, 0.0), mask=token < queries)
    tl.store(INVERSE + saved + token, tl.where(kept, scale, 0.0), mask=token < queries)


@triton.jit
def add_state_to_query(
    dq, of_weights, u, delta, q, q_start, q_row, first, limit, INDEX, ORIGIN, STATE,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq + J_phi(q)^T (W Z u~) of a tile of queries and one state; FORGET: and the sum of its weights times u~.v~."""
    for first_feature in range(0, RANK, FEATURES):
        state, total = load_state(STATE, first_feature, FEATURES)
        upstream = tl.dot(u, tl.trans(state.to(OPERAND)), input_precision=PRECISION)
        upstream -= delta[:, None] * total[None, :]
        if FORGET:
            phi = features(
                q, q_start, q_row, first, limit, INDEX, ORIGIN, first_feature, ROWS, FEATURES, PRECISION
            )
            of_weights += tl.sum(phi * upstream, 1)
        dq = pull_back(
            dq, upstream, q, q_start, q_row, first, limit, INDEX, ORIGIN, first_feature,
            ROWS, FEATURES, OPERAND, PRECISION,
        )  # fmt: skip
    return dq, of_weights


@triton.jit
def query_gradient_kernel(
    GRADIENT, Q, K, V, NEAR_Q, NEAR_K, SUMS, MASK, INDEX, ORIGIN, BEFORE, AFTER, INVERSE, MAXIMUM, DELTA,
    DQ, DNEAR_Q, DSUMS,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    nq_batch, nq_head, nq_row, nk_batch, nk_head, nk_row,
    queries, keys, chunk, chunks, heads, groups,
    MIXED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, KEY: tl.constexpr = SPECIFICATION,
):  # fmt: skip
    """dQ of a tile of queries.

    dq = J_phi(q)^T (W Z u~), unless TOTAL + the sum of (u~.v~) p'(s) k over the keys nearby. Near pairs give
    (u~.v~) exp(t - m), far ones are in units of e^m.
    FORGET: terms are times e^(gates between). dG of a query is the sum of its weights times u~.v~, which is 0 but for
    the rounding of O. dG of its keys has the same error, and the two cancel in the sums of dG from a token on.
    BEFORE, AFTER, MIXED and the program as in the forward kernel.
    """
    first, limit, row, c, low, high = query_tile(queries, keys, chunk, chunks, ROWS)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    shared = head // groups  # the key head
    shared_row = batch * (heads // groups) + shared
    saved = row.to(tl.int64) * queries
    q_start = Q + batch * q_batch + head * q_head
    q = load_rows(q_start, q_row, first, limit, D_LOADED, ROWS, WIDE)
    u = load_rows(GRADIENT + batch * g_batch + head * g_head, g_row, first, limit, DV_LOADED, ROWS, VALUES)
    scale = load_tokens(INVERSE + saved, first, limit, 0.0, ROWS)
    delta = load_tokens(DELTA + saved, first, limit, 0.0, ROWS) * scale
    u = (u.to(tl.float32) * scale[:, None]).to(OPERAND)
    dq = tl.zeros((ROWS, WIDE), tl.float32)
    of_weights = tl.zeros((ROWS,), tl.float32)  # sum of weights * (u~.v~)
    state = (shared_row * chunks + c) * STATE_SIZE
    dq, of_weights = add_state_to_query(
        dq, of_weights, u, delta, q, q_start, q_row, first, limit, INDEX, ORIGIN, BEFORE + state,
        ROWS, FEATURES, OPERAND, PRECISION,
    )  # fmt: skip
    if TWO_SIDED:
        dq, of_weights = add_state_to_query(
            dq, of_weights, u, delta, q, q_start, q_row, first, limit, INDEX, ORIGIN, AFTER + state,
            ROWS, FEATURES, OPERAND, PRECISION,
        )  # fmt: skip
    if NEAR:
        maximum = load_tokens(MAXIMUM + saved, first, limit, 0.0, ROWS)
        decay = tl.exp(-tl.maximum(maximum, 0.0))
        dq *= decay[:, None]
        of_weights *= decay
    if FORGET:
        sums = SUMS + shared_row * 2 * keys
        own_sum, own_rest = load_sums(sums, first, limit, keys, ROWS)
        base_sum, base_rest = load_sum(sums, low - 1, keys)
        kept = tl.exp(difference(own_sum, own_rest, base_sum, base_rest))
        dq, of_weights = dq * kept[:, None], of_weights * kept
    if not TOTAL:
        k_start, v_start = K + batch * k_batch + shared * k_head, V + batch * v_batch + shared * v_head
        if NEAR_D:
            nk_start = NEAR_K + batch * nk_batch + shared * nk_head
            nq_start = NEAR_Q + batch * nq_batch + head * nq_head
            near_q = load_rows(nq_start, nq_row, first, limit, NEAR_LOADED, ROWS, NEAR_WIDE)
            dnear_q = tl.zeros((ROWS, NEAR_WIDE), tl.float32)
        query = first + tl.arange(0, ROWS)
        for start in range(low, high, KEYS):
            key = start + tl.arange(0, KEYS)
            k = load_rows(k_start, k_row, start, high, D_LOADED, KEYS, WIDE)
            v = load_rows(v_start, v_row, start, high, DV_LOADED, KEYS, VALUES)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            gap = tl.dot(u, tl.trans(v.to(OPERAND)), input_precision=PRECISION) - delta[:, None]  # u~.v~
            seen = seen_keys(query, start, high, MASK, batch * keys, KEYS)
            if FORGET:
                other_sum, other_rest = load_sums(sums, start, high, keys, KEYS)
                gates = difference(
                    own_sum[:, None], own_rest[:, None], other_sum[None, :], other_rest[None, :]
                )
                gates = tl.where(seen, gates, float("-inf"))
            if NEAR:
                is_near = in_near_blocks(query[:, None], key[None, :])
                if NEAR_D:
                    near_k = load_rows(nk_start, nk_row, start, high, NEAR_LOADED, KEYS, NEAR_WIDE)
                    t = tl.dot(near_q, tl.trans(near_k), input_precision=PRECISION)
                    if CAUSAL or PADDING:
                        near_k = finite(near_k)
                else:
                    t = SCALE * s
                if FORGET:
                    t += gates
                near_gap = tl.where(seen & is_near, gap * tl.exp(t - maximum[:, None]), 0.0)
                far = seen & (is_near == 0)
                gap *= decay[:, None] * tl.exp(gates) if FORGET else decay[:, None]
                if FORGET:
                    of_weights += tl.sum(near_gap, 1)
                    if MIXED:
                        of_weights += tl.sum(tl.where(far, gap * polynomial(s), 0.0), 1)
                gap_of_score = tl.where(far, gap * slope(s), 0.0)
                if NEAR_D:
                    dnear_q = tl.dot(
                        near_gap.to(OPERAND), near_k.to(OPERAND), dnear_q, input_precision=PRECISION
                    )
                elif MIXED:
                    gap_of_score = SCALE * near_gap + gap_of_score
                else:
                    gap_of_score = SCALE * near_gap
            else:
                if FORGET:
                    gap *= tl.exp(gates)
                    of_weights += tl.sum(tl.where(seen, gap * polynomial(s), 0.0), 1)
                gap_of_score = tl.where(seen, gap * slope(s), 0.0)
            if MIXED or not NEAR_D:
                if CAUSAL or PADDING:
                    k = finite(k)
                dq = tl.dot(gap_of_score.to(OPERAND), k.to(OPERAND), dq, input_precision=PRECISION)
        if NEAR_D:
            dnear_q = tl.where((scale != 0.0)[:, None], dnear_q, 0.0)
            store_rows(DNEAR_Q + saved * NEAR_D, dnear_q, first, limit, NEAR_D, ROWS, NEAR_WIDE)
    dq = tl.where((scale != 0.0)[:, None], dq, 0.0)  # NaN in the keys or in the query, times 0
    store_rows(DQ + saved * D, dq, first, limit, D, ROWS, WIDE)
    if FORGET:
        token = first + tl.arange(0, ROWS)
        tl.store(DSUMS + saved + token, tl.where(scale != 0.0, of_weights, 0.0), mask=token < limit)
