"""Kernels that walk along the sequence with a state of one TILE of features in registers; CAUSAL, without NEAR."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgrad_compiler.codegen.triton.kernels.features import features, pull_back, transposed_features
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
    slope,
    store_rows,
)
from fastgrad_compiler.codegen.triton.kernels.specification import (
    D_LOADED,
    DV,
    DV_LOADED,
    FORGET,
    PADDING,
    SPECIFICATION,
    TILE,
    VALUES,
    WIDE,
    D,
)


@triton.jit
def tile_gates(own_sum, own_rest, seen, BY_KEY: tl.constexpr):
    """The sums of gates of a tile's pairs that are seen, [query, key], or [key, query] if BY_KEY."""
    if BY_KEY:
        gates = difference(own_sum[None, :], own_rest[None, :], own_sum[:, None], own_rest[:, None])
    else:
        gates = difference(own_sum[:, None], own_rest[:, None], own_sum[None, :], own_rest[None, :])
    return tl.where(seen, gates, float("-inf"))


@triton.jit
def fused_forward_kernel(
    Q, K, V, SUMS, MASK, INDEX, ORIGIN, WEIGHT, OUT, DENOMINATOR,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    tokens, heads, groups,
    ROWS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, KEY: tl.constexpr = SPECIFICATION,
):  # fmt: skip
    """O = N / D and D of the queries that share a key head, in one walk along the sequence with Z in registers.

    ROWS tokens at a time: [N, D] = phi(q)^T W Z + the sum of p(s) [v, 1] within them; then Z += phi(k) [v, 1].
    FORGET: terms are times e^(gates between), and what Z holds is times those to the last token that it has.
    Program: a row of key heads.
    """
    row = tl.program_id(0)
    shared_heads = heads // groups
    batch, shared = (row // shared_heads).to(tl.int64), (row % shared_heads).to(tl.int64)
    k_start, v_start = K + batch * k_batch + shared * k_head, V + batch * v_batch + shared * v_head
    place = tl.arange(0, ROWS)
    state, total = tl.zeros((TILE, VALUES), tl.float32), tl.zeros((TILE,), tl.float32)
    weight_of_feature = tl.load(WEIGHT + tl.arange(0, TILE))
    for first in range(0, tokens, ROWS):
        k = load_rows(k_start, k_row, first, tokens, D_LOADED, ROWS, WIDE)
        v = load_rows(v_start, v_row, first, tokens, DV_LOADED, ROWS, VALUES).to(OPERAND)
        real = first + place < tokens
        if PADDING:
            real = load_tokens(MASK + batch * tokens, first, tokens, 0, ROWS) != 0
            v = tl.where(real[:, None], v, 0.0).to(v.dtype)
            k = tl.where(real[:, None], k, 0.0).to(k.dtype)
        if FORGET:
            sums = SUMS + row.to(tl.int64) * 2 * tokens
            own_sum, own_rest = load_sums(sums, first, tokens, tokens, ROWS)
            before, before_rest = load_sum(sums, first - 1, tokens)
            last, last_rest = load_sum(sums, first + ROWS - 1, tokens)
            kept = tl.exp(difference(own_sum, own_rest, before, before_rest))
        for group in range(groups):
            head = shared * groups + group
            q_start = Q + batch * q_batch + head * q_head
            q = load_rows(q_start, q_row, first, tokens, D_LOADED, ROWS, WIDE)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            seen = (place[None, :] <= place[:, None]) & real[None, :]
            weight = polynomial(s)
            if FORGET:
                weight *= tl.exp(tile_gates(own_sum, own_rest, seen, BY_KEY=False))
            weight = tl.where(seen, weight + not_a_number(v)[None, :], 0.0)
            denominator = tl.sum(weight, 1)
            numerator = tl.dot(weight.to(OPERAND), finite(v), input_precision=PRECISION)
            phi = features(q, q_start, q_row, first, tokens, INDEX, ORIGIN, 0, ROWS, TILE, PRECISION)
            phi *= weight_of_feature[None, :]
            if FORGET:
                phi *= kept[:, None]
            denominator += tl.sum(phi * total[None, :], 1)
            numerator = tl.dot(phi.to(OPERAND), state.to(OPERAND), numerator, input_precision=PRECISION)
            saved = (batch * heads + head) * tokens
            out = numerator * inverse(denominator)[:, None]
            store_rows(OUT + saved * DV, out, first, tokens, DV, ROWS, VALUES)
            tl.store(DENOMINATOR + saved + first + place, denominator, mask=first + place < tokens)
        phi = transposed_features(
            k, real, k_start, k_row, first, tokens, INDEX, ORIGIN, 0, ROWS, TILE, PRECISION
        )
        if FORGET:  # from the tile to its own last token, and what the state was before comes to be there too
            passed = tl.exp(difference(last, last_rest, before, before_rest))
            state, total = state * passed, total * passed
            phi *= tl.exp(difference(last, last_rest, own_sum, own_rest))[None, :]
        total += tl.sum(phi * real.to(tl.float32)[None, :], 1)
        state = tl.dot(phi.to(OPERAND), v, state, input_precision=PRECISION)


@triton.jit
def fused_query_gradient_kernel(
    GRADIENT, Q, K, V, SUMS, MASK, INDEX, ORIGIN, WEIGHT, INVERSE, DELTA, DQ, DSUMS,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    tokens, heads, groups,
    ROWS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, KEY: tl.constexpr = SPECIFICATION,
):  # fmt: skip
    """dQ of the queries that share a key head, in one walk along the sequence with Z in registers.

    ROWS tokens at a time: dq = J_phi(q)^T (W Z u~) + the sum of (u~.v~) p'(s) k within them; then Z += phi(k) [v, 1].
    FORGET: as in the forward kernel; dG of a query is as in query_gradient_kernel.
    Program: a row of key heads.
    """
    row = tl.program_id(0)
    shared_heads = heads // groups
    batch, shared = (row // shared_heads).to(tl.int64), (row % shared_heads).to(tl.int64)
    k_start, v_start = K + batch * k_batch + shared * k_head, V + batch * v_batch + shared * v_head
    place = tl.arange(0, ROWS)
    state, total = tl.zeros((TILE, VALUES), tl.float32), tl.zeros((TILE,), tl.float32)
    weight_of_feature = tl.load(WEIGHT + tl.arange(0, TILE))
    for first in range(0, tokens, ROWS):
        k = load_rows(k_start, k_row, first, tokens, D_LOADED, ROWS, WIDE)
        v = load_rows(v_start, v_row, first, tokens, DV_LOADED, ROWS, VALUES).to(OPERAND)
        real = first + place < tokens
        if PADDING:
            real = load_tokens(MASK + batch * tokens, first, tokens, 0, ROWS) != 0
            v = tl.where(real[:, None], v, 0.0).to(v.dtype)
            k = tl.where(real[:, None], k, 0.0).to(k.dtype)
        if FORGET:
            sums = SUMS + row.to(tl.int64) * 2 * tokens
            own_sum, own_rest = load_sums(sums, first, tokens, tokens, ROWS)
            before, before_rest = load_sum(sums, first - 1, tokens)
            last, last_rest = load_sum(sums, first + ROWS - 1, tokens)
            kept = tl.exp(difference(own_sum, own_rest, before, before_rest))
        for group in range(groups):
            head = shared * groups + group
            saved = (batch * heads + head) * tokens
            q_start, g_start = Q + batch * q_batch + head * q_head, GRADIENT + batch * g_batch + head * g_head
            q = load_rows(q_start, q_row, first, tokens, D_LOADED, ROWS, WIDE)
            u = load_rows(g_start, g_row, first, tokens, DV_LOADED, ROWS, VALUES)
            scale = load_tokens(INVERSE + saved, first, tokens, 0.0, ROWS)
            delta = load_tokens(DELTA + saved, first, tokens, 0.0, ROWS) * scale
            u = (u.to(tl.float32) * scale[:, None]).to(OPERAND)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            gap = tl.dot(u, tl.trans(v), input_precision=PRECISION) - delta[:, None]  # u~.v~
            seen = (place[None, :] <= place[:, None]) & real[None, :]
            if FORGET:
                gap *= tl.exp(tile_gates(own_sum, own_rest, seen, BY_KEY=False))
                of_weights = tl.sum(tl.where(seen, gap * polynomial(s), 0.0), 1)  # sum of weights * (u~.v~)
            gap = tl.where(seen, gap * slope(s), 0.0)
            dq = tl.dot(gap.to(OPERAND), finite(k).to(OPERAND), input_precision=PRECISION)
            upstream = tl.dot(u, tl.trans(state.to(OPERAND)), input_precision=PRECISION)
            upstream = (upstream - delta[:, None] * total[None, :]) * weight_of_feature[None, :]
            if FORGET:
                upstream *= kept[:, None]
                phi = features(q, q_start, q_row, first, tokens, INDEX, ORIGIN, 0, ROWS, TILE, PRECISION)
                of_weights += tl.sum(phi * upstream, 1)
            dq = pull_back(
                dq, upstream, q, q_start, q_row, first, tokens, INDEX, ORIGIN, 0,
                ROWS, TILE, OPERAND, PRECISION,
            )  # fmt: skip
            dq = tl.where((scale != 0.0)[:, None], dq, 0.0)  # NaN in the keys or in the query, times 0
            store_rows(DQ + saved * D, dq, first, tokens, D, ROWS, WIDE)
            if FORGET:
                of_weights = tl.where(scale != 0.0, of_weights, 0.0)
                tl.store(DSUMS + saved + first + place, of_weights, mask=first + place < tokens)
        phi = transposed_features(
            k, real, k_start, k_row, first, tokens, INDEX, ORIGIN, 0, ROWS, TILE, PRECISION
        )
        if FORGET:  # from the tile to its own last token, and what the state was before comes to be there too
            passed = tl.exp(difference(last, last_rest, before, before_rest))
            state, total = state * passed, total * passed
            phi *= tl.exp(difference(last, last_rest, own_sum, own_rest))[None, :]
        total += tl.sum(phi * real.to(tl.float32)[None, :], 1)
        state = tl.dot(phi.to(OPERAND), v, state, input_precision=PRECISION)


@triton.jit
def fused_key_gradient_kernel(
    GRADIENT, Q, K, V, SUMS, MASK, INDEX, ORIGIN, WEIGHT, INVERSE, DELTA, DK, DV_, DSUMS,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    tokens, heads, groups,
    ROWS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, KEY: tl.constexpr = SPECIFICATION,
):  # fmt: skip
    """dK and dV of a key head, in one walk back along the sequence with Y = sum of phi(q) u~^T in registers.

    ROWS tokens at a time: dv = (Y^T W phi(k))[:dv] + the sum of p(s) u, dk = J_phi(k)^T (W Y v~) + the sum of
    (u~.v~) p'(s) q within them; then Y += phi(q) u~^T.
    FORGET: terms are times e^(gates between), and what Y holds is times those from the last token before it. dG of a
    key is as in key_gradient_kernel.
    Program: a row of key heads.
    """
    row = tl.program_id(0)
    shared_heads = heads // groups
    batch, shared = (row // shared_heads).to(tl.int64), (row % shared_heads).to(tl.int64)
    k_start, v_start = K + batch * k_batch + shared * k_head, V + batch * v_batch + shared * v_head
    place = tl.arange(0, ROWS)
    state, total = tl.zeros((TILE, VALUES), tl.float32), tl.zeros((TILE,), tl.float32)
    weight_of_feature = tl.load(WEIGHT + tl.arange(0, TILE))
    reached = row * 0  # one past the last query that has a gradient; no such query sees a key from there on
    for step in range(tl.cdiv(tokens, ROWS)):
        first = (tl.cdiv(tokens, ROWS) - 1 - step) * ROWS
        k = load_rows(k_start, k_row, first, tokens, D_LOADED, ROWS, WIDE)
        v = load_rows(v_start, v_row, first, tokens, DV_LOADED, ROWS, VALUES).to(OPERAND)
        real = first + place < tokens
        if PADDING:
            real = load_tokens(MASK + batch * tokens, first, tokens, 0, ROWS) != 0
        dk = tl.zeros((ROWS, WIDE), tl.float32)
        dv = tl.zeros((ROWS, VALUES), tl.float32)
        of_weights = tl.zeros((ROWS,), tl.float32)  # sum of weights * (u~.v~)
        phi = features(k, k_start, k_row, first, tokens, INDEX, ORIGIN, 0, ROWS, TILE, PRECISION)
        phi *= weight_of_feature[None, :]
        if FORGET:
            sums = SUMS + row.to(tl.int64) * 2 * tokens
            own_sum, own_rest = load_sums(sums, first, tokens, tokens, ROWS)
            before, before_rest = load_sum(sums, first - 1, tokens)
            last, last_rest = load_sum(sums, first + ROWS - 1, tokens)
            behind = reached > 0  # without such queries a gate of NaN is none of theirs
            kept = tl.where(behind, tl.exp(difference(last, last_rest, own_sum, own_rest)), 0.0)
            phi *= kept[:, None]
        rounded = state.to(OPERAND)
        dv = tl.dot(phi.to(OPERAND), rounded, dv, input_precision=PRECISION)
        upstream = tl.dot(v, tl.trans(rounded), input_precision=PRECISION) + total[None, :]
        if FORGET:
            of_weights += tl.sum(phi * upstream, 1)
            upstream *= kept[:, None]
            passed = tl.where(behind, tl.exp(difference(last, last_rest, before, before_rest)), 0.0)
            state, total = state * passed, total * passed
        upstream *= weight_of_feature[None, :]
        dk = pull_back(
            dk, upstream, k, k_start, k_row, first, tokens, INDEX, ORIGIN, 0, ROWS, TILE, OPERAND, PRECISION
        )
        for group in range(groups):
            head = shared * groups + group
            saved = (batch * heads + head) * tokens
            q_start, g_start = Q + batch * q_batch + head * q_head, GRADIENT + batch * g_batch + head * g_head
            q = load_rows(q_start, q_row, first, tokens, D_LOADED, ROWS, WIDE)
            u = load_rows(g_start, g_row, first, tokens, DV_LOADED, ROWS, VALUES)
            scale = load_tokens(INVERSE + saved, first, tokens, 0.0, ROWS)
            live = scale != 0.0
            q = tl.where(live[:, None], q, 0.0).to(q.dtype)
            reached = tl.maximum(reached, tl.max(tl.where(live, first + place + 1, 0), 0))
            delta = load_tokens(DELTA + saved, first, tokens, 0.0, ROWS) * scale
            u = (u.to(tl.float32) * scale[:, None]).to(OPERAND)
            seen = place[:, None] <= place[None, :]
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            gap = tl.dot(v, tl.trans(u), input_precision=PRECISION) - delta[None, :]  # u~.v~
            weight = polynomial(s)
            if FORGET:
                seen &= live[None, :]
                fade = tl.exp(tile_gates(own_sum, own_rest, seen, BY_KEY=True))
                weight = tl.where(seen, weight * fade, 0.0)
                of_weights += tl.sum(weight * gap, 1)
                gap *= fade
            else:
                weight = tl.where(seen, weight, 0.0)
            gap = tl.where(seen, gap * slope(s), 0.0)
            dk = tl.dot(gap.to(OPERAND), q.to(OPERAND), dk, input_precision=PRECISION)
            dv = tl.dot(weight.to(OPERAND), u, dv, input_precision=PRECISION)
            phi_of_queries = transposed_features(
                q, live, q_start, q_row, first, tokens, INDEX, ORIGIN, 0, ROWS, TILE, PRECISION
            )
            if FORGET:
                passed_on = tl.exp(difference(own_sum, own_rest, before, before_rest))
                phi_of_queries *= tl.where(live, passed_on, 0.0)[None, :]
            total += tl.sum(phi_of_queries * (-delta)[None, :], 1)
            state = tl.dot(phi_of_queries.to(OPERAND), u, state, input_precision=PRECISION)
        saved_keys = row.to(tl.int64) * tokens
        real &= first + place < reached
        dk, dv = tl.where(real[:, None], dk, 0.0), tl.where(real[:, None], dv, 0.0)
        store_rows(DK + saved_keys * D, dk, first, tokens, D, ROWS, WIDE)
        store_rows(DV_ + saved_keys * DV, dv, first, tokens, DV, ROWS, VALUES)
        if FORGET:
            of_weights = tl.where(real, of_weights, 0.0)
            tl.store(DSUMS + saved_keys + first + place, -of_weights, mask=first + place < tokens)
