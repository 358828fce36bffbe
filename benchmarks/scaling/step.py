"""Time and memory of a training step on many ranks, on paper: ours beside ring attention and Ulysses.

One sequence of n tokens in P pieces, t = n / P tokens each; weights in parts on all ranks (FSDP); bfloat16, blocks made
again in the backward pass. Every unit and link works at its peak, as in runtime/triton_schedule.py: times are lower
limits for all three alike. Sources of the formulas:

    a message          latency + bytes / bandwidth                                     Hockney 1994
    a collective       latency ceil(log2 P) + bytes / bandwidth, by all links at once    Thakur et al. 2005; nccl-tests
    products           6 N flops a token, and 2 N to make blocks again                  arXiv 2001.08361, 2205.05198
    FSDP               max(a layer's work, its weights' way) in each pass               arXiv 2304.11277
    ring attention     P rotations, each max(work, message), causal work in equal parts arXiv 2310.01889, 2311.09431
    Ulysses            8 all-to-alls a layer of t d numbers, work by heads              arXiv 2309.14509
    attention          kernels of docs/performance.md, and FlashAttention by its rule   planning/roofline.py
    the scan           recursive doubling, a state each round                           Hillis and Steele 1986
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.scaling.constants import (
    BANDWIDTH,
    DOUBLE,
    GPU,
    MATRIX,
    MEMORY,
    NETWORK,
    NETWORK_LATENCY,
    NODE,
    NVLINK,
    NVLINK_LATENCY,
)
from benchmarks.scaling.sizes import Decoder, exchanged_by_all, rounds
from fastgrad_compiler.planning.roofline import best, flash_time, shape_of
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_compiler.runtime.triton_schedule import Shape

OURS, RING, ULYSSES = "ours", "ring attention", "Ulysses"
WAYS = (OURS, RING, ULYSSES)
HALF, SINGLE, DOUBLE_BYTES = 2, 4, 8  # bytes of a number
KEPT_WEIGHTS = 16  # bytes of a weight: itself, its gradient and two moments, in float32
MESSAGES = 5  # of halos: k, its rotary form, v, a gate, and the convolution's
# numbers of a token that a block keeps for its backward pass, over the width: norms, residual, convolution, attention's
# result and its gradient, and four of the hidden width; q, k and v beside
BLOCK_WIDTHS, BLOCK_HIDDEN = 6, 4


@dataclass(frozen=True)
class Step:
    """Seconds of a step and its parts: products with weights, attention, and sending that nothing overlaps."""

    seconds: float
    products: float
    attention: float
    exposed: float


def step(way: str, decoder: Decoder, ranks: int, n: int) -> Step | None:
    """A step of one sequence; None where the way cannot have so many ranks, or ranks have no token."""
    if n < ranks or (way == ULYSSES and decoder.heads % ranks):
        return None
    tokens = math.ceil(n / ranks)
    layer = 2 * decoder.layer_weights(softmax=way != OURS) * tokens / MATRIX.value
    ends = 8 * decoder.root_weights * tokens / MATRIX.value
    attention = _attention(way, decoder, ranks, tokens)
    gathered, scattered = (
        _collective(ranks, decoder.layer_weights(softmax=way != OURS) * size) for size in (HALF, SINGLE)
    )
    forward = layer + attention.forward + attention.forward_sent
    backward = 3 * layer + attention.backward + attention.backward_sent
    passes = max(forward, gathered) + max(backward, gathered + scattered)
    seconds = decoder.layers * passes + ends
    products = 4 * decoder.layers * layer + ends
    work = decoder.layers * (attention.forward + attention.backward)
    return Step(seconds, products, work, max(0.0, seconds - products - work))


# ---------------------------------------------------------------- links


def message(ranks: int, size: float, distance: int = 1) -> float:
    """Seconds of a message of every rank to the one so many places after it: some of them are in another node."""
    if ranks == 1:
        return 0.0
    if ranks <= NODE.value and distance < NODE.value:
        return NVLINK_LATENCY.value + size / NVLINK.value
    return NETWORK_LATENCY.value + size / NETWORK.value


def _collective(ranks: int, size: float) -> float:
    """Gathering `size` bytes from parts on all ranks, or the reverse; between nodes by the links of all their GPUs."""
    if ranks == 1:
        return 0.0
    within = ranks <= NODE.value
    latency = NVLINK_LATENCY.value if within else NETWORK_LATENCY.value
    bandwidth = NVLINK.value if within else min(NVLINK.value, NODE.value * NETWORK.value)
    return latency * rounds(ranks) + (ranks - 1) / ranks * size / bandwidth


def _all_to_all(ranks: int, size: float) -> float:
    """Each rank sends an equal part of `size` bytes to each, by NVLink and network at once."""
    if ranks == 1:
        return 0.0
    inside = min(ranks, int(NODE.value)) - 1
    outside = ranks - 1 - inside
    part = size / ranks
    near = NVLINK_LATENCY.value + inside * part / NVLINK.value
    far = NETWORK_LATENCY.value + outside * part / NETWORK.value if outside else 0.0
    return max(near, far)


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Passes:
    """Seconds of a layer's attention: forward once, and forward again with backward; what sending adds to each."""

    forward: float
    backward: float
    forward_sent: float
    backward_sent: float


@cache
def _attention(way: str, decoder: Decoder, ranks: int, tokens: int) -> _Passes:
    if way == OURS:
        return _ours(decoder, ranks, tokens)
    if way == RING:
        return _ring(decoder, ranks, tokens)
    heads = decoder.heads // ranks
    forward, both = flash_time(GPU, _softmax(decoder, heads, tokens * ranks))
    sending = 4 * _all_to_all(ranks, HALF * decoder.batch * tokens * decoder.width)
    return _Passes(forward, both, sending, 2 * sending)


