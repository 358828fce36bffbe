"""Nothing hidden leaks in Triton kernels: NaN, Inf and huge numbers in tokens that a query does not see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from tests.gpu.test_kernels import poisoned, run
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs
from tests.kernels.leaks import check, visible_pairs

__all__ = ["poisoned"]

CAUSAL = KernelSpec(8, 16, COEFFICIENTS[2], causal=True, scale=0.7)
SPECS = {
    "causal": CAUSAL,
    "padding": replace(CAUSAL, causal=False, padding=True),
    "causal, padding": replace(CAUSAL, padding=True),
    "wide, causal, padding": replace(CAUSAL, d=20, padding=True),
    "near, causal": replace(CAUSAL, near=24, near_d=8),
    "near of the same logits, causal, padding": replace(CAUSAL, near=16, padding=True),
    "near, padding": replace(CAUSAL, causal=False, near=24, padding=True, near_d=8),
}
LENGTH = 45
HIDDEN = [0, 1, 20, LENGTH - 1]
FUSED = ("causal", "causal, padding")
GATES = {
    "forget, padding": replace(CAUSAL, padding=True, forget=True),
    "forget, near": replace(CAUSAL, near=24, padding=True, near_d=8, forget=True),
}
REST = [  # less of what others have too
    ("causal", False),
    ("padding", False),
    ("causal, padding", False),
    ("wide, causal, padding", False),
    ("near, causal", False),
    ("causal", True),
]
SCHEDULES = [
    pytest.param(*each, marks=[pytest.mark.slow] if each in REST else [])
    for each in [(kind, False) for kind in SPECS] + [(kind, True) for kind in FUSED]
]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("value", "names"),
    [
        (float("nan"), "qkv"),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in ((float("inf"), "v"), (1e30, "qkv"), (1e30, "k"))
        ),
    ],
)
@pytest.mark.parametrize(("kind", "fused"), SCHEDULES)
def test_kernels(kind: str, fused: bool, value: float, names: str) -> None:
    spec = replace(SPECS[kind], d=4) if fused else SPECS[kind]
    attack(spec, fused, value, names)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        pytest.param("forget, padding", False, marks=pytest.mark.slow),
        ("forget, padding", True),
        pytest.param("forget, near", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("names", ["g", pytest.param("qkvg", marks=pytest.mark.slow)])
def test_gates(kind: str, fused: bool, names: str) -> None:
    spec = replace(GATES[kind], d=4) if fused else GATES[kind]
    attack(spec, fused, float("nan"), names)


def attack(spec: KernelSpec, fused: bool, value: float, names: str) -> None:
    """Numbers in hidden tokens, and in one that earlier queries do not see."""

    def run_kernels(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
        return run(spec, inputs, fused=fused)

    inputs = make_inputs(spec, LENGTH, batch=1, heads=1, groups=2).to(torch.float32)
    if spec.padding:
        mask = torch.ones(1, LENGTH, dtype=torch.bool)
        mask[:, HIDDEN] = False
        inputs = replace(inputs, mask=mask)
    visible = visible_pairs(spec, inputs)
    for tokens in ([HIDDEN] if spec.padding else []) + ([[37]] if spec.causal else []):
        check(run_kernels, spec, inputs, visible, tokens, value, names, silent=True)
