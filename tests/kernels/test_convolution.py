"""`shift` and `depthwise` of generated modules: against docs/operations.md in numpy, and what PyTorch does to them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from fastgrad_compiler.runtime import convolution
from fastgrad_compiler.runtime.functions import depthwise, shift
from tests.compiler.reference import reference

IDS = torch.tensor([[5, 5, 2, 2, 2, 5, 5], [0, 1, 1, 1, 1, 1, 0]])
LEADS = ((), (2,), (2, 3))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def expected(op: str, *inputs: Tensor | None, **values: object) -> Tensor:
    given = [x.detach().numpy() for x in inputs if x is not None]
    return torch.from_numpy(np.array(reference(op, given, values)))


def cases() -> list[tuple[tuple[int, ...], int, Tensor | None]]:
    """Leading dims, the number of tokens and the ids, where there are any."""
    packed = [(lead, n, IDS[:, :n]) for lead in LEADS if lead for n in (1, 2, 7)]
    return [*((lead, n, None) for lead in LEADS for n in (1, 2, 7)), *packed]


@pytest.mark.parametrize("by", [1, 2, 9, -1, -2, -9])
def test_shift_and_its_gradient(by: int) -> None:
    for lead, n, ids in cases():
        x = draw(*lead, n, 3).requires_grad_()
        y = shift(x, ids, by=by)
        torch.testing.assert_close(y, expected("shift", x, ids, by=by), rtol=0, atol=0)
        cotangent = draw(*y.shape, seed=1)
        (found,) = torch.autograd.grad(y, x, cotangent)
        torch.testing.assert_close(found, expected("shift", cotangent, ids, by=-by), rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_depthwise_and_its_gradients(width: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of w in blocks of all, two and one token too."""
    for lead, n, ids in cases():
        x, w = draw(*lead, n, 3).requires_grad_(), draw(width, 3, seed=1).requires_grad_()
        y = depthwise(x, w, ids, reverse=reverse)
        torch.testing.assert_close(y, expected("depthwise", x, w, ids, reverse=reverse))
        g = draw(*y.shape, seed=2)
        pair = (x, g) if reverse else (g, x)
        d_w = expected("depthwise_weights", *pair, ids, width=width)
        for block in (1 << 18, 2 * x.numel() // n, 1):
            monkeypatch.setattr(convolution, "_BLOCK", block)
            found = torch.autograd.grad(y, (x, w), g, retain_graph=True)
            torch.testing.assert_close(found[0], expected("depthwise", g, w, ids, reverse=not reverse))
            torch.testing.assert_close(found[1], d_w)


def test_derivatives_of_every_order_and_mode() -> None:
    x, w = draw(2, 5, 2).requires_grad_(), draw(3, 2, seed=1).requires_grad_()
    for ids in (None, IDS[:, 1:6]):
        for reverse in (False, True):

            def function(x: Tensor, w: Tensor, ids: Tensor | None = ids, reverse: bool = reverse) -> Tensor:
                return depthwise(x, w, ids, reverse=reverse)

            assert gradcheck(function, (x, w), check_forward_ad=True, check_batched_grad=True)
            assert gradgradcheck(function, (x, w))
        assert gradcheck(lambda x, ids=ids: shift(x, ids, by=2), (x,), check_forward_ad=True)


def test_no_tokens() -> None:
    x, w = draw(2, 0, 3).requires_grad_(), draw(4, 3).requires_grad_()
    for ids in (None, IDS[:, :0]):
        y = depthwise(x, w, ids)
        assert y.shape == shift(x, ids, by=1).shape == (2, 0, 3)
        assert not torch.autograd.grad(y.sum(), w)[0].any()


def test_what_a_backward_pass_keeps() -> None:
    x, w = draw(2, 7, 3).requires_grad_(), draw(4, 3).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        depthwise(x, w)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), w.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_result_is_rounded_once(dtype: torch.dtype) -> None:
    """Sums are of float32 at least, and gradients have the dtypes of the inputs."""
    x, w = draw(2, 300, 5, dtype=dtype).requires_grad_(), draw(8, 5, seed=1, dtype=dtype).requires_grad_()
    y, g = depthwise(x, w), draw(2, 300, 5, seed=2, dtype=dtype)
    found = [y, *torch.autograd.grad(y, (x, w), g)]
    wide = [t.detach().double() for t in (x, w, g)]
    exact = [
        expected("depthwise", wide[0], wide[1]),
        expected("depthwise", wide[2], wide[1], reverse=True),
        expected("depthwise_weights", wide[2], wide[0], width=8),
    ]
    for mine, true in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(mine.double(), true, rtol=1.01 * rounding, atol=3e-5)


