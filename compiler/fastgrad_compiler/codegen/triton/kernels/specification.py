"""The constants that the kernels branch on: `emit_triton` gives each its value, and says the rest of its line."""

from __future__ import annotations

import triton.language as tl

D: tl.constexpr  # width of q and k
DV: tl.constexpr  # width of v
D_LOADED: tl.constexpr  # columns of q and k in memory: D up to a multiple of 8, whose rest is 0
DV_LOADED: tl.constexpr  # columns of v in memory, likewise
BLOCK: tl.constexpr  # components that a tile's factors are chosen from; the least that a product takes
WIDE: tl.constexpr  # D up to a power of 2, at least BLOCK
VALUES: tl.constexpr  # DV up to a power of 2, at least BLOCK
DEGREE: tl.constexpr  # of p
COEFFICIENTS: tl.constexpr  # of p by power of q.k
SLOPE: tl.constexpr  # of p'
TILE: tl.constexpr  # features whose p-th factors are all from one block
RANK: tl.constexpr  # features, with gaps up to a multiple of TILE
STATE_WIDTH: tl.constexpr  # columns of a state: DV up to a multiple of 16
STATE_SIZE: tl.constexpr  # numbers in a state: RANK rows, then a sum of features
CAUSAL: tl.constexpr  # a query sees the keys up to its own place
PADDING: tl.constexpr  # MASK is an input
FORGET: tl.constexpr  # SUMS of the logarithms of gates are an input; CAUSAL
NEAR: tl.constexpr  # block size of the near field, 0 without
SCALE: tl.constexpr  # of the near field's logits, where they are those of q and k
NEAR_D: tl.constexpr  # width of near queries and keys, 0 where they are q and k
NEAR_LOADED: tl.constexpr  # their columns in memory
NEAR_WIDE: tl.constexpr  # NEAR_D up to a power of 2
TOTAL: tl.constexpr  # one state of all keys serves all queries, which meet none one by one
TWO_SIDED: tl.constexpr  # a query sees far keys before its chunk and after it
LIVE_CHUNKS: tl.constexpr  # chunks whose queries with a gradient are counted at a time
SPECIFICATION: str  # a hash of these, for all kernels: Triton 3.2 caches them by text and arguments alone
