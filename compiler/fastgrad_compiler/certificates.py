"""What is proved about one attention whose exp is replaced by a polynomial (docs/mathematics.md, section 7).

The inputs are exact and the same both ways, and every logit (of a far pair, where there is a near field) lies
in the range for which `eps` and `eps_prime` hold. f are the attention weights of a row, O the output, dO the
upstream gradient; a tilde marks the polynomial way. There is no certificate where eps >= 1, since then
weights may vanish: the bounds are infinite.

`eps` and `eps_prime` are floats; other arguments may be floats, numpy arrays or tensors, and results are the
same kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import Protocol, Self, TypeVar


class Scalable(Protocol):
    """What a factor can multiply: a float, a numpy array, a torch tensor."""

    def __mul__(self, factor: float, /) -> Self: ...


_Size = TypeVar("_Size", bound=Scalable)


@dataclass(frozen=True, slots=True)
class Certificate:
    """Worst cases that need no data, each relative to a size that the data has.

    Args:
        weights: eta, bound of ||f~ - f||_1 for each row; sharp.
        output: bound of |O~ - O| in each column, as a share of the range max_j v_j - min_j v_j of that
            column.
        value_gradient: bound of sum_j ||dV~_j - dV_j||, as a share of sum_i ||dO_i||.
        score_gradient: bound of ||dS~_i - dS_i||_1, as a share of omega_i = max_j dO_i.v_j - min_j dO_i.v_j.
    """

    weights: float
    output: float
    value_gradient: float
    score_gradient: float


def certificate(eps: float, eps_prime: float) -> Certificate:
    """The worst cases of a polynomial with these errors."""
    return Certificate(
        weights=eta(eps),
        output=eta(eps) / 2,
        value_gradient=eta(eps),
        score_gradient=score_factor(eps, eps_prime),
    )


def eta(eps: float) -> float:
    """Bound of ||f~ - f||_1 for each row: 2 eps / (1 + sqrt(1 - eps^2)), about eps.

    It is reached where the weights off by 1 + eps and those off by 1 - eps share the row in the worst
    proportion.
    """
    if eps < 0:
        raise ValueError(f"an error bound cannot be negative: {eps}")
    return 2 * eps / (1 + sqrt(1 - eps * eps)) if eps < 1 else inf


def score_factor(eps: float, eps_prime: float) -> float:
    """Bound of ||dS~_i - dS_i||_1 as a share of omega_i.

    (eps + eps') / (1 - eps) for the derivative's own error, eta/2 (1 + eps') / (1 - eps) for the row mean's.
    """
    if eps_prime < 0:
        raise ValueError(f"an error bound cannot be negative: {eps_prime}")
    if eps >= 1:
        return inf
    return (eps + eps_prime + eta(eps) / 2 * (1 + eps_prime)) / (1 - eps)


def output_bound(eps: float, value_range: _Size) -> _Size:
    """Bound of |O~ - O| per column.

    Args:
        eps: of the polynomial.
        value_range: max_j v_j - min_j v_j of each column, over the keys that the row may see.
    """
    return value_range * (eta(eps) / 2)


def value_gradient_bound(eps: float, upstream: _Size) -> _Size:
    """Bound of sum_j ||dV~_j - dV_j||, given upstream = sum_i ||dO_i||."""
    return upstream * (eta(eps))


def score_gradient_bound(eps: float, eps_prime: float, omega: _Size) -> _Size:
    """Bound of ||dS~_i - dS_i||_1, given omega_i = max_j dO_i.v_j - min_j dO_i.v_j over the keys of row i."""
    return omega * (score_factor(eps, eps_prime))


def query_gradient_bound(eps: float, eps_prime: float, omega: _Size, largest_key: float) -> _Size:
    """Bound of ||dQ~_i - dQ_i||, given largest_key = max_j ||k_j||; q has the logits' scale folded in."""
    return omega * (score_factor(eps, eps_prime) * largest_key)


def key_gradient_bound(eps: float, eps_prime: float, weighted: _Size) -> _Size:
    """Bound of sum_j ||dK~_j - dK_j||, given weighted = sum_i omega_i ||q_i||."""
    return weighted * (score_factor(eps, eps_prime))
