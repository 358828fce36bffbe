"""The gradients of a tile of keys and their values."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgrad_compiler.codegen.triton.kernels.features import features, load_state, pull_back
from fastgrad_compiler.codegen.triton.kernels.helpers import (
    difference,
    live_behind,
    load_rows,
    load_sum,
    load_sums,
    load_tokens,
    polynomial,
    slope,
    store_rows,
)
from fastgrad_compiler.codegen.triton.kernels.places import in_near_blocks, key_tile, seen_by
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
    D,
)


@triton.jit
def add_state_to_key(
    dk, dv, of_weights, v, k, k_start, k_row, first, limit, INDEX, ORIGIN, STATE,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk + J_phi(k)^T (W Y v~) and dv + (Y^T W phi(k))[:dv] of a tile of keys and one state.

    FORGET: and the sum of their weights times u~.v~.
    """
    for first_feature in range(0, RANK, FEATURES):
        phi = features(
            k, k_start, k_row, first, limit, INDEX, ORIGIN, first_feature, ROWS, FEATURES, PRECISION
        )
        state, total = load_state(STATE, first_feature, FEATURES)
        state = state.to(OPERAND)
        dv = tl.dot(phi.to(OPERAND), state, dv, input_precision=PRECISION)
        upstream = tl.dot(v, tl.trans(state), input_precision=PRECISION) + total[None, :]
        if FORGET:
            of_weights += tl.sum(phi * upstream, 1)
        dk = pull_back(
            dk, upstream, k, k_start, k_row, first, limit, INDEX, ORIGIN, first_feature,
            ROWS, FEATURES, OPERAND, PRECISION,
        )  # fmt: skip
    return dk, dv, of_weights


