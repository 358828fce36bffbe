"""Triton kernels in the interpreter against the dense reference in float64, with its arithmetic and its checks.

Every launch is checked for accesses out of bounds, races and lanes that nothing has written; what kernels are to write
is full of NaN before.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks.launches import load_kernels, write_kernels
from fastgrad_compiler.approximation.kernel_tiles import is_fused
from fastgrad_compiler.codegen.triton.configurations import FUSED_KERNELS, KERNELS
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.runtime.triton_attention import Launches
from tests.gpu.interpreter import Launch, install, launches
from tests.grids import wide
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs, run_dense, worst_error

install()

# Of output and gradients, relative to their largest entries: a few units of each type's rounding, 2^-8, 2^-11, 2^-22.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 2e-5}
FIELDS = [(None, None), (32, None), (24, 20)]  # near, near_d
SMALL = [  # as SHAPES: two tiles of features and of dv, several chunks, the last one cut short
    (9, 20, 2, 75, 61, 1),
    (5, 24, 3, 40, 50, 2),
]
SHAPES = [  # d, dv, degree, n, m, query heads of a key head
    (16, 64, 2, 75, 61, 1),
    (8, 20, 3, 50, 90, 2),
    (20, 24, 2, 70, 33, 1),
    (5, 3, 1, 37, 40, 3),
    (3, 7, 4, 65, 1, 1),
    (33, 16, 2, 40, 66, 1),
]
TILES = (32, 16, 32, 4, 1)
SLOW = pytest.mark.slow
FOLDER = TemporaryDirectory()
PAIRS = [  # causal, padding, field, shape: any two values of any two of them occur together
    (True, True, FIELDS[0], SMALL[0]),
    (False, False, FIELDS[0], SMALL[1]),
    (True, False, FIELDS[1], SMALL[0]),
    (False, True, FIELDS[1], SMALL[1]),
    (False, False, FIELDS[2], SMALL[0]),
    (True, True, FIELDS[2], SMALL[1]),
]
GRID = [
    *(pytest.param(*each, torch.bfloat16) for each in PAIRS),
    *(
        pytest.param(*each, marks=SLOW)
        for each in itertools.product((False, True), (False, True), FIELDS, SHAPES, TOLERANCE)
    ),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what is allocated with NaN."""
    empty = Launches._empty

    def poisoned_empty(self: Launches, *arguments: object) -> Tensor:
        return empty(self, *arguments).fill_(torch.nan)  # type: ignore[arg-type]

    monkeypatch.setattr(Launches, "_empty", poisoned_empty)
    monkeypatch.setattr(Launches, "interprets_bfloat16", True)  # as install() makes it


@cache
def kernels_of(spec: KernelSpec) -> ModuleType:
    """Emitted once: the interpreter rewrites the text of a module, function by function, and keeps that."""
    return load_kernels(write_kernels(spec, Path(mkdtemp(dir=FOLDER.name)), "kernels"))


def run(
    spec: KernelSpec,
    inputs: Inputs,
    *,
    chunk: int = 32,
    fused: bool = False,
    tiles: tuple[int, ...] = TILES,
) -> list[Tensor]:
    """Output and the gradients of all inputs."""
    kernels = kernels_of(spec)
    for types in kernels.CONFIGS.values():
        for configurations in types.values():
            configurations.update(dict.fromkeys((*KERNELS, *FUSED_KERNELS), tiles))
    *given, _ = (x if x is None else x.detach() for x in inputs.arguments)
    call = Launches(kernels, spec, *given)  # type: ignore[arg-type]
    call.fused, call.chunk = fused, chunk if spec.near is None else spec.near * -(-chunk // spec.near)
    out, denominator, maximum = call.forward()
    gradients = call.backward(inputs.cotangent.to(out.dtype), out, denominator, maximum)
    return [out, *(g for g in gradients if g.numel())]


def check(spec: KernelSpec, inputs: Inputs, dtype: torch.dtype, found: list[Tensor]) -> None:
    expected = run_dense(spec, inputs.to(dtype).to(torch.float64))
    assert worst_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.medium
@pytest.mark.parametrize(("causal", "padding", "field", "shape", "dtype"), GRID, ids=str)
def test_kernels_agree_with_the_dense_reference(
    causal: bool,
    padding: bool,
    field: tuple[int | None, int | None],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    d, dv, degree, n, m, groups = shape
    spec = KernelSpec(d, dv, COEFFICIENTS[degree], causal, padding, *field, scale=0.7)
    inputs = make_inputs(spec, n, n if causal else m, groups=groups, heads=1, batch=2 if padding else 1)
    check(spec, inputs, dtype, run(spec, inputs.to(dtype)))


ROUNDED = {
    "causal": KernelSpec(9, 24, COEFFICIENTS[2], causal=True, scale=0.7),
    "unmasked": KernelSpec(8, 16, COEFFICIENTS[2]),
    "near": KernelSpec(5, 16, COEFFICIENTS[3], near=24, near_d=4, padding=True),
}
OTHERS = {
    ("unmasked", torch.bfloat16),
    ("unmasked", torch.float16),
    ("near", torch.bfloat16),
    ("near", torch.float32),
}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*each, marks=[SLOW] if each in OTHERS else [])
        for each in itertools.product(ROUNDED, TOLERANCE)
    ],
    ids=str,
)
def test_each_type_is_as_exact_as_its_rounding(name: str, dtype: torch.dtype) -> None:
    spec = ROUNDED[name]
    inputs = make_inputs(spec, 60, groups=2, heads=1, batch=1)
    check(spec, inputs, dtype, run(spec, inputs.to(dtype)))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("d", "dv", "padding", "groups", "dtype"),
    [
        (8, 24, True, 2, torch.bfloat16),
        (5, 64, False, 1, torch.float32),
        (6, 32, False, 3, torch.float32),
        *(
            pytest.param(*each, marks=SLOW)
            for each in [
                (8, 24, True, 2, torch.float32),
                (5, 64, False, 1, torch.bfloat16),
                (8, 32, False, 3, torch.bfloat16),
            ]
        ),
    ],
)
def test_fused_kernels_agree_with_the_dense_reference(
    d: int, dv: int, padding: bool, groups: int, dtype: torch.dtype
) -> None:
    spec = KernelSpec(d, dv, COEFFICIENTS[2], causal=True, padding=padding, scale=0.7)
    assert is_fused(spec)
    for n in (1, 85):
        inputs = make_inputs(spec, n, groups=groups, heads=1)
        with launches() as ran:
            found = run(spec, inputs.to(dtype), fused=True)
        check(spec, inputs, dtype, found)
        names = [launch.kernel for launch in ran]
        expected = ["fused_forward_kernel", "delta_kernel", "fused_query_gradient_kernel"]
        assert names == [*expected, "fused_key_gradient_kernel"]


