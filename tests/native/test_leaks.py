"""Nothing hidden leaks in C++ kernels either: NaN, Inf and huge numbers in tokens that a query does not see."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from tests.kernels.inputs import CPP, Inputs, run_kernel
from tests.kernels.leaks import KINDS, WINDOWS, attack

pytestmark = pytest.mark.usefixtures("native")

run_native = partial(run_kernel, native=True)


def run_window(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
    out = load_kernel(spec, CPP)(*inputs.tensors[:3], mask=inputs.mask, documents=inputs.documents)
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]


@pytest.mark.parametrize(
    "kind",
    [
        *("causal, padding", "near, documents, causal"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_polynomial(kind: str) -> None:
    attack(run_native, KINDS[kind], torch.float32, groups=2)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    attack(run_native, KINDS["causal, padding"], dtype, every=False)


@pytest.mark.parametrize(
    "kind", ["window, documents", *(pytest.param(k, marks=pytest.mark.slow) for k in WINDOWS)]
)
def test_window(kind: str) -> None:
    attack(run_window, WINDOWS[kind], torch.float32)