@triton.jit
def key_gradient_kernel(
    GRADIENT, Q, K, V, NEAR_Q, NEAR_K, SUMS, MASK, INDEX, ORIGIN, BEFORE, AFTER, INVERSE, MAXIMUM, DELTA,
    LIVE, DK, DV_, DNEAR_K, DSUMS,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    nq_batch, nq_head, nq_row, nk_batch, nk_head, nk_row,
    queries, keys, chunk, chunks, heads, groups,
    MIXED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, KEY: tl.constexpr = SPECIFICATION,
):  # fmt: skip
    """dK and dV of a tile of keys, over the `groups` query heads that share them.

    With Y = sum of phi(q) u~^T over far queries: dv = (Y^T W phi(k))[:dv], dk = J_phi(k)^T (W Y v~); unless TOTAL and
    of each query nearby: dv += weight * u, dk += (u~.v~) p'(s) q.
    FORGET: terms are times e^(gates between). dG of a key is minus the sum of its weights times u~.v~.
    AFTER: W Y of the queries after the chunk, of all queries if TOTAL; BEFORE: of those before it, if TWO_SIDED.
    Program: a row of key heads, a tile of ROWS keys; KEYS queries at a time.
    """
    first, limit, row, c, low, high = key_tile(queries, keys, chunk, chunks, ROWS)
    shared_heads = heads // groups
    batch, shared = (row // shared_heads).to(tl.int64), (row % shared_heads).to(tl.int64)
    saved_row = row.to(tl.int64)
    k_start = K + batch * k_batch + shared * k_head
    v_start = V + batch * v_batch + shared * v_head
    k = load_rows(k_start, k_row, first, limit, D_LOADED, ROWS, WIDE)
    v = load_rows(v_start, v_row, first, limit, DV_LOADED, ROWS, VALUES).to(OPERAND)
    dk = tl.zeros((ROWS, WIDE), tl.float32)
    dv = tl.zeros((ROWS, VALUES), tl.float32)
    of_weights = tl.zeros((ROWS,), tl.float32)  # sum of weights * (u~.v~)
    state = (saved_row * chunks + c) * STATE_SIZE
    dk, dv, of_weights = add_state_to_key(
        dk, dv, of_weights, v, k, k_start, k_row, first, limit, INDEX, ORIGIN, AFTER + state,
        ROWS, FEATURES, OPERAND, PRECISION,
    )  # fmt: skip
    if TWO_SIDED:
        dk, dv, of_weights = add_state_to_key(
            dk, dv, of_weights, v, k, k_start, k_row, first, limit, INDEX, ORIGIN, BEFORE + state,
            ROWS, FEATURES, OPERAND, PRECISION,
        )  # fmt: skip
    if FORGET:
        behind = live_behind(LIVE + row * chunks, c, chunks) > 0
        sums = SUMS + saved_row * 2 * keys
        own_sum, own_rest = load_sums(sums, first, limit, keys, ROWS)
        base_sum, base_rest = load_sum(sums, high - 1, keys)
        kept = tl.exp(difference(base_sum, base_rest, own_sum, own_rest))
        kept = tl.where(behind, kept, 0.0)  # a gate of NaN that no such query sees
        dk, dv, of_weights = dk * kept[:, None], dv * kept[:, None], of_weights * kept
    key = first + tl.arange(0, ROWS)
    if NEAR_D:
        nk_start = NEAR_K + batch * nk_batch + shared * nk_head
        near_k = load_rows(nk_start, nk_row, first, limit, NEAR_LOADED, ROWS, NEAR_WIDE)
        dnear_k = tl.zeros((ROWS, NEAR_WIDE), tl.float32)
    if not TOTAL:
        reached = tl.zeros((KEYS,), tl.int32)  # one past the last query nearby that has a gradient
        for group in range(groups):
            head = shared * groups + group
            q_start, g_start = Q + batch * q_batch + head * q_head, GRADIENT + batch * g_batch + head * g_head
            saved = (batch * heads + head) * queries
            for start in range(low, high, KEYS):
                query = start + tl.arange(0, KEYS)
                q = load_rows(q_start, q_row, start, high, D_LOADED, KEYS, WIDE)
                u = load_rows(g_start, g_row, start, high, DV_LOADED, KEYS, VALUES)
                scale = load_tokens(INVERSE + saved, start, high, 0.0, KEYS)
                q = tl.where((scale != 0.0)[:, None], q, 0.0).to(q.dtype)
                if CAUSAL:
                    reached = tl.maximum(reached, tl.where(scale != 0.0, query + 1, 0))
                delta = load_tokens(DELTA + saved, start, high, 0.0, KEYS) * scale
                u = (u.to(tl.float32) * scale[:, None]).to(OPERAND)
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                gap = tl.dot(v, tl.trans(u), input_precision=PRECISION) - delta[None, :]  # u~.v~
                seen = seen_by(query, key, high, limit)
                if FORGET:
                    seen &= (scale != 0.0)[None, :]
                    other_sum, other_rest = load_sums(sums, start, high, keys, KEYS)
                    gates = difference(
                        other_sum[None, :], other_rest[None, :], own_sum[:, None], own_rest[:, None]
                    )
                    gates = tl.where(seen, gates, float("-inf"))
                if NEAR:
                    is_near = in_near_blocks(query[None, :], key[:, None])
                    if NEAR_D:
                        nq_start = NEAR_Q + batch * nq_batch + head * nq_head
                        near_q = load_rows(nq_start, nq_row, start, high, NEAR_LOADED, KEYS, NEAR_WIDE)
                        near_q = tl.where((scale != 0.0)[:, None], near_q, 0.0).to(near_q.dtype)
                        t = tl.dot(near_k, tl.trans(near_q), input_precision=PRECISION)
                    else:
                        t = SCALE * s
                    if FORGET:
                        t += gates
                    maximum = load_tokens(MAXIMUM + saved, start, high, 0.0, KEYS)
                    maximum = tl.where(scale != 0.0, maximum, 0.0)
                    weight = tl.exp(tl.where(seen & is_near, t - maximum[None, :], float("-inf")))
                    near_gap = gap * weight
                    if MIXED:
                        decay = tl.exp(-tl.maximum(maximum, 0.0))
                        decay = tl.where(seen & (is_near == 0), decay[None, :], 0.0)
                        if FORGET:
                            decay *= tl.exp(gates)
                        weight += decay * polynomial(s)
                        gap_of_score = gap * decay * slope(s)
                    if NEAR_D:
                        dnear_k = tl.dot(
                            near_gap.to(OPERAND), near_q.to(OPERAND), dnear_k, input_precision=PRECISION
                        )
                    elif MIXED:
                        gap_of_score = SCALE * near_gap + gap_of_score
                    else:
                        gap_of_score = SCALE * near_gap
                else:
                    weight, gap_of_score = polynomial(s), gap * slope(s)
                    if FORGET:
                        weight, gap_of_score = weight * tl.exp(gates), gap_of_score * tl.exp(gates)
                    weight, gap_of_score = tl.where(seen, weight, 0.0), tl.where(seen, gap_of_score, 0.0)
                if MIXED or not NEAR_D:
                    dk = tl.dot(gap_of_score.to(OPERAND), q.to(OPERAND), dk, input_precision=PRECISION)
                dv = tl.dot(weight.to(OPERAND), u, dv, input_precision=PRECISION)
                if FORGET:
                    of_weights += tl.sum(weight * gap, 1)
    if CAUSAL or PADDING:  # keys that no query with a gradient sees, whatever they hold
        if CAUSAL:
            if not FORGET:
                behind = live_behind(LIVE + row * chunks, c, chunks) > 0
            shown = (key < tl.max(reached, 0)) | behind
        else:
            shown = key < limit
        if PADDING:
            shown &= load_tokens(MASK + batch * keys, first, limit, 0, ROWS) != 0
        dk, dv = tl.where(shown[:, None], dk, 0.0), tl.where(shown[:, None], dv, 0.0)
        of_weights = tl.where(shown, of_weights, 0.0)
        if NEAR_D:
            dnear_k = tl.where(shown[:, None], dnear_k, 0.0)
    saved_keys = saved_row * keys
    store_rows(DK + saved_keys * D, dk, first, limit, D, ROWS, WIDE)
    store_rows(DV_ + saved_keys * DV, dv, first, limit, DV, ROWS, VALUES)
    if NEAR_D:
        store_rows(DNEAR_K + saved_keys * NEAR_D, dnear_k, first, limit, NEAR_D, ROWS, NEAR_WIDE)
    if FORGET:
        tl.store(DSUMS + saved_keys + key, -of_weights, mask=key < limit)
