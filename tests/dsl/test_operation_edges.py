"""Edges of docs/operations.md on compiled modules: values, gradients on ties and errors, as the document says."""

from __future__ import annotations

from math import inf, isnan, log, nan

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_compiler.reference.interpret import run
from fastgrad_grammar.diagnostics import TfgError
from tests.dsl.models import EXAMPLES, text

LARGEST, LEAST = float(2**63 - 1), -float(2**63)

# the expression, its input (float unless it holds ints only), the type of the result, and what it is
VALUES: dict[str, tuple[str, list[float] | list[int], str, list[float]]] = {
    "int truncates": ("float(int(x))", [2.9, -2.9, 0.5, -0.5], "float[n]", [2, -2, 0, 0]),
    "int of no number": ("float(int(x))", [nan, inf, -inf, 1e30], "float[n]", [0, LARGEST, LEAST, LARGEST]),
    "an int stays one under clamp": ("clamp(x; 0, 2)", [-5, 1, 2, 7], "int[n]", [0, 1, 2, 2]),
    "int and float meet as floats": ("max(x, 0.5) + where(x < 2, x, 0.1)", [0, 1, 2], "float[n]", [0.5, 2, 2.1]),
    "int over int": ("x / 4", [1, 2, -3], "float[n]", [0.25, 0.5, -0.75]),
    "softplus of what is large": ("softplus(x)", [21.0, 39.0, 41.0, -800.0], "float[n]",
                                  [21 + 7.582560427911907e-10, 39.0, 41.0, 0.0]),
    "unit of tiny rows": ("unit(x)", [1e-7, 0.0, 0.0], "float[n]", [0.1, 0.0, 0.0]),
    "softmax of nothing": ("softmax(log(relu(x)))", [-1.0, 0.0, -2.0], "float[n]", [0, 0, 0]),
    "roots outside of their domain": ("sqrt(x) + rsqrt(x)", [-1.0, 4.0, 0.0], "float[n]", [nan, 2.5, inf]),
    "log outside of its domain": ("log(x)", [-1.0, 1.0, 0.0], "float[n]", [nan, 0, -inf]),
    "NaN in max and clamp": ("max(x, 1.0) + clamp(x; 0.0, 1.0) + relu(x)", [nan, 2.0], "float[n]", [nan, 5]),
    "comparisons of NaN": ("where(x < 1.0, 1.0, 0.0) + where(x != x, 2.0, 0.0)", [nan, 0.0], "float[n]", [2, 1]),
    "a sum of nothing": ("sum(x[1:])", [3.0], "float[]", [0]),
    "a mean of nothing": ("mean(x[1:])", [3.0], "float[]", [nan]),
    "no token before": ("sum(shift(unsqueeze(x, -1); by = 2), axis = -1)", [1.0, 2.0, 3.0], "float[n]", [0, 0, 1]),
    "no token that far": ("sum(shift(unsqueeze(x, -1); by = 9), axis = -1)", [1.0, 2.0], "float[n]", [0, 0]),
    "a convolution longer than the text": ("sum(depthwise(unsqueeze(x, -1), full((5, 1), 2.0)), axis = -1)",
                                           [1.0, 2.0], "float[n]", [2, 6]),
    "what a document does not see": (
        "sum(depthwise(reshape(x, (1, n, 1)), ones(3, 1), reshape(int(x), (1, n))), axis = (0, 2))",
        [7.1, 7.2, inf, 7.4, 7.5], "float[n]", [7.1, 14.3, inf, 7.4, 14.9]),
    "axes from either end": ("sum(x, axis = 0) - sum(x, axis = -1)", [1.0, 2.0], "float[]", [0]),
    "shares of nothing": ("normalize_rows(x)", [0.0, -inf, 0.0], "float[n]", [0, 0, 0]),
    "hidden pairs weigh nothing": ("polynomial(log(relu(x)); (1.0, 1.0, 0.5))", [0.0, 1.0], "float[n]", [0, 1]),
    "one_hot": ("sum(one_hot(x; 3), axis = 0)", [2, 2, 0], "float[3]", [1, 0, 2]),
}  # fmt: skip