def test_under_autocast_the_dtype_is_that_of_the_tokens() -> None:
    x, w = (
        draw(2, 7, 3, dtype=torch.bfloat16).requires_grad_(),
        draw(4, 3, dtype=torch.float32).requires_grad_(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise(x, w, IDS)
    d_x, d_w = torch.autograd.grad(y.float().sum(), (x, w))
    assert (y.dtype, d_x.dtype, d_w.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    true = expected("depthwise", x.double(), w.double(), IDS)
    torch.testing.assert_close(y.double(), true, rtol=2.0**-8, atol=1e-6)


def test_nothing_leaks_from_another_document() -> None:
    x, w = draw(2, 7, 3), draw(4, 3)
    clean = [f(x) for f in (lambda x: depthwise(x, w, IDS), lambda x: shift(x, IDS, by=2))]
    x[0, 2:5], x[1, 0] = torch.nan, torch.inf
    hit = torch.zeros(2, 7, dtype=torch.bool)
    hit[0, 2:5], hit[1, 0] = True, True
    for y, before in zip((depthwise(x, w, IDS), shift(x, IDS, by=2)), clean, strict=True):
        torch.testing.assert_close(y[~hit], before[~hit], rtol=0, atol=0)


def test_ids_of_any_integer_dtype() -> None:
    x, w = draw(2, 7, 3), draw(4, 3)
    many = torch.arange(600) % 2
    long, wide = draw(1, 600, 1), many.unsqueeze(0)
    for dtype in (torch.uint8, torch.int8, torch.int32):
        torch.testing.assert_close(depthwise(x, w, IDS.to(dtype)), depthwise(x, w, IDS))
        assert not shift(long, wide.to(dtype), by=2).any()  # of the same id, in another document


class Both(nn.Module):
    """A shift and a convolution with weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(draw(4, 3, seed=1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return depthwise(x, self.w, ids) * shift(x, ids, by=2) + depthwise(shift(x, by=1), self.w)


def test_samples_have_gradients_of_their_own() -> None:
    model, x = Both(), draw(2, 7, 3)
    weights = {"w": model.w.detach()}

    def loss(weights: dict[str, Tensor], x: Tensor, ids: Tensor) -> Tensor:
        out: Tensor = functional_call(model, weights, (x.unsqueeze(0), ids.unsqueeze(0)))
        return out.square().sum()

    found = vmap(grad(loss), (None, 0, 0))(weights, x, IDS)["w"]
    for place in range(2):
        torch.testing.assert_close(found[place], grad(loss)(weights, x[place], IDS[place])["w"])
    many = draw(5, 4, 3, seed=2)
    each = vmap(lambda w: depthwise(x, w, IDS))(many)
    torch.testing.assert_close(each, torch.stack([depthwise(x, w, IDS) for w in many]))


def test_tangents_and_jacobians() -> None:
    model, x = Both(), draw(2, 7, 3)

    def of(x: Tensor) -> Tensor:
        out: Tensor = model(x, IDS)
        return out

    torch.testing.assert_close(jacfwd(of)(x), jacrev(of)(x))
    direction = draw(2, 7, 3, seed=3)
    found = jvp(of, (x,), (direction,))[1]
    with forward_ad.dual_level():
        other = forward_ad.unpack_dual(of(forward_ad.make_dual(x, direction))).tangent
    ends = [of(x + step * direction) for step in (1e-6, -1e-6)]
    torch.testing.assert_close(found, other)
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-7)


def gradients(model: Callable[..., Tensor], w: Tensor, x: Tensor, ids: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x, ids)
    return [y, *torch.autograd.grad(y.square().sum(), (x, w))]


@pytest.mark.medium
def test_compiled_in_one_graph() -> None:
    model = Both()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 5, 3):
        x, ids = draw(2, n, 3), IDS[:, :n].contiguous()
        torch.testing.assert_close(gradients(compiled, model.w, x, ids), gradients(model, model.w, x, ids))


def test_exported_for_every_length() -> None:
    model, length = Both(), torch.export.Dim("n", min=1, max=4096)
    exported = torch.export.export(model, (draw(2, 7, 3), IDS), dynamic_shapes=({1: length}, {1: length}))
    for n in (1, 2, 7, 40):
        x, ids = draw(2, n, 3), torch.arange(n).expand(2, n) // 3
        torch.testing.assert_close(exported.module()(x, ids), model(x, ids))
