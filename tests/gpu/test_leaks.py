"""Nothing hidden leaks in Triton kernels: NaN, Inf and huge numbers in tokens that a query does not see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.codegen.kernel import KernelSpec
from tests.gpu.test_kernels import poisoned, run
from tests.kernels.inputs import COEFFICIENTS, Inputs
from tests.kernels.leaks import HUGE, check, inputs_of, visible_pairs

__all__ = ["poisoned"]

CAUSAL = KernelSpec(16, 16, COEFFICIENTS[2], causal=True, scale=0.7)
SPECS = {
    "causal": CAUSAL,
    "padding": replace(CAUSAL, causal=False, padding=True),
    "causal, padding": replace(CAUSAL, padding=True),
    "wide, causal, padding": replace(CAUSAL, d=20, padding=True),
    "near, causal": replace(CAUSAL, near=24, near_d=8),
    "near of the same logits, causal, padding": replace(CAUSAL, near=16, padding=True),
    "near, padding": replace(CAUSAL, causal=False, near=24, padding=True, near_d=8),
}
LENGTH = 75
HIDDEN = [0, 1, 40, LENGTH - 1]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", SPECS)
def test_kernels(kind: str, fused: bool, tmp_path: Path) -> None:
    spec = SPECS[kind]
    if fused and (not spec.causal or spec.near or spec.d > 16):
        pytest.skip("there is no fused schedule")

    def run_kernels(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
        return run(spec, inputs, tmp_path, fused=fused)

    inputs = inputs_of(spec, torch.float32, groups=2, length=LENGTH)
    if spec.padding:
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[:, HIDDEN] = False
        inputs = replace(inputs, mask=mask)
    visible = visible_pairs(spec, inputs)
    for tokens in ([HIDDEN] if spec.padding else []) + ([[45]] if spec.causal else []):
        for value, names in ((float("nan"), "qkv"), (float("inf"), "v"), (HUGE[torch.float32], "qkv")):
            check(run_kernels, spec, inputs, visible, tokens, value, names, silent=True)
