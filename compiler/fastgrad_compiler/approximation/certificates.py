"""What is proved about one attention whose exp is replaced by a polynomial (docs/mathematics.md, section 7).

The inputs are exact and the same both ways, and every logit (of a far pair, where there is a near field) lies
in the range for which `eps` and `eps_prime` hold. f are the attention weights of a row, O the output, dO the
upstream gradient; a tilde marks the polynomial way. There is no certificate where eps >= 1, since then
weights may vanish: the bounds are infinite.

Those bounds are of real arithmetic. What rounding adds (`rounding.py`; section 10) is relative to the size of the
values and not to their range, since numerators and denominators are rounded apart: it is a second term of each bound,
a share of

    V_i = max_j |v_j| of a column              of |O^ - O~| in that column
    sum_i ||dO_i||                             of sum_j ||dV^_j - dV~_j||
    A_i = max_j sum_c |dO_ic v_jc|             of ||dS^_i - dS~_i||_1, and so of dQ and dK

With largest_key = max_j ||k_j||, and q with the scale of the logits folded in, ||dQ~_i - dQ_i|| is at most the bound of
||dS~_i - dS_i||_1 times largest_key, and sum_j ||dK~_j - dK_j|| at most the sum over i of it times ||q_i||.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

from fastgrad_compiler.approximation.rounding import EXACT, Rounding


@dataclass(frozen=True, slots=True)
class Certificate:
    """Worst cases that need no data, each relative to a size that the data has.

    Args:
        weights: eta, bound of ||f~ - f||_1 for each row; sharp.
        output: bound of |O~ - O| in each column, as a share of the range max_j v_j - min_j v_j of that
            column.
        value_gradient: bound of sum_j ||dV~_j - dV_j||, as a share of sum_i ||dO_i||.
        score_gradient: bound of ||dS~_i - dS_i||_1, as a share of omega_i = max_j dO_i.v_j - min_j dO_i.v_j.
        output_rounding: what rounding adds to the output, as a share of max_j |v_j| of a column.
        value_rounding: what it adds to the values' gradients, as a share of sum_i ||dO_i||.
        score_rounding: what it adds to those of scores, as a share of A_i = max_j sum_c |dO_ic v_jc|.
    """

    weights: float
    output: float
    value_gradient: float
    score_gradient: float
    output_rounding: float = 0.0
    value_rounding: float = 0.0
    score_rounding: float = 0.0

    @property
    def whole_output(self) -> float:
        """Both terms of the output's bound added up, each a share of its own size."""
        return self.output + self.output_rounding

    @property
    def whole_gradient(self) -> float:
        """Both terms of the score gradient's bound added up, each a share of its own size."""
        return self.score_gradient + self.score_rounding


def certificate(eps: float, eps_prime: float, rounding: Rounding = EXACT) -> Certificate:
    """The worst cases of a polynomial with these errors, evaluated with this rounding."""
    return Certificate(
        weights=eta(eps),
        output=eta(eps) / 2,
        value_gradient=eta(eps),
        score_gradient=score_factor(eps, eps_prime),
        output_rounding=output_rounding(eps, rounding),
        value_rounding=value_gradient_rounding(eps, rounding),
        score_rounding=score_gradient_rounding(eps, eps_prime, rounding),
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


# ---------------------------------------------------------------- what rounding adds


def output_rounding(eps: float, rounding: Rounding) -> float:
    """Bound of |O^ - O~| in a column, as a share of its largest |v_j| over the keys that the row may see.

    2 delta / (1 - eps - delta), delta = rounding.weights, and the division and the storing of the result.
    """
    summed = _relative(eps, rounding)
    stored = rounding.stored + rounding.products
    return summed + stored * (1 + summed) if summed < inf else inf


def value_gradient_rounding(eps: float, rounding: Rounding) -> float:
    """Bound of sum_j ||dV^_j - dV~_j||, as a share of sum_i ||dO_i||."""
    summed = _relative(eps, rounding)
    stored = rounding.stored + rounding.products
    return summed + stored * (1 + eta(eps) + summed) if summed < inf else inf


def score_gradient_rounding(eps: float, eps_prime: float, rounding: Rounding) -> float:
    """Bound of ||dS^_i - dS~_i||_1, as a share of A_i = max_j sum_c |dO_ic v_jc|; of dQ and dK in the same way.

    From the ways through p', from O and D as the forward pass left them, and from storing the gradients.
    """
    summed = _relative(eps, rounding)
    if summed == inf or rounding.slopes == inf:
        return inf
    room = 1 - eps - rounding.weights
    product = output_rounding(eps, rounding) + rounding.products  # of dO.O, a share of A_i
    ways = rounding.slopes * (2 + product) / room
    saved = (1 + eps_prime) / room * (product + 2 * rounding.weights / (1 - eps))
    found = ways + saved
    return found + rounding.stored * (2 + 2 * score_factor(eps, eps_prime) + found)


def _relative(eps: float, rounding: Rounding) -> float:
    """2 delta / (1 - eps - delta): of a quotient whose two sums are off by delta of what exp gives."""
    delta = rounding.weights
    return 2 * delta / (1 - eps - delta) if eps + delta < 1 else inf
