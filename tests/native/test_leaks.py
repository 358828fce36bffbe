"""Nothing hidden leaks in C++ kernels either: NaN, Inf and huge numbers in tokens that a query does not see."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from tests.grids import wide
from tests.kernels.inputs import CPP, Inputs, run_kernel
from tests.kernels.leaks import KINDS, WINDOWS, attack
from tests.native.test_kernels import specification

pytestmark = pytest.mark.usefixtures("native")

run_native = partial(run_kernel, native=True)


def run_window(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
    q, k, v = inputs.tensors[:3]
    out = load_kernel(spec, CPP)(q, k, v, mask=inputs.mask, documents=inputs.documents, **inputs.named)
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("causal, near", torch.float32), ("documents", torch.float64)],
    ids=["causal, near", "documents"],
)
def test_kernels_of_other_tests(name: str, dtype: torch.dtype) -> None:
    """Causal with padding, and causal with documents, both with near fields: their libraries are there."""
    attack(run_native, specification(name), dtype, groups=2)


@pytest.mark.medium
@pytest.mark.parametrize(
    "name", wide(["causal", "causal, near", "documents"], few=["causal", "causal, near"])
)
def test_bfloat16(name: str) -> None:
    attack(run_native, specification(name), torch.bfloat16, every=False)


@pytest.mark.medium
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_polynomial(kind: str) -> None:
    attack(run_native, KINDS[kind], torch.float32, groups=2)


@pytest.mark.medium
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    attack(run_native, KINDS["causal, padding"], dtype, every=False)


@pytest.mark.medium
@pytest.mark.parametrize(
    "kind", ["window, documents", *(pytest.param(k, marks=pytest.mark.slow) for k in WINDOWS)]
)
def test_window(kind: str) -> None:
    attack(run_window, WINDOWS[kind], torch.float32, gates=False)
