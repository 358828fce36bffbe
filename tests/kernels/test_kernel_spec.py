"""Which polynomials may round the operands of their products to bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.polynomial import Polynomial

from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.runtime.kernel_spec import MOST_AMPLIFIED, KernelSpec, rounds_operands

ROUNDED = {
    "squares": (0.0, 0.0, 1.0),
    "even powers": (0.5, 0.0, 1.0, 0.0, 2.0),
    "Taylor": (1.0, 1.0, 0.5),
    "another scale": (7.0, 70.0, 350.0),
    "balanced, R = 1": fit("balanced", 2, 1.0).coefficients,
}
NOT_ROUNDED = {
    "linear": (1.0, 1.0),
    "cubic": (1.0, 1.0, 0.5, 0.17),
    "nearly a square": (1.0, 1.9, 1.0),
    "negative": (1.0, 0.0, -0.1),
    "balanced, R = 2": fit("balanced", 2, 2.0).coefficients,
}


@pytest.mark.parametrize("name", [*ROUNDED, *NOT_ROUNDED])
def test_terms_of_one_size(name: str) -> None:
    coefficients = (ROUNDED | NOT_ROUNDED)[name]
    spec = KernelSpec(4, 4, coefficients)
    assert rounds_operands(spec) == (name in ROUNDED)
    s = np.linspace(-30, 30, 60_001)
    values = Polynomial(coefficients)(s)
    terms = Polynomial([abs(c) for c in coefficients])(abs(s))
    seen = np.max(terms[1:] / np.maximum(values[1:], 1e-9))
    assert (seen <= MOST_AMPLIFIED) == (name in ROUNDED)


def test_not_where_float64_is_wanted_or_without_a_need() -> None:
    assert not rounds_operands(KernelSpec(4, 4, (1.0, 1.0, 0.5), precision="float64"))
    assert rounds_operands(KernelSpec(4, 4, (), window=8))  # a softmax: every weight is one term
