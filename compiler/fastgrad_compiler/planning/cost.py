"""Work of exact and of polynomial attention, and where they break even (docs/mathematics.md, section 4).

Everything is per head and batch element and counts a multiply-add as 2 flops. Only products are counted, as
is usual: exp, the polynomial itself and the features cost one to a few flops an entry and are left out on
both sides. Per query token, with r = rank(d, degree), keys within a chunk or a near block counted densely, as
kernels do them:

    exact, per query and key    forward 2 (d + dv)          backward 2 (3 d + 2 dv)
    dense part, per key in it   forward 2 (d + dv + 1)      backward 2 (3 d + 2 (dv + 1))
    state part                  forward 4 r (dv + 1)        backward 10 r (dv + 1)

A causal exact kernel visits half of the pairs, and one with a window of w at most w keys a query (causal) or 2 w - 1.
The dense part holds `chunk` keys (causal, or documents), none (no mask), or, with a near field of block w,
2 w (causal) or 3 w (no mask) keys. A near field or documents without a mask need a prefix and a suffix state, so that
their state part is done twice. How long documents are is known at run time only: they are taken to be as long
as the sequence, of which exact attention visits less.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from fastgrad_compiler.approximation.features import rank
from fastgrad_compiler.planning.roofline import modelled_break_even
from fastgrad_compiler.runtime.triton_schedule import LARGEST_D, LARGEST_DV


@dataclass(frozen=True, slots=True)
class Pace:
    """A target's kernels beside PyTorch's fused exact attention on the same CPU.

    Args:
        speed: flops of polynomial attention in the time of one flop of exact attention at great lengths.
        keys: exact attention takes the time of so many keys more than there are: it is slower at short lengths.
        device: the architecture of a GPU whose model says where the kernels break even; "" for none.
    """

    speed: float
    keys: int
    device: str = ""

    def at(self, precision: str) -> Pace:
        """That of a polynomial computed in float64: half as many numbers in a vector, by PyTorch's kernels on a GPU."""
        return Pace(self.speed * DOUBLE, self.keys) if precision == "float64" else self


DOUBLE = 0.5  # speed of float64 beside float32
EQUAL = Pace(1.0, 0)  # flops are compared as they are
NATIVE = Pace(
    1.8, 500
)  # measured, rounded (docs/performance.md): 300 and 162 GFLOP/s, half of which at 500 keys
GPU = Pace(1.0, 0, "sm_90")  # modelled, not measured
PACE = {"torch": EQUAL, "cpp": NATIVE, "triton": GPU, "auto": NATIVE}
"""Of the device that a target is for: a CPU, for `auto` too."""