@pytest.mark.parametrize(("expression", "given", "result", "expected"), VALUES.values(), ids=VALUES.keys())
def test_value(expression: str, given: list[float], result: str, expected: list[float]) -> None:
    kind = "int" if all(isinstance(value, int) for value in given) else "float"
    compiled = fg.compile(text(f"y = float(x) * 0.0 + 1.0\nreturn {expression}", f"x: {kind}[n]", result))
    model = compiled.module(dtype=torch.float64)
    x = torch.tensor(given, dtype=torch.float64 if kind == "float" else torch.int64)
    program = next(stage.program for stage in compiled.stages if stage.name == "elaborate")
    exact = torch.tensor(expected, dtype=torch.float64).reshape(-1)
    for found in (model(x), compiled.reference(model)(x), run(program, [x], {}, dtype=torch.float64)):
        assert isinstance(found, Tensor)
        assert found.dtype == torch.int64 if result.startswith("int") else found.is_floating_point()
        close = (
            1e-6 if found.dtype == torch.float32 else 1e-12
        )  # without a float tensor, results are of float32
        torch.testing.assert_close(found.double().reshape(-1), exact, rtol=close, atol=1e-12, equal_nan=True)


# the expression of x: float[n], x, and the gradient of the sum of the result
GRADIENTS: dict[str, tuple[str, list[float], list[float]]] = {
    "relu and abs at 0": ("relu(x) + abs(x)", [0.0, 2.0, -2.0], [0, 2, -1]),
    "clamp at its limits": ("clamp(x; -1.0, 1.0)", [1.0, -1.0, 3.0], [1, 1, 0]),
    "max with a number": ("max(x, 1.0) + min(1.0, x)", [1.0, 0.0, 3.0], [1, 1, 1]),
    "a tie with a number": ("max(x, 1.0)", [1.0, 0.0, 3.0], [0.5, 0, 1]),
    "a tie over an axis": ("max(x)", [3.0, 3.0, 1.0], [0.5, 0.5, 0]),
    "unit of zeros": ("unit(x)", [0.0, 0.0], [1e6, 1e6]),
    "nothing flows through int": ("x * float(int(x))", [2.5, -1.5], [2, -1]),
    "softmax of nothing": ("softmax(log(relu(x) * 0.0)) + x", [1.0, 2.0], [nan, nan]),
}


