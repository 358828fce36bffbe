"""Which schedule and which chunk the Triton kernels take: bytes and flops on paper, for a device's data sheet.

This is a model, not a measurement. A kernel takes

    max(bytes / bandwidth, matrix flops / their peaks, vector flops / their peak) / min(1, programs / multiprocessors)

so that memory, matrix and vector units overlap perfectly, each at its peak, and a kernel of fewer programs than there
are multiprocessors uses that share of the device. Launches, instruction issue, exp beyond one flop, and the last
wave of programs cost nothing. Kernels run one after another.

Notation as in docs/mathematics.md: d, dv, g = degree, R = rank padded to a multiple of 64, C = chunks of L tokens. In
matrix products d and dv are padded to powers of two of at least 16 (d', dv'); in memory they are not. A multiply-add is
2 flops. Matrix flops of one token, E = 2 R 16 g for its features, x @ E_k, and F = 2 R d' g for J_phi^T:

    state_kernel           2 R dv' + E
    forward_kernel         2 R dv' + E           and of one pair in a chunk  2 (d' + dv')
    query_gradient_kernel  2 R dv' + E + F                                   2 (2 d' + dv')
    key_gradient_kernel    4 R dv' + E + F                                   2 (2 d' + 2 dv')

A near field without a mask has states before and states after: all of it twice. Forget gates add two numbers a token
that every kernel reads, what they do to a pair or to a token's features, and the gradients of their sums; PyTorch's
sums of them before and after the launches are not counted. Pairs are counted in whole tiles, as
kernels visit them. States are R x (dv + 1) numbers in float32. Every tensor is read once by a kernel, but by each
query head of a group anew; where what the tiles of one chunk share does not fit the cache, by each tile anew.

It needs nothing but the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

CHUNKS = (128, 256, 512, 1024, 2048)
FUSED_DEGREE, FUSED_RANK, FUSED_DV = 2, 64, 64  # a larger state spills the registers of one program
LARGEST_D, LARGEST_DV = 64, 128  # that there are kernels for
BLOCK = 16  # components that a factor of a feature is chosen from
SCAN = 1024  # numbers of a state that a program of scan_kernel adds up
FLOAT32 = 4
SUM = 2 * FLOAT32  # bytes of a running sum of gates: two numbers


@dataclass(frozen=True)
class Device:
    """Peaks of one GPU: flops a second, bytes a second, bytes.

    half, tf32, single: matrix flops of operands in bfloat16 or float16, in tf32, and in float32 to float32's accuracy;
    vector: float32 flops of the vector units; bandwidth: of the memory; cache: the last level before it;
    multiprocessors: programs that run side by side at least.
    """

    name: str
    half: float
    tf32: float
    single: float
    vector: float
    bandwidth: float
    cache: int
    multiprocessors: int


# A100: "NVIDIA A100 Tensor Core GPU" data sheet, 80GB SXM (312, 156, 19.5 teraflops without sparsity; 2,039 GB/s).
# H100: "NVIDIA H100 Tensor Core GPU" data sheet, SXM (1,979 and 989 teraflops with sparsity, half without; 67; 3.35
#   TB/s). Cache, multiprocessors and further digits of both: their architecture white papers.
# B200: "NVIDIA HGX B200" and "DGX B200" data sheets, an eighth of 8 GPUs (36 and 18 petaflops with sparsity, half
#   without; 600 teraflops; 64 TB/s; other papers round to 1,100, 80 and 7.7). They name neither multiprocessors nor
#   cache: what the device reports. Only choices of a schedule rest on these.
# MI300X: "AMD Instinct MI300X Accelerator" data sheet (1,307.4 half, 653.7 tf32, 163.4 float32, matrix and vector
#   alike; 5.3 TB/s; 304 compute units; 256 MB of Infinity Cache, which lies before the memory).
DEVICES: dict[str, Device] = {
    "sm_80": Device("A100", 312e12, 156e12, 52e12, 19.5e12, 2.039e12, 40 << 20, 108),
    "sm_90": Device("H100", 989.4e12, 494.7e12, 164.9e12, 66.9e12, 3.35e12, 50 << 20, 132),
    "sm_100": Device("B200", 2250e12, 1125e12, 375e12, 75e12, 8e12, 126 << 20, 148),
    "gfx942": Device("MI300X", 1307.4e12, 653.7e12, 163.4e12, 163.4e12, 5.3e12, 256 << 20, 304),
}
"""By architecture, as Triton names it. `single` of NVIDIA is tf32 / 3, of AMD ieee products of the matrix cores."""


@dataclass(frozen=True)
class Shape:
    """One call, and the kernel that serves it.

    Args:
        heads, key_heads: of queries, and of keys and values, each times batch; the second divides the first.
        n, m: tokens of queries and of keys.
        d, dv: widths of q and k, and of v.
        degree: of the polynomial.
        rank: features of a token, padded to a multiple of 64.
        dtype: "float32", "float16" or "bfloat16", of the inputs.
        causal: query i sees keys up to i.
        near, near_d: tokens of a block of the near field, and the width of its own queries and keys; 0: none.
        forget: there are gates, of which each key head has its own.
    """

    heads: int
    key_heads: int
    n: int
    m: int
    d: int
    dv: int
    degree: int
    rank: int
    dtype: str = "bfloat16"
    causal: bool = True
    near: int = 0
    near_d: int = 0
    forget: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a number of q, k and v."""
        return 4 if self.dtype == "float32" else 2

    @property
    def state_bytes(self) -> int:
        """Of one state, with its denominators."""
        return self.rank * (self.dv + 1) * FLOAT32

    @property
    def single_state(self) -> bool:
        """Whether every query reads the same state: no mask and no near field."""
        return not self.causal and not self.near

    @property
    def main(self) -> int:
        """Matrix flops of a token's features times a state: 2 R dv'."""
        return 2 * self.rank * padded(self.dv)

    @property
    def selections(self) -> int:
        """Matrix flops of making a token's features: E."""
        return 2 * self.rank * BLOCK * self.degree

    @property
    def pull_back(self) -> int:
        """Matrix flops of pulling a gradient back through them: F."""
        return 2 * self.rank * padded(self.d) * self.degree

    @property
    def sides(self) -> int:
        """How many states a token meets: those before and those after it, or one."""
        return 2 if self.near and not self.causal else 1

    @property
    def gate_bytes(self) -> int:
        """Of a token's running sum of gates."""
        return SUM if self.forget else 0

    @property
    def sum_gradient_bytes(self) -> int:
        """Of the gradient of a token's running sum."""
        return FLOAT32 if self.forget else 0

    @property
    def pair_gates(self) -> int:
        """Vector flops that gates add to a pair: a difference of two sums, exp, a product."""
        return 5 if self.forget else 0

    @property
    def products(self) -> int:
        """Vector flops of adding a weight or a feature, times what reached it, to the gradient of a sum of gates."""
        return 2 if self.forget else 0

    @property
    def width(self) -> int:
        """Of the products that give a pair its logits."""
        return padded(self.d) + (padded(self.near_d) if self.near_d else 0)


