"""What attention costs, `seconds(shape, way)`, and the length from which on a polynomial pays.

Three models answer it: flops at the pace of a target (`Pace`, here), the model of a GPU (`roofline.Roofline`) and lines
that were measured on this machine (`fastgrad_dsl.calibration.pace`).

Flops (docs/mathematics.md, section 4) are per head and batch element; a multiply-add is 2. Only products count, as
is usual: exp, the polynomial itself and the features cost one to a few flops an entry and are left out on both sides.
Per query token, with r = rank(d, degree), keys within a chunk or a near block counted densely, as kernels do them:

    exact, per query and key    forward 2 (d + dv)          backward 2 (3 d + 2 dv)
    dense part, per key in it   forward 2 (d + dv + 1)      backward 2 (3 d + 2 (dv + 1))
    state part                  forward 4 r (dv + 1)        backward 10 r (dv + 1)

A polynomial of the model's own may meet all pairs one by one, as exact attention does: then its dense part is all.

A causal exact kernel visits half of the pairs, and one with a window of w at most w keys a query (causal) or 2 w - 1.
The dense part holds `chunk` keys (causal, or documents), none (no mask), or, with a near field of block w,
2 w (causal) or 3 w (no mask) keys. A near field or documents without a mask need a prefix and a suffix state, so that
their state part is done twice. How long documents are is known at run time only: they are taken to be as long
as the sequence, of which exact attention visits less.

Forget gates add no product. A factor of each dense pair, one for all query heads of a key head, and one of each state
and token are a few flops an entry, like exp. They take time all the same, on both sides: with them exact attention
has no fused kernel and runs in blocks, 1.5 to 1.9 times as long, and a polynomial's kernel takes up to 1.1 times as
long in C++ and 1.2 to 1.5 times in PyTorch (measured on a CPU: 4 heads, d = 16, dv = 64, degree 2, n = 2,048). So a
model that compares flops leaves them out, and is careful: a polynomial pays from a shorter length on than it says. One
that was measured counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Generic, Protocol, TypeAlias, TypeVar

from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.runtime.monomials import rank

LEAST_LENGTH = 128  # below it the calls take longer than what they compute, and exact attention is one call
NEVER = 2**40  # a break-even length that no sequence has
DOUBLE = 0.5  # speed of float64 beside float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes and masks of one attention.

    Args:
        n: number of queries, at least 1.
        m: number of keys, at least 1; as many as queries where it is causal.
        d: head dimension of queries and keys.
        dv: head dimension of values.
        heads: query heads times batch; models that compare two ways leave them out.
        causal: whether a query sees only the keys up to its own place.
        near: block size of a near field that has logits of its own, of exact attention too; None without one.
        documents: whether a query sees only keys of its own document.
        forget: whether it has forget gates.
        window: of exact attention, keys less than so many places away; None: all.
    """

    n: int
    m: int
    d: int
    dv: int
    heads: int = 1
    causal: bool = True
    near: int | None = None
    documents: bool = False
    forget: bool = False
    window: int | None = None


def shape_of(attention: Attention, n: int, m: int, d: int, dv: int, heads: int = 1) -> Shape:
    """An attention at a length; arguments as those of `Shape`."""
    mask = attention.mask
    return Shape(
        n=n,
        m=m,
        d=d,
        dv=dv,
        heads=heads,
        causal=mask.causal,
        near=attention.near,
        documents=mask.documents,
        forget=mask.forget,
        window=mask.window,
    )


@dataclass(frozen=True, slots=True)
class Way:
    """How an attention is served.

    Args:
        degree: of the polynomial; None is exact attention, to which the others make no difference.
        near: block size of the near field in which a polynomial is exact, None without one.
        precision: "float32", or "float64" for a polynomial that float32 would round too much.
        chunk: tokens that a causal kernel handles densely at a time.
        dense: without a state, on all pairs.
    """

    degree: int | None = None
    near: int | None = None
    precision: str = "float32"
    chunk: int = 64
    dense: bool = False


EXACT = Way()


class Cost(Protocol):
    """A model of time, a value. `step`: lengths that it tells apart are multiples of it."""

    @property
    def step(self) -> int: ...

    def __hash__(self) -> int: ...

    def seconds(self, shape: Shape, way: Way) -> float:
        """Of forward and backward pass, in a unit that all ways share."""


