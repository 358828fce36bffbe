# mypy: allow-untyped-defs, allow-incomplete-defs
"""Tiny kernels, each of which shows one thing, for the tests of the interpreter and of ahead-of-time compilation."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, WIDTH: tl.constexpr):
    """out = x + y"""
    i = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.load(x + i, mask=i < n, other=0.0) + tl.load(y + i, mask=i < n, other=0.0)
    tl.store(out + i, total, mask=i < n)


@triton.jit
def chain_kernel(x, y, out, WIDTH: tl.constexpr):
    """(2 x y + y) / x - x/2 or, where that is less than y, the larger of x and y"""
    i = tl.arange(0, WIDTH)
    a, b = tl.load(x + i), tl.load(y + i)
    value = ((2 * a * b + b) / a).to(a.dtype) - 0.5 * a  # a quotient of halves is float32
    tl.store(out + i, tl.where((value < b) & (a == a), tl.maximum(a, b).to(a.dtype), value))


@triton.jit
def reduce_kernel(x, sums, largest, running, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums and maxima of the rows of x, and its cumulative sums along them"""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    place = rows[:, None] * COLUMNS + columns[None, :]
    tile = tl.load(x + place)
    tl.store(sums + rows, tl.sum(tile, axis=1))
    tl.store(largest + rows, tl.max(tile, axis=1))
    tl.store(running + place, tl.cumsum(tile, axis=1))


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr):
    """out = a b, of SIZE x INNER and INNER x SIZE"""
    i, k = tl.arange(0, SIZE), tl.arange(0, INNER)
    left = tl.load(a + i[:, None] * INNER + k[None, :])
    right = tl.load(b + k[:, None] * SIZE + i[None, :])
    tl.store(out + i[:, None] * SIZE + i[None, :], tl.dot(left, right, input_precision=PRECISION))


@triton.jit
def registers_kernel(x, out, n, SIZE: tl.constexpr):
    """A sum over n tiles, each times the first: with a large SIZE more than the registers hold"""
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    first = tl.load(x + place)
    total = first
    for tile in range(1, n):
        total += tl.exp(tl.load(x + tile * SIZE * SIZE + place) * first)
    tl.store(out + place, total * first)


@triton.jit
def shifted_kernel(x, out, n, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """out_i = x_(i + SHIFT) for i < n, which leaves x unless it is longer"""
    i = tl.arange(0, WIDTH)
    tl.store(out + i, tl.load(x + i + SHIFT, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def same_place_kernel(out, STRIDE: tl.constexpr):
    """Program p writes p to element p STRIDE"""
    program = tl.program_id(0)
    tl.store(out + program * STRIDE, program.to(tl.float32))


@triton.jit
def neighbour_kernel(x, start, SHIFT: tl.constexpr):
    """x_i = x_(i + SHIFT) + 1 for i = start + p by program p"""
    i = start + tl.program_id(0)
    tl.store(x + i, tl.load(x + i + SHIFT) + 1)


@triton.jit
def last_kernel(x):
    """All programs read x_0, and the last of three writes it"""
    value = tl.load(x)
    if tl.program_id(0) == 2:
        tl.store(x, value + 1)


@triton.jit
def lanes_kernel(out, WIDTH: tl.constexpr):
    """Lane i writes i to the element i // 2"""
    i = tl.arange(0, WIDTH)
    tl.store(out + i // 2, i.to(tl.float32))


@triton.jit
def reread_kernel(x, out, BARRIER: tl.constexpr, WIDTH: tl.constexpr):
    """Writes x backwards to out, and doubles out in place"""
    i = tl.arange(0, WIDTH)
    tl.store(out + i, tl.load(x + WIDTH - 1 - i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + i, 2 * tl.load(out + i))


@triton.jit
def masked_kernel(x, out, n, FILL: tl.constexpr, WIDTH: tl.constexpr):
    """out = (the sum of the first n elements of x, the largest of them); without FILL the others are undefined"""
    i = tl.arange(0, WIDTH)
    values = tl.load(x + i, mask=i < n, other=0.0 if FILL else None)
    tl.store(out, tl.sum(values, axis=0))
    tl.store(out + 1, tl.max(values, axis=0))


@triton.jit
def masked_index_kernel(x, index, out, n, WIDTH: tl.constexpr):
    """out_i = x at index_i, where the index of lanes from n on is undefined"""
    i = tl.arange(0, WIDTH)
    tl.store(out + i, tl.load(x + tl.load(index + i, mask=i < n)))


@triton.jit
def atomic_kernel(x, out):
    """out += x_p by program p"""
    tl.atomic_add(out, tl.load(x + tl.program_id(0)))


@triton.jit
def _atomic(out, value):
    tl.atomic_add(out, value)


@triton.jit
def nested_atomic_kernel(x, out):
    """As atomic_kernel, in a function of its own"""
    _atomic(out, tl.load(x + tl.program_id(0)))


@triton.jit
def optional_kernel(x, bias, out, WIDTH: tl.constexpr):
    """out = x, plus bias where there is one"""
    i = tl.arange(0, WIDTH)
    value = tl.load(x + i)
    if bias is not None:
        value += tl.load(bias + i).to(value.dtype)
    tl.store(out + i, value)
