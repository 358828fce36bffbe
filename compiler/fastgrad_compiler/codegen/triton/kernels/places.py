"""Where a program's own tokens lie, and which tokens of the other side they see."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgrad_compiler.codegen.triton.kernels.helpers import load_tokens
from fastgrad_compiler.codegen.triton.kernels.specification import CAUSAL, NEAR, PADDING, TOTAL


@triton.jit
def query_tile(queries, keys, chunk, chunks, ROWS: tl.constexpr):
    """Of a program's queries: the first, the end, the row of heads, the chunk; the keys [low, high) met one by one."""
    program = tl.program_id(0)
    if TOTAL:
        tiles = tl.cdiv(queries, ROWS)
        first, row = program % tiles * ROWS, program // tiles
        c, low, high = 0, 0, 0
        limit = queries
    else:
        tiles = tl.cdiv(chunk, ROWS)
        c, row = program // tiles % chunks, program // tiles // chunks
        first, limit = c * chunk + program % tiles * ROWS, tl.minimum((c + 1) * chunk, queries)
        low = tl.maximum(c * chunk - NEAR, 0)
        high = tl.minimum(first + ROWS, limit) if CAUSAL else tl.minimum((c + 1) * chunk + NEAR, keys)
    return first, limit, row, c, low, high


@triton.jit
def key_tile(queries, keys, chunk, chunks, ROWS: tl.constexpr):
    """Of a program's keys: the first, the end, the row of heads, the chunk; the queries [low, high) met one by one."""
    program = tl.program_id(0)
    if TOTAL:
        tiles = tl.cdiv(keys, ROWS)
        first, row = program % tiles * ROWS, program // tiles
        c, low, high = 0, 0, 0
        limit = keys
    else:
        tiles = tl.cdiv(chunk, ROWS)
        c, row = program // tiles % chunks, program // tiles // chunks
        first, limit = c * chunk + program % tiles * ROWS, tl.minimum((c + 1) * chunk, keys)
        low = first if CAUSAL else tl.maximum(c * chunk - NEAR, 0)
        high = tl.minimum((c + 1) * chunk + NEAR, queries)
    return first, limit, row, c, low, high


@triton.jit
def seen_keys(query, start, high, MASK, mask_row, KEYS: tl.constexpr):
    """Which of the keys [start : start + KEYS] each query sees, [query, key]. mask_row: where MASK begins for them."""
    key = start + tl.arange(0, KEYS)
    seen = key[None, :] < high
    if CAUSAL:
        seen &= key[None, :] <= query[:, None]
    if PADDING:
        seen &= (load_tokens(MASK + mask_row, start, high, 0, KEYS) != 0)[None, :]
    return seen


@triton.jit
def seen_by(query, key, high, limit):
    """Which queries below `high` see which keys below `limit`, [key, query], whatever the mask says."""
    seen = (query[None, :] < high) & (key[:, None] < limit)
    if CAUSAL:
        seen &= key[:, None] <= query[None, :]
    return seen


@triton.jit
def in_near_blocks(query, key):
    """Whether the blocks of the near field that a query and a key are of are one or touch."""
    apart = query // NEAR - key // NEAR
    return (apart if CAUSAL else tl.abs(apart)) <= 1
