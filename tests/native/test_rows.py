"""C++ kernels of groups of operations on rows, against PyTorch's operations."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_dsl.api.compiled import Compiled
from tests.grids import wide
from tests.native.compilers import NEEDS_COMPILER

SPEC = """
use std

dim b
dim n

model m(x: float[b, n, 24]) -> float[b, n, 24] {
    y = std.rms_norm(x) as r
    y = std.layer_norm(y) as l
    y = y + std.swiglu(y; hidden = 40) as s
    weight g: float[24] = ones()
    weight t: float[] = ones()
    z = 0.5 * sigmoid(y) * g + exp(-y * y) / sqrt(1.0 + y * y)
    z = z - t * y * rsqrt(2.0 + sum(y * y; axis = -1, keepdim = true))
    return z - mean(z; axis = -1, keepdim = true)
}
"""
pytestmark = [NEEDS_COMPILER, pytest.mark.usefixtures("native")]
KERNELS = {"_rms_norm_rows", "_layer_norm_rows", "_swiglu_rows", "_m_rows"}


@cache
def compiled(target: str) -> Compiled:
    return fg.compile(SPEC, target=target)


def kernels(model: Any) -> dict[str, Any]:
    module = sys.modules[type(model).__module__]
    return {name: value for name, value in vars(module).items() if name.endswith("_rows")}


def results(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])]


@pytest.mark.medium
@pytest.mark.parametrize(
    "dtype", wide((torch.float64, torch.float32, torch.bfloat16), few=(torch.float64, torch.bfloat16))
)
def test_kernels_are_as_near_the_truth_as_pytorch(dtype: torch.dtype) -> None:
    ours, theirs = (compiled(target).module(dtype=dtype) for target in ("cpp", "torch"))
    truth = compiled("torch").module(dtype=torch.float64)
    assert set(kernels(ours)) == KERNELS
    x = torch.randn(3, 70, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    for found, other, expected in zip(
        results(ours, x), results(theirs, x), results(truth, x.double()), strict=True
    ):
        assert found.dtype == other.dtype
        error, usual = ((each.double() - expected).norm() for each in (found, other))
        assert error <= 2 * usual + 4 * torch.finfo(dtype).eps * expected.norm()
    for kernel in kernels(ours).values():
        assert kernel._library._found[dtype] is not None


@pytest.mark.medium
def test_threads_strides_and_few_rows() -> None:
    ours, theirs = (compiled(target).module(dtype=torch.float64) for target in ("cpp", "torch"))
    x = torch.randn(24, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    threads = torch.get_num_threads()
    try:
        for count, given in (
            (3, x.permute(1, 2, 0)),
            (4, x[:, :1, :1].permute(1, 2, 0)),
            (1, x.mT[..., None, 0].permute(1, 2, 0)),
        ):
            torch.set_num_threads(count)
            for one, other in zip(results(ours, given), results(theirs, given), strict=True):
                torch.testing.assert_close(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_numbers(dtype: torch.dtype) -> None:
    kernel = kernels(compiled("cpp").module(dtype=dtype))["_swiglu_rows"]
    edges = [
        0.0,
        -0.0,
        1e-30,
        -1e-30,
        87.5,
        -87.5,
        88.5,
        -89.0,
        709.5,
        -709.5,
        1e5,
        -1e5,
        torch.inf,
        torch.nan,
    ]
    x = torch.tensor([*edges, *torch.linspace(-20, 20, 26)], dtype=dtype).reshape(1, 1, 40).requires_grad_()
    one = torch.ones_like(x)
    found, expected = kernel(x, one), kernel.plain(x, one)
    torch.testing.assert_close(found, expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-37, equal_nan=True)
    (of_ours,), (of_theirs,) = (torch.autograd.grad(y.nansum(), x) for y in (found, expected))
    inside = x.detach().abs() < 80
    torch.testing.assert_close(
        of_ours[inside], of_theirs[inside], rtol=32 * torch.finfo(dtype).eps, atol=1e-12
    )


def test_what_kernels_do_not_serve_is_served_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled("cpp").module(dtype=torch.float64)
    kernel = kernels(model)["_rms_norm_rows"]
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    w = torch.ones(24, dtype=torch.float64)
    first = kernel(x, w)
    assert type(first.grad_fn).__name__ == "_RowsBackward"
    monkeypatch.setenv("FASTGRAD_NATIVE", "0")
    assert type(kernel(x, w).grad_fn).__name__ != "_RowsBackward"
    monkeypatch.setenv("FASTGRAD_NATIVE", "1")
    torch.testing.assert_close(torch.func.vmap(lambda x: kernel(x, w))(x.detach()), first.detach())
    tangent = torch.func.jvp(lambda x: kernel(x, w), (x.detach(),), (w.expand(2, 3, 24),))[1]
    assert tangent.shape == x.shape
    with pytest.raises(RuntimeError):  # rows of another width never reach the kernel
        kernel(x[..., :16], w)
    assert kernel(x[:0], w).shape == (0, 3, 24)


def test_second_derivatives_are_those_of_pytorch() -> None:
    ours, theirs = (compiled(target).module(dtype=torch.float64) for target in ("cpp", "torch"))
    x = torch.randn(
        1, 2, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True
    )
    found = []
    for model in (ours, theirs):
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found)