ODD = [  # causal, near, n, m
    *((False, None, *lengths) for lengths in ((2, 70), (70, 2))),
    *((False, 40, *lengths) for lengths in ((1, 1), (70, 2))),
    *((True, None, *lengths) for lengths in ((1, 1), (33, 33))),
    *((True, 40, *lengths) for lengths in ((2, 70), (33, 33))),
]
LENGTHS = ((1, 1), (2, 70), (70, 2), (33, 33))
EVERY = [(*each[:2], *each[2]) for each in itertools.product((False, True), (None, 8, 40), LENGTHS)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("causal", "near", "n", "m"), wide(EVERY, few=ODD), ids=str)
def test_short_and_odd_sequences(causal: bool, near: int | None, n: int, m: int) -> None:
    spec = KernelSpec(6, 9, COEFFICIENTS[2], causal=causal, near=near)
    inputs = make_inputs(spec, n, n if causal else m, heads=1, batch=1)
    check(spec, inputs, torch.float32, run(spec, inputs.to(torch.float32)))


@pytest.mark.medium
@pytest.mark.parametrize("near", [None, 16])
def test_the_result_does_not_depend_on_the_schedule(near: int | None) -> None:
    spec = KernelSpec(8, 16, COEFFICIENTS[2], causal=True, near=near)
    inputs = make_inputs(spec, 75, heads=1, batch=1).to(torch.float32)
    first = run(spec, inputs)
    others = [
        run(spec, inputs, chunk=64, tiles=(16, 32, 64, 4, 1)),
        run(spec, inputs, chunk=256, tiles=(64, 64, 16, 4, 1)),
    ]
    if near is None:
        others.append(run(spec, inputs, fused=True))
    for other in others:
        assert worst_error(other, [x.double() for x in first]) < TOLERANCE[torch.float32]


@pytest.mark.medium
def test_logits_that_no_exp_could_hold() -> None:
    spec = KernelSpec(8, 16, COEFFICIENTS[2], causal=True, near=16, near_d=4)
    for size in (300.0, -300.0):
        inputs = make_inputs(spec, 60, heads=1, batch=1)
        near_q = inputs.tensors[3].detach() * size
        near_k = inputs.tensors[4].detach().abs()
        tensors = (*inputs.tensors[:3], near_q.requires_grad_(), near_k.requires_grad_())
        inputs = replace(inputs, tensors=tensors).to(torch.float32).to(torch.float64)
        found = run(spec, inputs.to(torch.float32))
        assert all(torch.isfinite(x).all() for x in found)
        assert worst_error(found[:1], run_dense(spec, inputs)[:1]) < 1e-3


def test_an_interpreter_as_it_comes_is_not_trusted_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launches, "interprets_bfloat16", False)
    spec = KernelSpec(8, 16, COEFFICIENTS[2], causal=True)
    inputs = make_inputs(spec, 40, heads=1, batch=1).to(torch.bfloat16)
    out, *_ = run(spec, inputs)
    exact = run_dense(spec, inputs.to(torch.float64))[0]
    assert torch.equal(out, exact.to(torch.bfloat16))


@pytest.mark.medium
def test_views_with_strides_are_read_as_they_are() -> None:
    spec = KernelSpec(8, 16, COEFFICIENTS[2], causal=True)
    inputs = make_inputs(spec, 20, heads=2, batch=2).to(torch.float32)
    strided = tuple(x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs.tensors)
    found = run(spec, replace(inputs, tensors=strided))
    assert all(torch.equal(a, b) for a, b in zip(found, run(spec, inputs), strict=True))


@pytest.mark.medium
def test_the_launches_of_the_parallel_schedule() -> None:
    spec = KernelSpec(8, 16, COEFFICIENTS[2], causal=True)
    inputs = make_inputs(spec, 70, heads=1, batch=2).to(torch.float32)
    with launches() as ran:
        run(spec, inputs)
    rows, chunks, features = 2, 3, 2  # 70 tokens in chunks of 32, 64 features in tiles of 32
    states = [
        Launch("state_kernel", (rows * chunks * features, 1, 1)),
        Launch("scan_kernel", (rows * 2, 1, 1)),
    ]
    assert ran == [
        *states,
        Launch("forward_kernel", (rows * chunks, 1, 1)),
        Launch("delta_kernel", (rows * chunks, 1, 1)),
        *states,
        Launch("query_gradient_kernel", (rows * chunks, 1, 1)),
        *states,
        Launch("key_gradient_kernel", (rows * chunks, 1, 1)),
    ]
