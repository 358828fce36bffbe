"""The interpreter: paths of weights, repeats, gradients, what it checks, initial values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.ir.flatten import weights
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.text import parse_program
from fastgrad_compiler.passes.backward import derive_gradient
from fastgrad_compiler.reference.interpret import bind_dims, run, run_gradient
from fastgrad_compiler.runtime import initialise
from tests.initial_weights import initial_weights


def program(text: str) -> Program:
    return infer_shapes(parse_program(text))


STACK = program("""
objective loss
dim n <= 8 % 2
graph main {
    %x = input() : float[n, 3]
    %bias = weight(init = ("normal", 0.0, 0.5), label = "bias") : float[3]
    %_op = repeat(%x, %bias, bodies = (("body", 3),), carried = 1)
    return %_op
}
graph body {
    %x = input() : float[n, 3]
    %bias = input() : float[3]
    %y = call(%x, graph = "layer", label = "layers")
    %z = add(%y, %bias)
    return %z
}
graph layer {
    %x = input() : float[n, 3]
    %w = weight(init = ("xavier",), label = "w") : float[3, 3]
    %h = matmul(%x, %w)
    %t = tanh(%h)
    return %t
}
graph loss {
    %y = input() : float[n, 3]
    %t = input() : float[n, 3]
    %l = mse(%y, %t)
    return %l
}
""")


def by_hand(x: Tensor, given: dict[str, Tensor]) -> Tensor:
    for index in range(3):
        x = (x @ given[f"layers.{index}.w"]).tanh() + given["bias"]
    return x


def test_a_stack_by_hand() -> None:
    x, given = torch.randn(4, 3), initial_weights(STACK, 1)
    assert sorted(given) == ["bias", "layers.0.w", "layers.1.w", "layers.2.w"]
    torch.testing.assert_close(run(STACK, [x], given), by_hand(x, given))
    torch.testing.assert_close(run(STACK, {"x": x}, given), by_hand(x, given))


def test_the_objective() -> None:
    y, t = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(
        run(STACK, {"t": t, "y": y}, {}, graph="loss"), torch.nn.functional.mse_loss(y, t)
    )


def test_dtype() -> None:
    x, given = torch.randn(4, 3), initial_weights(STACK, 1)
    found = run(STACK, [x], given, dtype=torch.float64)
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, by_hand(x.double(), {p: w.double() for p, w in given.items()}))


def test_gradients_through_a_repeat_with_an_invariant() -> None:
    derived = derive_gradient(STACK)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    given = {path: w.double().requires_grad_() for path, w in initial_weights(STACK, 1).items()}
    cotangent = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.autograd.grad(by_hand(x, given), [x, *given.values()], cotangent)
    inputs, found = run_gradient(derived, [x], given, [cotangent])
    torch.testing.assert_close([inputs["x"], *(found[path] for path in given)], list(expected))


def test_a_gradient_needs_its_graph() -> None:
    with pytest.raises(ValueError, match="has no gradient graph"):
        run_gradient(STACK, [torch.zeros(2, 3)], {}, [torch.zeros(2, 3)])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "main takes 1 inputs, not 0"),
        ({"y": torch.zeros(2, 3)}, r"main takes \['x'\], not \['y'\]"),
        ([torch.zeros(2, 3, 1)], r"x is float\[n, 3\], not of shape"),
        ([torch.zeros(2, 4)], r"x is float\[n, 3\] with n = 2, not of shape \(2, 4\)"),
        ([torch.zeros(2, 3, dtype=torch.int64)], "x is a tensor of torch.int64, not of float"),
        ([torch.zeros(10, 3)], "n = 10 is above its declared bound 8"),
        ([torch.zeros(3, 3)], "n = 3 is not a multiple of 2"),
    ],
)
def test_inputs_are_checked(inputs: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(STACK, inputs, initial_weights(STACK))


def test_weights_are_checked() -> None:
    given = initial_weights(STACK)
    with pytest.raises(ValueError, match=r"weight layers.1.w is float\[3, 3\], not of shape \(3, 4\)"):
        run(STACK, [torch.zeros(2, 3)], {**given, "layers.1.w": torch.zeros(3, 4)})
    del given["layers.2.w"]
    with pytest.raises(ValueError, match=r"there is no weight layers\.2\.w"):
        run(STACK, [torch.zeros(2, 3)], given)


def test_dims_are_solved_and_compared() -> None:
    source = program("""
graph main {
    %x = input() : float[4*n + 1]
    %y = input() : float[n, n/2]
    return %x
}""")
    assert bind_dims(source, source["main"], [torch.zeros(17), torch.zeros(4, 2)]) == {"n": 4}
    with pytest.raises(ValueError, match=r"y is float\[n, n/2\] with n = 4"):
        bind_dims(source, source["main"], [torch.zeros(17), torch.zeros(5, 2)])


def test_several_results() -> None:
    source = program("""
graph main {
    %x = input() : float[n]
    %i = constant(value = 2)
    %pair = call(%x, %i, graph = "both", label = "both")
    %a = item(%pair, index = 0)
    %b = item(%pair, index = 1)
    return %b, %a
}
graph both {
    %x = input() : float[n]
    %i = input() : int[]
    %y = mul(%x, %i)
    return %x, %y
}""")
    x = torch.randn(3)
    torch.testing.assert_close(run(source, [x], {}), (2 * x, x))


def test_initial_weights_are_those_of_the_seed_in_the_order_of_parameters() -> None:
    first, again, other = initial_weights(STACK, 3), initial_weights(STACK, 3), initial_weights(STACK, 4)
    assert all(torch.equal(first[path], again[path]) for path in first)
    assert not torch.equal(first["bias"], other["bias"])
    assert list(first) == ["bias", "layers.0.w", "layers.1.w", "layers.2.w"]
    assert {path: tuple(node.tensor.shape) for path, node in weights(STACK)}.keys() == first.keys()
    wide = initial_weights(STACK, 3, torch.float64)
    torch.testing.assert_close(wide["bias"], first["bias"].double(), rtol=0, atol=0)


def test_initialisers() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.empty(300, 500)
    assert abs(initialise.normal_(w, 1.0, 0.5, generator=generator).mean() - 1) < 0.01
    assert abs(w.std() - 0.5) < 0.01
    assert (initialise.trunc_normal_(w, 1.0, 0.5, generator=generator) - 1).abs().max() <= 1
    limit = 2 * (6 / 800) ** 0.5
    assert 0.99 * limit < initialise.xavier_(w, 2.0, generator=generator).abs().max() <= limit
    assert torch.equal(
        initialise.linspace_(w, 8.0, 2.0)[:, [0, -1]], torch.tensor([[8.0, 2.0]]).expand(300, 2)
    )
    assert torch.allclose(w.diff(), torch.full((), -6 / 499), atol=1e-5)
    assert initialise.linspace_(torch.empty(1), 8.0, 2.0) == 8
    assert initialise.ones_(w).sum() == 150_000
    assert not initialise.zeros_(w).any()
    assert (initialise.constant_(w, 0.5) == 0.5).all()
