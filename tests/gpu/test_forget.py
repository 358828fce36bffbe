"""Forget gates in Triton kernels: interpreted, against the dense reference in float64, and compiled ahead of time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ahead import Ahead, Resources
from benchmarks.launches import jobs, write_kernels
from fastgrad_compiler.approximation.kernel_tiles import is_fused
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.runtime.triton_attention import Launches
from tests.gpu import test_kernels
from tests.gpu.interpreter import install
from tests.gpu.test_kernels import FIELDS, TOLERANCE, check, kernels_of, poisoned
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs, worst_error

__all__ = ["poisoned"]

install()

SLOW = pytest.mark.slow
TILES = (32, 32, 64, 4, 1)  # few programs
PLAIN = KernelSpec(5, 12, COEFFICIENTS[2], causal=True, scale=0.7, forget=True)
NEAR = replace(PLAIN, near=24, near_d=6)
CASES = [  # padding, near and near_d, fused, query heads of a key head, type: every value of each with others
    (False, FIELDS[0], False, 2, torch.bfloat16),
    (True, FIELDS[1], False, 1, torch.bfloat16),
    (True, FIELDS[2], False, 2, torch.float32),
    (True, FIELDS[0], True, 2, torch.bfloat16),
    *(
        pytest.param(*case, marks=SLOW)
        for case in itertools.product((False, True), FIELDS, (False, True), (1, 2, 3), TOLERANCE)
        if not (case[2] and case[1][0])
    ),
]


def run(spec: KernelSpec, inputs: Inputs, **options: Any) -> list[Tensor]:
    """Output and the gradients of all inputs."""
    return test_kernels.run(spec, inputs, **{"tiles": TILES, **options})


def with_gates(inputs: Inputs, gates: Tensor) -> Inputs:
    """The inputs with other gates [b, h, n]."""
    return replace(inputs, tensors=(*inputs.tensors[:-1], gates.detach().requires_grad_()))


def mixed(inputs: Inputs, seed: int = 0) -> Inputs:
    """The inputs with some of their gates 0, -1e-4, -80 and -inf, the first one among them."""
    gates = inputs.tensors[-1].detach().clone()
    drawn = torch.rand(gates.shape, generator=torch.Generator().manual_seed(seed))
    for place, value in enumerate((0.0, -1e-4, -80.0, -math.inf)):
        gates[(drawn >= 0.15 * place) & (drawn < 0.15 * place + 0.12 / (1 + place))] = value
    gates[..., 0] = -math.inf
    return with_gates(inputs, gates)


def rounded(spec: KernelSpec, inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs in a type, and the gates in float32."""
    given = inputs.to(dtype)
    return with_gates(given, inputs.tensors[-1].float())


@pytest.mark.medium
@pytest.mark.parametrize(("padding", "field", "fused", "groups", "dtype"), CASES, ids=str)
def test_kernels_agree_with_the_dense_reference(
    padding: bool, field: tuple[int | None, int | None], fused: bool, groups: int, dtype: torch.dtype
) -> None:
    near, near_d = field
    spec = replace(PLAIN, padding=padding, near=near, near_d=near_d)
    assert is_fused(spec) == (near is None)
    inputs = mixed(make_inputs(spec, 75, groups=groups, heads=1, batch=2 if padding else 1))
    inputs = rounded(spec, inputs, dtype)
    found = run(spec, inputs, fused=fused)
    assert found[-1].dtype == torch.float32
    check(spec, inputs, dtype, found)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("d", "dv", "degree", "near", "n"),
    [
        (18, 20, 2, 16, 37),
        *(
            pytest.param(*shape, marks=SLOW)
            for shape in (
                (20, 24, 3, 16, 53),
                (5, 3, 1, None, 37),
                (3, 70, 4, None, 66),
                (33, 16, 2, 40, 81),
                (9, 20, 2, 8, 1),
            )
        ),
    ],
)
def test_widths_degrees_and_lengths(d: int, dv: int, degree: int, near: int | None, n: int) -> None:
    spec = KernelSpec(d, dv, COEFFICIENTS[degree], causal=True, near=near, forget=True)
    inputs = rounded(spec, make_inputs(spec, n, heads=2, batch=1), torch.float32)
    check(spec, inputs, torch.float32, run(spec, inputs))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "value", [0.0, -math.inf, *(pytest.param(value, marks=SLOW) for value in (-1e-4, -80.0))]
)
def test_all_gates_alike(value: float, fused: bool) -> None:
    inputs = make_inputs(PLAIN, 37, heads=1, batch=1)
    inputs = rounded(PLAIN, with_gates(inputs, torch.full_like(inputs.tensors[-1], value)), torch.float32)
    found = run(PLAIN, inputs, fused=fused)
    check(PLAIN, inputs, torch.float32, found)
    out, dq, dk, dv, dlog_gate = found
    if value == 0.0:  # a factor of 1 changes no bit
        plain = replace(PLAIN, forget=False)
        without = run(plain, replace(inputs, tensors=inputs.tensors[:-1]), fused=fused)
        assert all(torch.equal(a, b) for a, b in zip((out, dq, dk, dv), without, strict=True))
    elif value == -math.inf:  # a query sees itself alone
        assert torch.allclose(out, inputs.tensors[2].detach(), atol=1e-6)
        assert not dlog_gate.any()