ON_GPU = {"torch": EQUAL, "cpp": EQUAL, "triton": GPU, "auto": GPU}
"""Of the same models on a GPU, where PyTorch serves what Triton does not."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of one attention, per head and batch element."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class Cost:
    """What one attention costs both ways, per head and batch element.

    Args:
        rank: r of the polynomial way.
        polynomial, exact: flops at the length asked for.
        break_even: least length from which the polynomial way takes no more flops than the exact one.
        state_bytes: of one running state, r x (dv + 1), in float32.
    """

    rank: int
    polynomial: Flops
    exact: Flops
    break_even: int
    state_bytes: int


def cost(
    *,
    n: int,
    m: int | None = None,
    d: int,
    dv: int,
    degree: int,
    chunk: int = 64,
    near: int | None = None,
    causal: bool = True,
) -> Cost:
    """Both ways side by side; arguments as for `flops`."""
    return Cost(
        rank=rank(d, degree),
        polynomial=flops(n=n, m=m, d=d, dv=dv, degree=degree, chunk=chunk, near=near, causal=causal),
        exact=flops(n=n, m=m, d=d, dv=dv, degree=None, causal=causal),
        break_even=break_even(d=d, dv=dv, degree=degree, chunk=chunk, near=near, causal=causal),
        state_bytes=state_bytes(d=d, dv=dv, degree=degree),
    )


def flops(
    *,
    n: int,
    m: int | None = None,
    d: int,
    dv: int,
    degree: int | None,
    chunk: int = 64,
    near: int | None = None,
    causal: bool = True,
    documents: bool = False,
    window: int | None = None,
) -> Flops:
    """Flops of one attention.

    Args:
        n: number of queries, at least 1.
        m: number of keys, at least 1; None means n, and causal attention takes nothing else.
        d: head dimension of queries and keys.
        dv: head dimension of values.
        degree: of the polynomial; None is exact attention, to which chunk, near and documents make no difference.
        chunk: tokens that a causal kernel handles densely at a time.
        near: block size of the near field, None without one.
        causal: whether a query sees only the keys up to its own place.
        documents: whether a query sees only keys of its own document.
        window: of exact attention, keys less than so many places away; None: all.

    Raises:
        ValueError: causal with m other than n, a size below 1, or a polynomial with a window.
    """
    keys = n if m is None else m
    if causal and keys != n:
        raise ValueError(f"causal attention needs as many keys as queries, not {keys} for {n}")
    if min(n, keys, d, dv, chunk, *(size for size in (near, window) if size is not None)) < 1:
        raise ValueError("n, m, d, dv, chunk, near and window must be at least 1")
    if degree is None:
        work = _exact_work(n, keys, causal, window)
        return Flops(work * (d + dv), work * (3 * d + 2 * dv))
    if window is not None:
        raise ValueError("no polynomial serves a window")
    dense = 2 * n * min(_dense_keys(chunk, near, causal, documents), keys)
    state = rank(d, degree) * (dv + 1) * _scans(near, causal, documents)
    # Forward: every key is added to the state and every query reads it. Backward: keys are added and queries
    # read again for dQ; then queries are added, and every key reads twice, for dV and dK.
    return Flops(
        forward=2 * state * (n + keys) + dense * (d + dv + 1),
        backward=state * (4 * n + 6 * keys) + dense * (3 * d + 2 * (dv + 1)),
    )


def break_even(
    *,
    d: int,
    dv: int,
    degree: int,
    chunk: int = 64,
    near: int | None = None,
    causal: bool = True,
    documents: bool = False,
    pace: Pace = EQUAL,
) -> int:
    """Least n, with as many keys, from which forward and backward take no longer than exact ones.

    pace: of the target and device; EQUAL compares flops. One with a `device` asks that architecture's model, for what
    its kernels serve (LARGEST_D, LARGEST_DV, no documents). Without a dense part it is, in flops,
    14 r (dv + 1) / (4 d + 3 dv) for a causal attention, and half that for one without a mask.
    """
    if pace.device and not documents and d <= LARGEST_D and dv <= LARGEST_DV:
        return modelled_break_even(pace.device, d=d, dv=dv, degree=degree, causal=causal, near=near or 0)
    exact = (1 if causal else 2) * (4 * d + 3 * dv)  # flops per query and key
    state = 14 * rank(d, degree) * (dv + 1) * _scans(near, causal, documents)
    dense = 2 * _dense_keys(chunk, near, causal, documents) * (4 * d + 3 * (dv + 1))
    # A dense part larger than n would be cut to n, but is never met: its keys alone cost more than exact
    # ones.
    return max(1, ceil((state + dense) / (exact * pace.speed)) - pace.keys)


def state_bytes(*, d: int, dv: int, degree: int, itemsize: int = 4) -> int:
    """Bytes of one running state: rank(d, degree) x (dv + 1) numbers of `itemsize` bytes."""
    return rank(d, degree) * (dv + 1) * itemsize


def _exact_work(n: int, keys: int, causal: bool, window: int | None) -> int:
    """Twice the pairs that are visited; of a causal triangle half of the square."""
    work = n * keys if causal else 2 * n * keys
    return work if window is None else min(work, 2 * n * (window if causal else 2 * window - 1))


def _dense_keys(chunk: int, near: int | None, causal: bool, documents: bool) -> int:
    """How many keys a query meets one by one instead of through the state."""
    if near is not None:
        return (2 if causal else 3) * near
    return chunk if causal or documents else 0


def _scans(near: int | None, causal: bool, documents: bool) -> int:
    return 2 if (near is not None or documents) and not causal else 1
