"""How kernels cut an attention: tokens at a time, and what Triton kernels serve; rounding depends on it."""

from __future__ import annotations

from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_compiler.runtime.triton_schedule import (
    FUSED_DEGREE,
    FUSED_DV,
    FUSED_RANK,
    LARGEST_D,
    LARGEST_DV,
)
from fastgrad_compiler.runtime.triton_tables import padded_rank

CHUNK = 64  # tokens at a time: scores, features and values of a chunk stay in the caches next to a core
LARGEST_RANK_OF_CHUNK = 4096  # the features of 64 tokens are 1 MiB then: more leave the cache next to a core
LEAST_BLOCK = 16  # a near field of smaller blocks is handled several blocks at a time
LARGEST_RANK = 2**20  # of features whose table takes a second or two to make


def tokens_at_a_time(rank: int) -> int:
    """Tokens in a chunk of a C++ kernel without a near field."""
    return CHUNK if rank <= LARGEST_RANK_OF_CHUNK else CHUNK // 2


def token_chunks(spec: KernelSpec) -> tuple[int, int, int]:
    """Tokens in a block, chunks in a block, most tokens in a chunk; chunks never cross a near field's blocks."""
    chunk = spec.chunk or tokens_at_a_time(spec.rank)
    if spec.near is None:
        return chunk, 1, chunk
    if spec.near < LEAST_BLOCK:
        block = max(1, chunk // spec.near) * spec.near
        return block, 1, block
    pieces = -(-spec.near // chunk)
    return spec.near, pieces, -(-spec.near // pieces)


def has_triton(spec: KernelSpec) -> bool:
    """Whether there are Triton kernels for a specification; PyTorch's code serves the others."""
    widths = max(spec.d, spec.near_d or 0) <= LARGEST_D and spec.dv <= LARGEST_DV
    if spec.window is not None or spec.documents or spec.precision == "float64" or not widths:
        return False
    return rank(spec.d, spec.degree) <= LARGEST_RANK


def is_fused(spec: KernelSpec) -> bool:
    """Whether a program can keep the state of a whole sequence in its registers."""
    rank_fits = padded_rank(spec.d, spec.degree) <= FUSED_RANK
    small = spec.degree <= FUSED_DEGREE and rank_fits and spec.dv <= FUSED_DV
    return small and spec.causal and spec.near is None