@pytest.mark.parametrize("spec", [PLAIN, pytest.param(NEAR, marks=SLOW)], ids=["plain", "near"])
def test_sums_are_rounded_after_their_differences_are_taken(spec: KernelSpec) -> None:
    """After 30 gates of -1000 the running sum has an error of 2e-3 as one float32 number."""
    inputs = make_inputs(spec, 70, heads=1, batch=1)
    gates = torch.full_like(inputs.tensors[-1], -0.01)
    gates[..., 1:31] = -math.inf
    gates[..., 31:] -= 0.1 * torch.rand(39, generator=torch.Generator().manual_seed(1))
    inputs = rounded(spec, with_gates(inputs, gates), torch.float32)
    check(spec, inputs, torch.float32, run(spec, inputs))


@SLOW
@pytest.mark.parametrize("near", [None, 16])
def test_the_result_does_not_depend_on_the_schedule(near: int | None) -> None:
    spec = replace(PLAIN, near=near, padding=True)
    inputs = rounded(spec, mixed(make_inputs(spec, 70, heads=1, batch=1)), torch.float32)
    first = run(spec, inputs)
    others = [
        run(spec, inputs, chunk=64, tiles=(16, 32, 64, 4, 1)),
        run(spec, inputs, chunk=256, tiles=(64, 64, 16, 4, 1)),
    ]
    if near is None:
        others.append(run(spec, inputs, fused=True, tiles=(16, 16, 64, 4, 1)))
    for other in others:
        assert worst_error(other, [x.double() for x in first]) < TOLERANCE[torch.float32]


@pytest.mark.medium
@pytest.mark.parametrize("size", [-300.0, pytest.param(300.0, marks=SLOW)])
def test_logits_that_no_exp_could_hold(size: float) -> None:
    """Rows whose near logits are all about -300 and whose far keys are forgotten are not 0 / 0."""
    inputs = mixed(make_inputs(NEAR, 75, heads=1, batch=1))
    near_q, near_k = (x.detach() for x in inputs.tensors[3:5])
    tensors = (*inputs.tensors[:3], near_q.abs() * size, near_k.abs() + 0.1, inputs.tensors[-1])
    inputs = rounded(
        NEAR, replace(inputs, tensors=tuple(x.detach().requires_grad_() for x in tensors)), torch.float32
    )
    gates = inputs.tensors[-1].detach().clone()
    gates[..., 48:50] = -math.inf
    inputs = with_gates(inputs, gates)
    found = run(NEAR, inputs)
    assert all(torch.isfinite(x).all() for x in found)
    assert found[0][0, 0, 60].any()


@pytest.mark.medium
def test_views_with_strides_and_gates_of_another_type() -> None:
    inputs = rounded(PLAIN, make_inputs(PLAIN, 40, heads=2, batch=2), torch.bfloat16)
    gates = inputs.tensors[-1].detach().to(torch.bfloat16)
    expected = run(PLAIN, with_gates(inputs, gates.float()))
    found = run(PLAIN, with_gates(inputs, gates.mT.contiguous().mT))
    assert found[-1].dtype == torch.bfloat16
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, expected, strict=True))


def test_the_sums_are_two_numbers_to_the_last_bits() -> None:
    """What is passed to the kernels, [b, h, 2, n] float32, adds up to the float64 sums."""
    inputs = rounded(PLAIN, mixed(make_inputs(PLAIN, 500)), torch.float32)
    *given, _ = (x if x is None else x.detach() for x in inputs.arguments)
    call = Launches(kernels_of(PLAIN), PLAIN, *given)  # type: ignore[arg-type]
    sums = call.sums
    assert sums is not None
    gates = inputs.tensors[-1].detach().double().clamp(min=-1000.0)
    gates[..., 0] = 0.0
    expected = gates.cumsum(-1)
    assert sums.dtype == torch.float32
    assert (sums.double().sum(-2) - expected).abs().max() <= 2.0**-47 * expected.abs().max()


@SLOW
def test_compiled_for_a_gpu_they_spill_nothing(tmp_path: Path) -> None:
    spec = KernelSpec(16, 64, COEFFICIENTS[2], causal=True, forget=True)
    launches = jobs(spec, write_kernels(spec, tmp_path, "kernels"), torch.bfloat16, "sm_90")
    with Ahead(workers=1) as ahead:
        results = dict(zip(launches, ahead.map(launches.values()), strict=True))
    assert {"state_kernel", "state_kernel of queries", "scan_kernel", "forward_kernel"} < results.keys()
    for name, result in results.items():
        assert isinstance(result, Resources), (name, result)
        assert result.fits, name
        assert result.spills == 0, name
        assert result.scalar_dots == 0, name
