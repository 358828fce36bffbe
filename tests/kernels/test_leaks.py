"""Nothing hidden leaks: NaN, Inf and huge numbers in tokens that a query does not see, on PyTorch's kernels."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime.exact_attention import exact_attention
from fastgrad_compiler.runtime.functions import softmax_attention
from tests.grids import wide
from tests.kernels.inputs import Inputs, run_kernel
from tests.kernels.leaks import HUGE, KINDS, WINDOWS, attack, check, inputs_of, targets_of, visible_pairs

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def run_exact_below(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
    return run_kernel(spec, inputs, exact_below=1000)


def run_exact(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
    options: dict[str, Any] = {"scale": spec.scale, "causal": spec.causal, "window": spec.window}
    options |= {"near": spec.near, "mask": inputs.mask, "documents": inputs.documents, **inputs.named}
    q, k, v = inputs.tensors[:3]
    out = exact_attention(q, k, v, **options)
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]


FEW = ("causal, padding", "near, documents, causal", "forget, documents")


@pytest.mark.medium
@pytest.mark.parametrize("kind", wide(KINDS, few=FEW))
def test_polynomial(kind: str) -> None:
    attack(run_kernel, KINDS[kind], torch.float32)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("kind", "dtype"),
    wide(
        product(KINDS, (torch.float64, torch.bfloat16)),
        few=[(FEW[0], torch.float64), (FEW[1], torch.bfloat16), (FEW[2], torch.bfloat16)],
    ),
)
def test_other_precisions(kind: str, dtype: torch.dtype) -> None:
    attack(run_kernel, KINDS[kind], dtype, every=False)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["causal, padding", "near, documents, causal"])
def test_grouped_heads(kind: str) -> None:
    attack(run_kernel, KINDS[kind], torch.float32, groups=2)


@pytest.mark.medium
@pytest.mark.parametrize(
    "dtype", [DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])]
)
@pytest.mark.parametrize(
    "kind", [*WINDOWS, "causal", "padding", "near, documents, causal", "forget, documents"]
)
def test_exact(kind: str, dtype: torch.dtype) -> None:
    attack(run_exact, {**KINDS, **WINDOWS}[kind], dtype, every=dtype == torch.float32)


def run_window(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
    q, k, v = inputs.tensors[:3]
    out = load_kernel(spec)(q, k, v, mask=inputs.mask, documents=inputs.documents, **inputs.named)
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", WINDOWS)
def test_window_kernels(kind: str) -> None:
    attack(run_window, WINDOWS[kind], torch.float32, every=False)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["causal", "padding", "near, documents", "forget, padding"])
def test_exact_below_the_break_even(kind: str) -> None:
    attack(run_exact_below, KINDS[kind], torch.float32)


@pytest.mark.parametrize("length", [130, pytest.param(300, marks=pytest.mark.slow)])
def test_tiles_of_the_usual_size(length: int) -> None:
    attack(run_kernel, replace(KINDS["causal"], chunk=None), torch.float32, length=length, every=False)


def run_softmax(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
    """As a generated module calls PyTorch's function."""
    q, k, v = inputs.tensors
    options: dict[str, Any] = {"is_causal": spec.causal}
    if inputs.mask is not None:
        visible = inputs.mask[:, None, None]
        if spec.causal:
            visible = visible & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        options = {"attn_mask": visible}
    out = softmax_attention(q, k, v, scale=0.7, enable_gqa=q.shape[1] != k.shape[1], **options)
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["causal", "padding"])
def test_exact_attention_of_pytorch(kind: str, groups: int) -> None:
    spec = replace(KINDS[kind], dv=3)
    for dtype in DTYPES:
        inputs = inputs_of(spec, dtype, groups)
        visible = visible_pairs(spec, inputs)
        for tokens in targets_of(spec):
            # A later query's logit of 1e30 is its own matter: PyTorch recomputes it, off by 1e23, in the backward pass.
            huge = (HUGE[dtype], "v" if spec.causal else "qkv")
            for value, names in ((float("nan"), "qkv"), (float("inf"), "v"), huge):
                check(run_softmax, spec, inputs, visible, tokens, value, names, silent=True)
