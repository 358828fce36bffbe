"""The Triton target's kernels beside FlashAttention, by bytes and flops on paper: a model, not a measurement.

The counts, the devices with their sources and the rule that turns a kernel's work into seconds are those by which
the kernels choose their schedule (runtime/triton_schedule.py). FlashAttention gets the same rule: each kernel at the
peak of whatever limits it, exp for one flop, its keys and values read from memory once. That flatters both, and
FlashAttention somewhat more: at a width of 64, exp takes an H100 about as long as the products do.

FlashAttention's kernels have one width for q, k and v (FlashAttention-2 and PyTorch's backend; FlashAttention-3 for
these shapes), one of WIDTHS: d = 16 and dv = 64 are padded to 64. `padded` counts that, `ideal` what a kernel for
exactly d and dv would do. Forward, per pair: 2 (d + dv) flops; backward 2.5 times that, five products for two. A
causal kernel visits half of the pairs; whole tiles on its diagonal are neglected.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from fastgrad_compiler.approximation.elementary import added
from fastgrad_compiler.planning import cost
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_compiler.runtime.triton_schedule import (
    FLOAT32,
    LARGEST_D,
    LARGEST_DV,
    TILES,
    Device,
    Shape,
    Tiles,
    Work,
    choose_chunk,
    choose_schedule,
    kernel_time,
    modelled_time,
)
from fastgrad_compiler.runtime.triton_tables import TILE, padded_rank

WIDTHS = (32, 64, 96, 128, 192, 256)  # head dimensions of FlashAttention-2's kernels
FLASH_ROWS = 128  # queries of a program
FLASH_VECTOR_FLOPS = 5  # of a pair: scale and subtract, maximum, exp, sum
LARGE_RANK = 10_000  # from which on gaps between features are too few to be worth counting one by one


@dataclass(frozen=True)
class Choice:
    """How one call is served, with the modelled seconds of its passes.

    chunk: tokens; None in the fused schedule, whose chunk is its tile.
    """

    schedule: str
    chunk: int | None
    forward: float
    total: float


def shape_of(
    *,
    heads: int,
    n: int,
    d: int,
    dv: int,
    degree: int,
    key_heads: int | None = None,
    m: int | None = None,
    dtype: str = "bfloat16",
    causal: bool = True,
    near: int = 0,
    near_d: int = 0,
) -> Shape:
    """The shape with the rank of its features, padded. ValueError for sizes that no kernel serves."""
    key_heads, m = heads if key_heads is None else key_heads, n if m is None else m
    if min(heads, key_heads, n, m, d, dv, degree) < 1 or heads % key_heads:
        raise ValueError("sizes must be at least 1, and key_heads must divide heads")
    if causal and m != n:
        raise ValueError(f"causal attention needs as many keys as queries, not {m} for {n}")
    r = rank(d, degree)
    r = padded_rank(d, degree) if r <= LARGE_RANK else ceil(r / TILE) * TILE
    return Shape(heads, key_heads, n, m, d, dv, degree, r, dtype, causal, near, near_d)


def best(device: Device, shape: Shape, tiles: Tiles = TILES) -> Choice:
    """What the kernels choose on a device for a forward and backward pass."""
    schedule = choose_schedule(device, shape, tiles)
    chunk = choose_chunk(device, shape, tiles)
    return timed(device, shape, schedule, chunk, tiles)


def timed(device: Device, shape: Shape, schedule: str, chunk: int, tiles: Tiles = TILES) -> Choice:
    """A schedule with its modelled times."""
    forward, total = (modelled_time(device, shape, schedule, chunk, tiles, both) for both in (False, True))
    return Choice(schedule, None if schedule == "fused" else chunk, forward, total)


def flash_width(d: int, dv: int) -> int:
    """Of FlashAttention's kernel for these widths. ValueError beyond 256."""
    found = next((width for width in WIDTHS if width >= max(d, dv)), None)
    if found is None:
        raise ValueError(f"FlashAttention has no kernel for a width of {max(d, dv)}")
    return found