@dataclass(frozen=True)
class Tiles:
    """Tokens of a program's own, other tokens that it visits at a time, features of a state's program."""

    rows: int = 64
    keys: int = 64
    features: int = 64


TILES = Tiles()


@dataclass(frozen=True)
class Work:
    """What one launch of a kernel moves to and from memory, and computes; programs: that can run side by side.

    pair_flops: of matrix products of pairs in a chunk, in the dtype of q; feature_flops: of features and states.
    """

    kernel: str
    bytes: int
    pair_flops: int
    feature_flops: int
    vector_flops: int
    programs: int

    @property
    def matrix_flops(self) -> int:
        """Of all matrix products."""
        return self.pair_flops + self.feature_flops


def padded(width: int) -> int:
    """Of a matrix product's operand: the next power of two, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def kernel_time(work: Work, device: Device, dtype: str) -> float:
    """Modelled seconds of a launch, by the rule at the top of this file. float16's features and states are tf32."""
    pairs = device.single if dtype == "float32" else device.half
    features = {"float32": device.single, "float16": device.tf32, "bfloat16": device.half}[dtype]
    busy = max(
        work.bytes / device.bandwidth,
        work.pair_flops / pairs + work.feature_flops / features,
        work.vector_flops / device.vector,
    )
    return busy / min(1.0, work.programs / device.multiprocessors)