@cache
def break_even(cost: Cost, shape: Shape, way: Way, other: Way = EXACT, *, least: int = LEAST_LENGTH) -> int:
    """Least n, with as many keys, from which on a way takes no longer than the other; NEVER where there is none.

    n and m of the shape make no difference. It is sought from NEVER downward, so that a way that pays on short
    sequences and not on longer ones does not count, and is a power of two or a multiple of the cost's step; `least` at
    least, a power of two.
    """

    def pays(n: int) -> bool:
        at = replace(shape, n=n, m=n)
        return cost.seconds(at, way) <= cost.seconds(at, other)

    high = NEVER
    if not pays(high):
        return NEVER
    while high > least and pays(high // 2):
        high //= 2
    low = max(high // 2, least)
    while high - low > cost.step:
        middle = (low + high) // (2 * cost.step) * cost.step
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


# ---------------------------------------------------------------- flops


_Count = TypeVar("_Count", int, float)


@dataclass(frozen=True)
class Passes(Generic[_Count]):
    """Floating-point operations of one attention, per head and batch element, or the time of one head."""

    forward: _Count
    backward: _Count

    @property
    def total(self) -> _Count:
        """Forward and backward."""
        return self.forward + self.backward


Flops: TypeAlias = Passes[int]
Time: TypeAlias = Passes[float]


@dataclass(frozen=True, slots=True)
class Pace:
    """A target's kernels beside PyTorch's fused exact attention on the same CPU.

    A second is what exact attention takes for one flop at great lengths.

    Args:
        speed: flops of polynomial attention in the time of one flop of exact attention at great lengths.
        keys: exact attention takes the time of so many keys more than there are: it is slower at short lengths.
        dense: as `speed`, of a polynomial on all pairs, in PyTorch, with as many keys more.
    """

    speed: float
    keys: int
    dense: float = 1.0
    step: ClassVar[int] = 1

    def time(self, shape: Shape, way: Way) -> Time:
        """Of one head; a polynomial in float64 has half as many numbers in a vector."""
        work = flops(shape, way)
        if way.degree is None:
            factor = 1 + self.keys / shape.m
        elif way.dense:
            factor = (1 + self.keys / shape.m) / self.dense
        else:
            factor = 1 / (self.speed * (DOUBLE if way.precision == "float64" else 1.0))
        return Time(work.forward * factor, work.backward * factor)

    def seconds(self, shape: Shape, way: Way) -> float:
        """Of forward and backward pass of one head."""
        return self.time(shape, way).total


EQUAL = Pace(1.0, 0)  # flops are compared as they are
# measured, rounded (docs/performance.md): 300 and 162 GFLOP/s, half of which at 500 keys
# On all pairs 28 GFLOP/s of a core, half of which at 500 keys, where the states of rank 4,845 of PyTorch have 37, and
# those of C++ 57.
NATIVE = Pace(1.8, 500, 0.9)
TORCH = Pace(1.0, 0, 0.8)
PACE = {"torch": TORCH, "cpp": NATIVE, "triton": EQUAL, "auto": NATIVE}
"""By target; that of triton is not measured, and its kernels have a model of their own (`roofline`)."""


def flops(shape: Shape, way: Way = EXACT) -> Flops:
    """Flops of one attention.

    Raises:
        ValueError: causal with m other than n, a size below 1, or a polynomial with a window.
    """
    n, m, d, dv = shape.n, shape.m, shape.d, shape.dv
    near = way.near if shape.near is None else shape.near
    if shape.causal and m != n:
        raise ValueError(f"causal attention needs as many keys as queries, not {m} for {n}")
    if min(n, m, d, dv, way.chunk, *(size for size in (near, shape.window) if size is not None)) < 1:
        raise ValueError("n, m, d, dv, chunk, near and window must be at least 1")
    if way.degree is None:
        work = _exact_work(shape)
        return Flops(work * (d + dv), work * (3 * d + 2 * dv))
    if shape.window is not None:
        raise ValueError("no polynomial serves a window")
    if way.dense:
        work = _exact_work(shape)
        return Flops(work * (d + dv + 1), work * (3 * d + 2 * (dv + 1)))
    two_sided = (near is not None or shape.documents) and not shape.causal
    dense = 2 * n * min(_dense_keys(shape, near, way.chunk), m)
    state = rank(d, way.degree) * (dv + 1) * (2 if two_sided else 1)
    # Forward: every key is added to the state and every query reads it. Backward: keys are added and queries
    # read again for dQ; then queries are added, and every key reads twice, for dV and dK.
    return Flops(
        forward=2 * state * (n + m) + dense * (d + dv + 1),
        backward=state * (4 * n + 6 * m) + dense * (3 * d + 2 * (dv + 1)),
    )


def state_bytes(*, d: int, dv: int, degree: int, itemsize: int = 4) -> int:
    """Bytes of one running state: rank(d, degree) x (dv + 1) numbers of `itemsize` bytes."""
    return rank(d, degree) * (dv + 1) * itemsize


def _exact_work(shape: Shape) -> int:
    """Twice the pairs that are visited; of a causal triangle half of the square."""
    work = shape.n * shape.m * (1 if shape.causal else 2)
    if shape.window is None:
        return work
    return min(work, 2 * shape.n * (shape.window if shape.causal else 2 * shape.window - 1))


def _dense_keys(shape: Shape, near: int | None, chunk: int) -> int:
    """How many keys a query meets one by one instead of through the state."""
    if near is not None:
        return (2 if shape.causal else 3) * near
    return chunk if shape.causal or shape.documents else 0