@pytest.mark.parametrize(("expression", "given", "expected"), GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradient_of_a_module_at_a_kink(expression: str, given: list[float], expected: list[float]) -> None:
    result = "float[]" if expression == "max(x)" else "float[n]"
    model = fg.compile(text(f"return {expression}", "x: float[n]", result)).module(dtype=torch.float64)
    x = torch.tensor(given, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


# the body over x: float[n, 4] and ids: int[n], the type of its result, and what a run of 3 tokens says
REFUSED_RUNS: dict[str, tuple[str, str, str]] = {
    "a slice from before the first": ("return x[n - 5:]", "float[5, 4]", "slice -2:3 of axis -2"),
    "a slice that ends before the first": ("return x[n - 6:n - 4]", "float[2, 4]", "slice -3:-1 of axis -2"),
    "a slice from beyond the last": ("return x[6:]", "float[n - 6, 4]", "slice 6:3 of axis -2"),
    "a place before the first": ("return x[n - 5, ..]", "float[4]", "index -2 of axis -2"),
    "a negative id": ("return embedding(x, ids - 2)", "float[n, 4]", "index out of range"),
    "an id beyond the table": ("return embedding(x, ids + 2)", "float[n, 4]", "index out of range"),
    "a class that is not there": ("return one_hot(ids; 2)", "float[n, 2]", "num_classes|smaller"),
    "a negative class": ("return one_hot(ids - 1; 4)", "float[n, 4]", "non-negative"),
    "a target that PyTorch would leave out": (
        "return cross_entropy(x, 0 * ids - 100)",
        "float[]",
        "out of bounds",
    ),
}


@pytest.mark.parametrize(("body", "result", "said"), REFUSED_RUNS.values(), ids=REFUSED_RUNS.keys())
def test_a_run_is_refused(body: str, result: str, said: str) -> None:
    compiled = fg.compile(text(body, "x: float[n, 4], ids: int[n]", result))
    inputs = [torch.ones(3, 4, dtype=torch.float64), torch.arange(3)]
    program = next(stage.program for stage in compiled.stages if stage.name == "elaborate")
    errors = (ValueError, IndexError, RuntimeError)
    with pytest.raises(errors, match=said):
        compiled.module(dtype=torch.float64)(*inputs)
    with pytest.raises(errors, match=said):
        run(program, inputs, {}, dtype=torch.float64)


REFUSED_FILES = {
    "unit of a scalar": ("return unit(sum(x))", "float[]", "FG205"),
    "limits between two ints": ("return clamp(ids; 0.2, 0.7)", "int[n]", "FG218"),
    "rotary of an odd width": ("return rotary(x[.., 0:3])", "float[n, 3]", "FG208"),
    "a shift by nothing": ("return shift(x; by = 0)", "float[n, 4]", "FG218"),
    "ids of no batch": ("return shift(x, ids)", "float[n, 4]", "FG205"),
    "weights of other channels": ("return depthwise(x, ones(2, 3))", "float[n, 4]", "FG203"),
    "weights of unknown width": ("return depthwise(x, x)", "float[n, 4]", "FG212"),
    "alibi of unknown heads": ("return alibi(reshape(x, (n, 2, 2)))", "float[n, 2, 2]", "FG212"),
    "a mean of ints": ("return mean(ids)", "float[]", "FG209"),
}


@pytest.mark.parametrize(("body", "result", "code"), REFUSED_FILES.values(), ids=REFUSED_FILES.keys())
def test_a_file_is_refused(body: str, result: str, code: str) -> None:
    with pytest.raises(TfgError, match=code):
        fg.compile(text(body, "x: float[n, 4], ids: int[n]", result))


def test_ints_are_of_64_bits_whatever_is_given() -> None:
    compiled = fg.compile(text("return float(clamp(ids; 0, 200) + 100)", "ids: int[n]", "float[n]"))
    given = torch.tensor([250, 7], dtype=torch.uint8)
    assert compiled.module(dtype=torch.float64)(given).tolist() == [300, 107]
    repeated = fg.compile(text("repeat i in 2 {\n    ids = f(ids)\n}\nreturn ids", "ids: int[n]", "int[n]",
                               "block f(x: int[n]) -> int[n] { return x * 1000 }"))  # fmt: skip
    assert repeated.module()(given).tolist() == [250_000_000, 7_000_000]


def test_ids_that_are_only_looked_up_are_left_as_they_are() -> None:
    assert ".long()" not in fg.compile(EXAMPLES / "llama.tfg").modules["model.py"]


def test_losses_are_means_over_all_positions() -> None:
    compiled = fg.compile(
        text("return cross_entropy(x, ids) + mse(x, x + 2.0)", "x: float[b, n, 4], ids: int[b, n]", "float[]")
    )
    found = compiled.module(dtype=torch.float64)(
        torch.zeros(2, 3, 4, dtype=torch.float64), torch.ones(2, 3).long()
    )
    assert found.item() == pytest.approx(log(4) + 4)
    assert not isnan(found.item())


@pytest.mark.parametrize(
    ("dtype", "base"),
    [(torch.float32, 1e6), (torch.float32, 2e8), (torch.float32, 1e17), (torch.float64, 1e17),
     (torch.bfloat16, 3e8), (torch.float16, 3e4)],
)  # fmt: skip
@pytest.mark.parametrize("width", [2, 3, 64])
def test_a_row_of_large_and_nearly_equal_entries_is_normalised(
    dtype: torch.dtype, base: float, width: int
) -> None:
    """The proved bound of its norm, sqrt(d), is kept, and each entry is right; F.layer_norm is off by thousands."""
    body = f"return layer_norm(x, ones({width}), zeros({width}))"
    model = fg.compile(text(body, f"x: float[n, {width}]", f"float[n, {width}]")).module(dtype=dtype)
    generator = torch.Generator().manual_seed(width)
    x = (base * (1 + torch.rand(500, 1, generator=generator, dtype=torch.float64))).expand(-1, width)
    x = x.to(dtype).clone()
    above = torch.nextafter(x, torch.full_like(x, inf))
    x = torch.where(torch.rand(500, width, generator=generator) < 0.5, above, x)
    found = model(x)
    assert found.dtype == dtype
    steps = x.double() - x[:, :1].double()  # exact: a few units in the last place
    steps = steps - steps.mean(-1, keepdim=True)
    expected = steps / (steps.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    unit = 4.0 * torch.finfo(dtype).eps
    assert (found.double().norm(dim=-1) <= width**0.5 * (1 + unit)).all()
    torch.testing.assert_close(found.double(), expected, rtol=unit, atol=8 * unit)