def dense_pairs(shape: Shape, chunk: int, tiles: Tiles, of_keys: bool = False) -> int:
    """Pairs of one query head that kernels visit one by one, in whole tiles.

    A tile of queries meets the keys of its chunk up to its own end, and with a near field those of one block before,
    and without a mask the whole chunk and a block on each side. `of_keys`: a tile of keys, and its queries.
    """
    if shape.single_state:
        return 0
    own, other = (shape.m, shape.n) if of_keys else (shape.n, shape.m)
    if shape.near:
        starts = range(0, own, chunk)
        inner = len(starts) - 5 if own == other else 0  # those that no end of the sequence cuts, all alike
        edges = [*starts[:2], *starts[-3:]] if inner > 0 else starts
        pairs = [_visited(shape, start, chunk, own, other, tiles, of_keys) for start in edges]
        return sum(pairs) + (
            inner * _visited(shape, starts[2], chunk, own, other, tiles, of_keys) if inner > 0 else 0
        )
    whole, rest = divmod(own, chunk)
    first = _visited(shape, 0, chunk, chunk, chunk, tiles, of_keys)
    return whole * first + (_visited(shape, 0, chunk, rest, rest, tiles, of_keys) if rest else 0)


def _visited(shape: Shape, start: int, chunk: int, own: int, other: int, tiles: Tiles, of_keys: bool) -> int:
    """Pairs of the tiles of one chunk, which begins at token `start`."""
    limit = min(start + chunk, own)
    low, high = max(0, start - shape.near), min(start + chunk + shape.near, other)
    count = -(-(limit - start) // tiles.rows)
    if not shape.causal:
        met = count * -(-max(0, high - low) // tiles.keys)
    elif of_keys:
        count = min(count, -(-max(0, high - start) // tiles.rows))  # the others come after all that see them
        met = _tiles(high - start - (count - 1) * tiles.rows, tiles.rows, count, tiles.keys)
    else:
        met = _tiles(start + tiles.rows - low, tiles.rows, count - 1, tiles.keys) + -(
            -(limit - low) // tiles.keys
        )
    return tiles.rows * tiles.keys * met


def _tiles(first: int, step: int, count: int, size: int) -> int:
    """Tiles of `size` keys that cover `first` keys, `step` more of them, and so on: the sum of `count` such numbers.

    By Euclid's algorithm: in sum over i < n of floor((a i + b) / m) whole multiples are taken out, then i and the
    quotient change places.
    """
    total, n, m, a, b = 0, count, size, step, first + size - 1
    sign = 1
    while n > 0:
        total += sign * (n * (n - 1) // 2 * (a // m) + n * (b // m))
        a, b = a % m, b % m
        top = (a * (n - 1) + b) // m
        if top == 0:
            break
        # pairs (i, j) with j < top, less those with i too small to reach j + 1
        total += sign * n * top
        n, m, a, b, sign = top, a, m, m - b + a - 1, -sign
    return total


def _repeats(shared: int, tiles: int, cache: int) -> int:
    """How often the programs of a chunk read what they share from memory."""
    return 1 if shared <= cache else tiles


def parallel_forward(shape: Shape, chunk: int, tiles: Tiles, cache: int) -> tuple[Work, ...]:
    """state_kernel, scan_kernel, forward_kernel. cache: bytes, of the device."""
    s, g = shape, shape.degree
    pairs = s.heads * dense_pairs(s, chunk, tiles)
    row = (s.d + s.near_d + s.dv) * s.itemsize + s.gate_bytes
    met = s.heads * s.m * row if pairs else 0
    own = s.heads * s.n * (row + FLOAT32 * (2 if s.near else 1))
    forward = Work(
        "forward_kernel",
        own + met + s.heads * _states_read(s, chunk, tiles, cache, s.n),
        pairs * 2 * (s.width + padded(s.dv)),
        s.heads * s.n * (s.main + s.selections) * s.sides,
        s.heads * s.n * s.rank * (g + 1) * s.sides
        + pairs * (2 * g + 1 + (4 if s.near else 0) + s.pair_gates),
        s.heads * math.ceil(s.n / tiles.rows),
    )
    return (*_key_states(s, chunk, tiles, cache), forward)


def parallel_backward(shape: Shape, chunk: int, tiles: Tiles, cache: int) -> tuple[Work, ...]:
    """delta_kernel, states of keys and query_gradient_kernel, states of queries and key_gradient_kernel."""
    s, g = shape, shape.degree
    pairs, met = (s.heads * dense_pairs(s, chunk, tiles, of_keys) for of_keys in (False, True))
    near = (4 if s.near else 0) + s.pair_gates + s.products
    row = (s.d + s.near_d + s.dv) * s.itemsize  # q and dO, or k and v
    gates, sums = s.gate_bytes, s.sum_gradient_bytes
    queries, keys = s.heads * s.n, s.key_heads * s.m
    pull = s.rank * (g * g + 1 + s.products) * s.sides  # features, t times the other factors, denominators
    again = 2 * g if s.forget else 0  # p of pairs, of which dQ needs p' alone
    query = Work(
        "query_gradient_kernel",
        queries * (row + 2 * FLOAT32 + (s.d + s.near_d) * s.itemsize + gates + sums)
        + (s.heads * s.m * (row + gates) if pairs else 0)
        + s.heads * _states_read(s, chunk, tiles, cache, s.n),
        pairs * 2 * (2 * s.width + padded(s.dv)),
        queries * (s.main + s.selections + s.pull_back) * s.sides,
        queries * pull + pairs * (2 * g + near + again),
        s.heads * math.ceil(s.n / tiles.rows),
    )
    key = Work(
        "key_gradient_kernel",
        keys * (2 * row + gates + sums)
        + (queries * (row + 2 * FLOAT32 + gates) if met else 0)
        + s.key_heads * _states_read(s, chunk, tiles, cache, s.m),
        met * 2 * (2 * s.width + 2 * padded(s.dv)),
        keys * (2 * s.main + s.selections + s.pull_back) * s.sides,
        keys * pull + met * (4 * g + near),
        s.key_heads * math.ceil(s.m / tiles.rows),
    )
    states = _query_states(s, chunk, tiles, cache)
    return (_delta(s, tiles), *_key_states(s, chunk, tiles, cache), query, *states, key)


def _states_read(s: Shape, chunk: int, tiles: Tiles, cache: int, tokens: int) -> int:
    """Bytes of states that one head's output programs read: one a chunk, or one in all."""
    states, sharing = (1, tokens) if s.single_state else (math.ceil(tokens / chunk), min(chunk, tokens))
    return s.sides * states * s.state_bytes * _repeats(s.state_bytes, math.ceil(sharing / tiles.rows), cache)


def _key_states(s: Shape, chunk: int, tiles: Tiles, cache: int) -> tuple[Work, ...]:
    row = (s.d + s.dv) * s.itemsize + s.gate_bytes
    return _states(s, chunk, tiles, cache, s.key_heads * s.m, s.m, row)


def _query_states(s: Shape, chunk: int, tiles: Tiles, cache: int) -> tuple[Work, ...]:
    """Of queries and u~, summed over the query heads of a group."""
    row = (s.d + s.dv) * s.itemsize + 2 * FLOAT32 + s.gate_bytes
    return _states(s, chunk, tiles, cache, s.heads * s.n, s.n, row)


def _states(
    s: Shape, chunk: int, tiles: Tiles, cache: int, tokens: int, length: int, row: int
) -> tuple[Work, ...]:
    """tokens: of all heads; length: of the sequence; row: bytes of a token."""
    chunks, blocks = math.ceil(max(s.n, s.m) / chunk), math.ceil(s.rank / tiles.features)
    written = s.key_heads * chunks * s.state_bytes
    tokens = (
        tokens // length * max(0, length - s.near)
    )  # those of the last blocks are near to whoever sees them
    shared = min(chunk, length) * row * (s.heads // s.key_heads)
    state = Work(
        "state_kernel",
        tokens * row * _repeats(shared, blocks, cache) + written,
        0,
        tokens * (s.main + s.selections),
        tokens * s.rank * (s.degree + s.forget),
        s.key_heads * chunks * blocks,
    )
    kept = s.key_heads * s.state_bytes if s.single_state else written
    parts = math.ceil(s.rank * (math.ceil(s.dv / 16) * 16 + 1) / SCAN)
    scan = Work("scan_kernel", written + kept, 0, 0, (2 + s.forget) * written // FLOAT32, s.key_heads * parts)
    return (state, scan) * s.sides


def _delta(s: Shape, tiles: Tiles) -> Work:
    tokens = s.heads * s.n
    moved = tokens * (2 * s.dv * s.itemsize + 2 * FLOAT32)
    return Work("delta_kernel", moved, 0, 0, 3 * tokens * s.dv, s.heads * math.ceil(s.n / tiles.rows))


def fused_forward(shape: Shape, tiles: Tiles) -> tuple[Work, ...]:
    """fused_forward_kernel: a program a key head, whose chunk is its tile, and no state in memory."""
    s, g = shape, shape.degree
    queries, keys = s.heads * s.n, s.key_heads * s.m
    pairs = s.heads * _tile_pairs(s, tiles)
    row = (s.d + s.dv) * s.itemsize + s.gate_bytes
    work = Work(
        "fused_forward_kernel",
        queries * (row + FLOAT32) + keys * row,
        pairs * 2 * (s.width + padded(s.dv)),
        (queries + keys) * (s.main + s.selections),
        (queries + keys) * s.rank * (g + 1 + s.forget) + pairs * (2 * g + 1 + s.pair_gates),
        s.key_heads,
    )
    return (work,)


def fused_backward(shape: Shape, tiles: Tiles) -> tuple[Work, ...]:
    """delta_kernel, fused_query_gradient_kernel and fused_key_gradient_kernel, a program a key head."""
    s, g = shape, shape.degree
    queries, keys = s.heads * s.n, s.key_heads * s.m
    pairs = s.heads * _tile_pairs(s, tiles)
    row = (s.d + s.dv) * s.itemsize
    gates, sums = s.gate_bytes, s.sum_gradient_bytes
    pull, absorbed = s.rank * (g * g + 1 + s.products + s.forget), s.main + s.selections
    of_pairs, absorbing = s.pair_gates + s.products, g + s.forget
    query = Work(
        "fused_query_gradient_kernel",
        queries * (row + 2 * FLOAT32 + s.d * s.itemsize + gates + sums) + keys * (row + gates),
        pairs * 2 * (2 * s.width + padded(s.dv)),
        queries * (s.main + s.selections + s.pull_back) + keys * absorbed,
        queries * pull + keys * s.rank * absorbing + pairs * (2 * g + of_pairs + (2 * g if s.forget else 0)),
        s.key_heads,
    )
    key = Work(
        "fused_key_gradient_kernel",
        keys * (2 * row + gates + sums) + queries * (row + 2 * FLOAT32 + gates),
        pairs * 2 * (2 * s.width + 2 * padded(s.dv)),
        keys * (2 * s.main + s.selections + s.pull_back) + queries * absorbed,
        keys * pull + queries * s.rank * absorbing + pairs * (4 * g + of_pairs),
        s.key_heads,
    )
    return (_delta(s, tiles), query, key)


def _tile_pairs(s: Shape, tiles: Tiles) -> int:
    return math.ceil(s.n / tiles.rows) * tiles.rows**2


def can_fuse(shape: Shape) -> bool:
    """Whether there are fused kernels: degree 2 at most, causal, no near field, a state that fits the registers."""
    s = shape
    small = s.degree <= FUSED_DEGREE and s.rank <= FUSED_RANK and s.dv <= FUSED_DV
    return small and s.causal and not s.near


def works(
    schedule: str, shape: Shape, chunk: int, tiles: Tiles, cache: int
) -> tuple[tuple[Work, ...], tuple[Work, ...]]:
    """The launches of a forward and of a backward pass, in order. schedule: "parallel" or "fused"."""
    if schedule == "fused":
        return fused_forward(shape, tiles), fused_backward(shape, tiles)
    return parallel_forward(shape, chunk, tiles, cache), parallel_backward(shape, chunk, tiles, cache)


def modelled_time(
    device: Device, shape: Shape, schedule: str, chunk: int, tiles: Tiles = TILES, backward: bool = True
) -> float:
    """Modelled seconds of a forward pass, or of both passes."""
    first, second = works(schedule, shape, chunk, tiles, device.cache)
    launches = first + second if backward else first
    return math.fsum(kernel_time(work, device, shape.dtype) for work in launches)


@lru_cache(maxsize=4096)
def choose_chunk(device: Device, shape: Shape, tiles: Tiles = TILES, backward: bool = True) -> int:
    """Tokens of a chunk that take the least modelled time: of CHUNKS, with a near field up to whole blocks of it."""
    lengths = [chunk if not shape.near else shape.near * math.ceil(chunk / shape.near) for chunk in CHUNKS]
    return min(lengths, key=lambda chunk: modelled_time(device, shape, "parallel", chunk, tiles, backward))


@lru_cache(maxsize=4096)
def choose_schedule(device: Device, shape: Shape, tiles: Tiles = TILES, backward: bool = True) -> str:
    """ "parallel", over chunks of the sequence, or "fused", a program a head, whichever takes less modelled time."""
    if not can_fuse(shape):
        return "parallel"
    chunk = choose_chunk(device, shape, tiles, backward)
    times = {
        name: modelled_time(device, shape, name, chunk, tiles, backward) for name in ("parallel", "fused")
    }
    return min(times, key=times.__getitem__)