def _ours(decoder: Decoder, ranks: int, tokens: int) -> _Passes:
    shape = shape_of(
        heads=decoder.heads * decoder.batch, n=tokens, d=decoder.d, dv=decoder.dv, degree=decoder.degree,
        near=decoder.near, near_d=decoder.d,
    )  # fmt: skip
    kernel = best(GPU, replace(shape, forget=True))
    summed, read = (
        _joined(decoder, tokens, itemsize) if ranks > 1 else 0.0 for itemsize in (SINGLE, DOUBLE_BYTES)
    )
    scan = sum(message(ranks, decoder.state_bytes, 2**k) for k in range(rounds(ranks)))
    halo = decoder.near * decoder.near_numbers + (decoder.convolution - 1) * decoder.width
    size = HALF * decoder.batch * halo
    halos = message(ranks, size) + (MESSAGES - 1) * message(ranks, 0)
    forward = kernel.forward + summed + read
    backward = kernel.total + 3 * (summed + read)
    return _Passes(forward, backward, scan + halos, 2 * (scan + halos))


def _joined(decoder: Decoder, tokens: int, itemsize: int) -> float:
    """The own sums, or reading those of earlier ranks: no kernels yet, but features in memory and a product of them."""
    features = decoder.heads * decoder.batch * tokens * rank(decoder.d, decoder.degree)
    return max(2 * features * (decoder.dv + 1) / DOUBLE.value, 2 * features * itemsize / BANDWIDTH.value)


def _ring(decoder: Decoder, ranks: int, tokens: int) -> _Passes:
    forward, both = flash_time(GPU, _softmax(decoder, decoder.heads, tokens))
    turned = HALF * decoder.batch * 2 * tokens * decoder.width  # keys and values
    once, twice = message(ranks, turned), message(ranks, 2 * turned)  # and their gradients
    back = both - forward
    more = (ranks - 1) * max(0.0, once - forward)
    return _Passes(
        ranks * forward,
        ranks * both,
        more,
        more + (ranks - 1) * max(0.0, twice - back) + message(ranks, turned),
    )


def _softmax(decoder: Decoder, heads: int, n: int) -> Shape:
    return shape_of(heads=heads * decoder.batch, n=n, d=decoder.dv, dv=decoder.dv, degree=1)


def bytes_per_token(way: str, decoder: Decoder, ranks: int, n: int) -> float:
    """That all ranks send for attentions and convolutions in both passes, with blocks made again, over n."""
    if ranks == 1:
        return 0.0
    tokens = n / ranks
    if way == OURS:
        lengths = tuple((n + each) // ranks for each in range(ranks))
        return 1.5 * exchanged_by_all(decoder, lengths, HALF) / n  # forward twice, backward once
    row = HALF * decoder.batch * decoder.width * decoder.layers
    if way == RING:
        return ranks * row * 2 * tokens * (2 * (ranks - 1) + 2 * (ranks - 1) + 1) / n
    return ranks * 12 * row * tokens * (ranks - 1) / ranks / n


# ---------------------------------------------------------------- memory


def memory(way: str, decoder: Decoder, ranks: int, n: int) -> float:
    """Bytes of a rank: weights in parts, two layers whole, a number of each block, one block's values, buffers."""
    layer, tokens = decoder.layer_weights(softmax=way != OURS), n / ranks * decoder.batch
    weights = KEPT_WEIGHTS * decoder.weights(softmax=way != OURS) / ranks
    whole = (2 * HALF + SINGLE) * layer if ranks > 1 else HALF * decoder.weights(softmax=way != OURS)
    return weights + whole + tokens * _token_bytes(way, decoder, ranks) + _fixed_bytes(way, decoder, ranks)


def _token_bytes(way: str, decoder: Decoder, ranks: int) -> float:
    width, keys = decoder.width, decoder.heads * (decoder.d if way == OURS else decoder.dv)
    qkv = 2 * keys + width
    kept = decoder.layers * width
    block = BLOCK_WIDTHS * width + BLOCK_HIDDEN * decoder.hidden + 2 * qkv  # and the gradients of q, k and v
    if way == RING:
        block += 4 * width if ranks > 1 else 0  # keys and values that come and those that are used
    if way == ULYSSES:
        block += 2 * qkv if ranks > 1 else 0  # once by tokens and once by heads
    return HALF * (kept + block) + (_chunk_bytes(decoder) if way == OURS else 0.0)


def _chunk_bytes(decoder: Decoder) -> float:
    """Of the states of the kernels' chunks, by token."""
    shape = shape_of(
        heads=decoder.heads, n=1 << 17, d=decoder.d, dv=decoder.dv, degree=decoder.degree, near=decoder.near,
        near_d=decoder.d,
    )  # fmt: skip
    chunk = best(GPU, shape).chunk
    return 0.0 if chunk is None else decoder.heads * shape.state_bytes / chunk


def _fixed_bytes(way: str, decoder: Decoder, ranks: int) -> float:
    return 3 * decoder.state_bytes if way == OURS and ranks > 1 else 0.0


def largest(way: str, decoder: Decoder, ranks: int, seconds: float = math.inf) -> int | None:
    """The most tokens, a multiple of 1,024 for each rank, that fit into memory and whose step takes no longer."""

    def fits(blocks: int) -> bool:
        n = 1024 * blocks * ranks
        found = None if memory(way, decoder, ranks, n) > MEMORY.value else step(way, decoder, ranks, n)
        return found is not None and found.seconds <= seconds

    if not fits(1):
        return None
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 1024 * low * ranks