def flash_works(shape: Shape, *, ideal: bool = False) -> tuple[Work, Work, Work]:
    """FlashAttention's forward kernel, the sums of dO * O, and its backward kernel, on the same shape.

    ideal: by exactly d and dv, instead of the padded width. The near field makes no difference to softmax.
    """
    s = shape
    d, dv = (s.d, s.dv) if ideal else (flash_width(s.d, s.dv),) * 2
    pairs = s.heads * s.n * s.m // (2 if s.causal else 1)
    queries, keys = s.heads * s.n, s.key_heads * s.m
    row = (d + dv) * s.itemsize
    products = 2 * pairs * (d + dv)
    forward = Work(
        "flash forward",
        (queries + keys) * row + queries * FLOAT32,
        products,
        0,
        pairs * FLASH_VECTOR_FLOPS,
        s.heads * ceil(s.n / FLASH_ROWS),
    )
    delta = Work(
        "flash delta",
        queries * (2 * dv * s.itemsize + FLOAT32),
        0,
        0,
        2 * queries * dv,
        s.heads * ceil(s.n / FLASH_ROWS),
    )
    backward = Work(
        "flash backward",
        queries * (row + d * s.itemsize + 2 * FLOAT32) + 2 * keys * row,
        products * 5 // 2,
        0,
        pairs * FLASH_VECTOR_FLOPS,
        s.heads * ceil(s.m / FLASH_ROWS),
    )
    return forward, delta, backward


def flash_time(device: Device, shape: Shape, *, ideal: bool = False) -> tuple[float, float]:
    """Modelled seconds of FlashAttention: the forward pass, and both passes."""
    times = [kernel_time(work, device, shape.dtype) for work in flash_works(shape, ideal=ideal)]
    return times[0], added(times)


DENSE_TILE, DENSE_BUFFERS = 256, 4  # queries at a time, and tensors of their scores that are live
WORK_BYTES = 20 * 2**20  # of runtime/attention_op.py
DENSE_LAUNCHES, LAUNCH = 80, 5e-6  # of a tile in both passes, and seconds of each
# over the numbers of a tensor of scores, both passes: in any case, and for each degree
DENSE_PASSES = (20, 12)


def dense_time(device: Device, shape: Shape) -> float:
    """Modelled seconds of both passes of a polynomial on all pairs, in PyTorch's operations and float32.

    Unlike kernels, operations are so many here that launches count; scores are written and read in memory.
    """
    pairs = shape.heads * shape.n * shape.m // (2 if shape.causal else 1)
    products = 2 * pairs * (4 * shape.d + 3 * (shape.dv + 1))
    passes = DENSE_PASSES[0] + DENSE_PASSES[1] * shape.degree
    held = shape.heads * shape.n * shape.m * DENSE_BUFFERS * FLOAT32
    tiles = max(ceil(shape.n / DENSE_TILE), ceil(held / WORK_BYTES))
    seconds = (
        products / device.vector,
        pairs * passes * FLOAT32 / device.bandwidth,
        tiles * DENSE_LAUNCHES * LAUNCH,
    )
    return added(seconds)


MODEL_HEADS = 64  # times batch: enough to fill a device at any length that matters


@dataclass(frozen=True, slots=True)
class Roofline:
    """The cost of Triton kernels beside FlashAttention on a device (`cost.Cost`), for `heads` times batch.

    ideal: of FlashAttention, as for `flash_works`.
    """

    device: Device
    heads: int = MODEL_HEADS
    dtype: str = "bfloat16"
    ideal: bool = False
    step: ClassVar[int] = TILE

    def serves(self, shape: cost.Shape, way: cost.Way) -> bool:
        """Whether there are such kernels."""
        narrow = shape.d <= LARGEST_D and shape.dv <= LARGEST_DV
        return narrow and not shape.documents and way.precision == "float32"

    def seconds(self, shape: cost.Shape, way: cost.Way) -> float:
        """Modelled seconds of forward and backward pass of all heads. ValueError for sizes that no kernel serves."""
        near = (way.near if shape.near is None else shape.near) or 0
        call = shape_of(
            heads=self.heads,
            n=shape.n,
            m=shape.m,
            d=shape.d,
            dv=shape.dv,
            degree=way.degree or 1,
            dtype=self.dtype,
            causal=shape.causal,
            near=near,
        )
        if way.degree is None:
            return flash_time(self.device, call, ideal=self.ideal)[1]
        if way.dense:
            return dense_time(self.device, call)
        return best(self.device, call).total
