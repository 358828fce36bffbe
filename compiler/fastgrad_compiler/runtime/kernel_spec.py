"""What an attention kernel is made for: the one specification that the compiler and every backend read.

Plain Python: the compiler needs no torch to make one, and a generated kernel says its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import sqrt

from .monomials import rank

SMALLEST_NEAR_CHUNK = 32
MOST_AMPLIFIED = 16.0  # how many times as large the terms of a weight may be where operands are rounded

EVERY_TOKEN = 2**30  # as a window: more than any sequence has


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """What an attention kernel depends on.

    Args:
        d: width of q and k.
        dv: width of v.
        coefficients: of the polynomial p(s), s = scale * q.k, by ascending power; its degree is at least 1.
        causal: query i sees the keys up to i.
        padding: a key padding mask is an input.
        near: block size w; pairs whose blocks of w tokens are the same or touch weigh exp(t) instead of p(s).
        window: softmax of the pairs with |i - j| < window instead, exactly; then there is no polynomial.
            EVERY_TOKEN: of all pairs that the masks leave.
        forget: gates are an input; they scale the weight of a pair by the product of those after the key, up to the
            query's own. Causal only.
        own: the polynomial is the model's own, so that it weighs pairs in calls shorter than `exact_below` too, which
            visit all pairs one by one; otherwise those weigh exp(s).
        precision: of the arithmetic at least, "float32" or "float64"; inputs and results keep their dtype.
        near_d: width of separate queries and keys for t, already scaled; None: t = scale * q.k.
        scale: of the logits.
        chunk: tokens handled at a time; None: chosen here. The function does not depend on it.
        documents: ids of packed documents are an input; a query sees only keys of its own document.

    Raises:
        ValueError: a width, a block or a chunk below 1, no coefficient beyond the constant, near_d without near, forget
            without causal.
    """

    d: int
    dv: int
    coefficients: tuple[float, ...]
    causal: bool = False
    padding: bool = False
    near: int | None = None
    near_d: int | None = None
    scale: float = 1.0
    chunk: int | None = None
    documents: bool = False
    window: int | None = None
    precision: str = "float32"
    forget: bool = False
    own: bool = False

    def __post_init__(self) -> None:
        sizes = {
            "d": self.d,
            "dv": self.dv,
            "near": self.near,
            "near_d": self.near_d,
            "chunk": self.chunk,
            "window": self.window,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"an attention kernel needs {name} >= 1, not {size}")
        if self.window is not None and (self.coefficients or self.near is not None):
            raise ValueError("an attention kernel with a window has neither a polynomial nor a near field")
        if self.window is None and len(self.coefficients) < 2:
            raise ValueError("an attention kernel needs a polynomial of degree 1 at least")
        if self.precision not in ("float32", "float64"):
            raise ValueError(f"the arithmetic of a kernel is float32 or float64, not {self.precision}")
        if self.forget and not self.causal:
            raise ValueError("forget gates are of causal attention: give `causal` too")
        if self.near_d is not None and self.near is None:
            raise ValueError("near_d is the width of a near field's queries and keys: give `near` too")

    @property
    def reach(self) -> int:
        """The window, 0 where there is none or all pairs are within."""
        return 0 if self.window in (None, EVERY_TOKEN) else self.window

    @property
    def degree(self) -> int:
        """Degree of the polynomial."""
        return len(self.coefficients) - 1

    @property
    def rank(self) -> int:
        """Features of a query or a key: monomials of its components up to the degree; 1 without a polynomial."""
        return rank(self.d, self.degree) if self.coefficients else 1

    @property
    def saves_maximum(self) -> bool:
        """Whether some weights are exponentials, so that a forward pass saves the largest exponent of each row."""
        return self.near is not None or self.window is not None

    @property
    def two_sided(self) -> bool:
        """Whether a query meets keys one by one, and others on both sides of those by a state."""
        return not self.causal and (self.near is not None or self.documents)

    @property
    def total(self) -> bool:
        """Whether one state of all keys serves all queries, which meet none one by one."""
        return not (self.causal or self.near is not None or self.documents or self.window is not None)


def rounds_operands(spec: KernelSpec) -> bool:
    """Whether products may round their operands to bfloat16 where the inputs are, and the processor multiplies such.

    A weight p(s) is a sum of terms whose sizes add up to P(|s|), P with the sizes of the coefficients. Operands that
    are off by 2^-8 put it off by some 2^-8 P(|s|) / p(s), which is 1 for even powers, and at most
    (2 sqrt(c_0 c_2) + c_1) / (2 sqrt(c_0 c_2) - c_1) for degree 2, whatever s is. Beyond that no rounding is allowed.
    """
    if spec.precision != "float32":
        return False
    if min(spec.coefficients, default=0.0) < 0:
        return False
    if not any(spec.coefficients[1::2]):
        return True
    if spec.degree != 2:
        return False
    constant, slope, curvature = spec.coefficients
    even = 2 * sqrt(constant * curvature)
    return even + slope <= MOST_AMPLIFIED * (even - slope)


def choose_chunk(spec: KernelSpec) -> int:
    """Tokens at a time: enough to hide the interpreter behind the products, few enough for cache and triangle.

    In a near field a chunk divides the block size w where a divisor of useful size exists: then a window is near
    throughout, and nothing in it needs the polynomial.
    """
    if spec.chunk is not None:
        return spec.chunk
    chunk = 128 if spec.rank <= 512 else 256
    if spec.near is None:
        return chunk if spec.causal or spec.documents else 256
    divisors = [size for size in range(SMALLEST_NEAR_CHUNK, chunk + 1) if spec.near % size == 0]
    return max(divisors, default=max(1, chunk // spec.near) * spec.near if spec.near < chunk else chunk)


@cache
def folded_coefficients(spec: KernelSpec) -> tuple[float, ...]:
    """Coefficients by powers of q.k: those of p with the scale of the logits folded in; powers are rounded once."""
    powers = (float(Fraction(spec.scale) ** degree) for degree in range(len(spec.coefficients)))
    return tuple(coefficient * power for coefficient, power in zip(spec.coefficients, powers, strict=True))
