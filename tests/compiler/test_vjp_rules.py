"""Each vector-Jacobian product alone, against central differences of docs/operations.md in numpy, and at kinks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.passes.backward import DECLINED, VJP
from fastgrad_compiler.reference.interpret import run_gradient
from tests.compiler.gradients import derive
from tests.compiler.reference import REFERENCE, Array, reference
from tests.compiler.rule_cases import CASES, Case

ELSEWHERE = {"item", "call", "repeat", "poly_attention"}  # test_backward.py and test_lowrank.py
STEP = 1e-6  # of central differences: their error is about its square, and 1e-16 over it


def drawn(case: Case, sizes: dict[str, int], rng: np.random.Generator) -> list[Array]:
    """Floats at least 0.3 from 0, where many operations have a kink or a pole."""
    found: list[Array] = []
    for node in case.graph.inputs:
        shape = tuple(dim.evaluate(sizes) for dim in node.tensor.shape)
        if node.tensor.dtype == "float":
            signs = 1.0 if case.positive else rng.choice([-1.0, 1.0], shape)
            found.append(np.asarray(signs * (0.3 + np.abs(rng.normal(size=shape)))))
        elif node.tensor.dtype == "int":
            limit = sizes[case.ids] if isinstance(case.ids, str) else case.ids
            found.append(np.asarray(rng.integers(0, limit, shape) if limit else rng.integers(1, 4, shape)))
        else:
            found.append(np.asarray(rng.random(shape) < 0.7))
    return found


def gradient(case: Case, inputs: list[Array], cotangent: Array) -> dict[str, Array]:
    """What the gradient graph gives for the float inputs, by name."""
    program = derive(case.program)
    tensors = [torch.from_numpy(x) for x in inputs]
    found, _ = run_gradient(program, tensors, {}, [torch.from_numpy(cotangent)])
    return {name: x.numpy() for name, x in found.items()}


def differences(function: Callable[[], Array], x: Array, cotangent: Array) -> Array:
    """Central differences of sum(cotangent * y) by each entry of x, which is put back."""
    result = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        here = x[place]
        ends = []
        for step in (STEP, -STEP):
            x[place] = here + step
            y = function()
            ends.append(float((cotangent * y)[np.isfinite(y)].sum()))  # not what a mask hides
        x[place] = here
        result[place] = (ends[0] - ends[1]) / (2 * STEP)
    return result


def differentiable(op: str) -> list[Case]:
    """The cases of an operation with a float result that depends on a float input."""
    floats = [case for case in CASES[op] if case.node.tensor.dtype == "float"]
    return [case for case in floats if any(type_.startswith("float") for type_ in case.types)]


@pytest.mark.parametrize("op", sorted(VJP.keys() - ELSEWHERE))
def test_rule_agrees_with_central_differences(op: str) -> None:
    cases = differentiable(op)
    assert cases
    for case in cases:
        rng = np.random.default_rng(zlib.crc32(str(case).encode()))
        for n in (2,) if case.even else (2, 3):
            sizes = {"b": 2, "n": n, "m": 3}
            inputs, names = drawn(case, sizes, rng), [node.name for node in case.graph.inputs]
            values = case.values(sizes)

            def y() -> Array:
                read = [inputs[names.index(name)] for name in case.node.inputs]  # noqa: B023
                return reference(op, read, values)  # noqa: B023

            cotangent = rng.normal(size=y().shape)
            found = gradient(case, inputs, cotangent)
            for name, x in zip(names, inputs, strict=True):
                if x.dtype == np.float64:
                    expected = differences(y, x, cotangent)
                    assert found[name].shape == x.shape
                    np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-7, err_msg=str(case))


def test_every_rule_is_tested() -> None:
    assert VJP.keys() - ELSEWHERE <= CASES.keys() & REFERENCE.keys()
    assert VJP.keys() | DECLINED.keys() == OPS.keys()


# ---------------------------------------------------------------- kinks, where there is a convention and no derivative

LOW, V = -math.inf, "float[4]"
KINKS: dict[str, tuple[str, list[float], list[float]]] = {
    "relu gives 0 at 0": ("relu(%a)", [0.0, -0.0, 1.0, -1.0], [0, 0, 1, 0]),
    "abs gives 0 at 0": ("abs(%a)", [0.0, -0.0, 2.0, -2.0], [0, 0, 1, -1]),
    "clamp passes at its limits": ("clamp(%a, high = 1.0, low = -1.0)", [1.0, -1.0, 1.5, -1.5], [1, 1, 0, 0]),
    "amax shares a tie": ("amax(%a, axes = (-1,), keepdim = false)", [3.0, 1.0, 3.0, 3.0], [1 / 3, 0, 1 / 3, 1 / 3]),
    "maximum shares a tie": ("maximum(%a, %a)", [1.0, 2.0, 0.0, -1.0], [1, 1, 1, 1]),
    "sqrt at 0": ("sqrt(%a)", [0.0, 4.0, 1.0, 0.25], [math.inf, 0.25, 0.5, 1]),
    "log at 0": ("log(%a)", [0.0, 4.0, 1.0, 0.25], [math.inf, 0.25, 1, 4]),
    "unit of zeros": ("unit(%a)", [0.0, 0.0, 0.0, 0.0], [1e6] * 4),
    "unit of what is tiny": ("unit(%a)", [1e-8, 0.0, 0.0, 0.0], [1e6] * 4),
    "unit just above": ("unit(%a)", [2e-6, 0.0, 0.0, 0.0], [0, 5e5, 5e5, 5e5]),
    "softmax of hidden keys": ("softmax(%a, axis = -1)", [LOW, LOW, LOW, LOW], [0, 0, 0, 0]),
    "polynomial of what is hidden": (
        "polynomial(%a, coefficients = (1.0, 2.0, 3.0))", [LOW, 0.0, 1.0, LOW], [0, 2, 8, 0]
    ),
    "shares of no weights": ("normalize_rows(%a)", [LOW, 0.0, 0.0, LOW], [0, 1, 1, 0]),
}  # fmt: skip


@pytest.mark.parametrize(("expression", "x", "expected"), KINKS.values(), ids=KINKS.keys())
def test_convention_at_a_kink(expression: str, x: list[float], expected: list[float]) -> None:
    case = Case((V,), expression)
    shape = tuple(dim.evaluate({}) for dim in case.node.tensor.shape)
    found = gradient(case, [np.array(x)], np.ones(shape))["a"]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", ["maximum", "minimum"])
def test_half_of_a_tie_goes_to_each(op: str) -> None:
    case = Case((V, V), f"{op}(%a, %b)")
    same = np.array([1.0, 2.0, -1.0, 0.0])
    found = gradient(case, [same, same.copy()], np.ones(4))
    assert found["a"].tolist() == found["b"].tolist() == [0.5] * 4


def test_weights_that_cancel_are_left_as_they_are() -> None:
    """Nothing was divided, so that nothing but the weight itself moves its share."""
    cotangent = np.array([1.0, 2.0, 3.0, 4.0])
    found = gradient(Case((V,), "normalize_rows(%a)"), [np.array([1.0, -1.0, 2.0, -2.0])], cotangent)
    assert found["a"].tolist() == cotangent.tolist()
