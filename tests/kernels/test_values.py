"""Kernels against the dense reference: output and all gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime import attention_op
from tests.kernels.inputs import COEFFICIENTS, make_inputs, run_dense, run_kernel, worst_error

DOUBLE = 1e-11  # float64: sums of some hundred terms of size 1, gradients of size 10
SHAPES = [  # d, dv, degree, chunk, n, m, groups
    (3, 5, 2, 8, 37, 23, 1),
    (4, 3, 4, 16, 50, 70, 2),
    (2, 4, 1, None, 7, 40, 1),
    (3, 2, 3, 8, 1, 1, 2),
    (5, 1, 2, 8, 64, 64, 3),
    (1, 2, 5, 4, 37, 9, 1),
    (2, 3, 6, 32, 5, 5, 1),
]
MASKS = list(itertools.product((False, True), repeat=2))  # causal, padding
FIELDS = [(None, None), (8, None), (5, None), (3, 3), (16, 3), (64, 2)]  # near, near_d


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("near", "near_d"), FIELDS)
@pytest.mark.parametrize(("causal", "padding"), MASKS)
@pytest.mark.parametrize(
    ("d", "dv", "degree", "chunk", "n", "m", "groups"),
    [*SHAPES[:2], *(pytest.param(*shape, marks=pytest.mark.slow) for shape in SHAPES[2:])],
)
def test_matches_dense_reference(
    d: int,
    dv: int,
    degree: int,
    chunk: int | None,
    n: int,
    m: int,
    groups: int,
    causal: bool,
    padding: bool,
    near: int | None,
    near_d: int | None,
) -> None:
    spec = KernelSpec(d, dv, COEFFICIENTS[degree], causal, padding, near, near_d, scale=0.7, chunk=chunk)
    inputs = make_inputs(spec, n, n if causal else m, groups=groups)
    assert worst_error(run_kernel(spec, inputs), run_dense(spec, inputs)) < DOUBLE
    exact = run_kernel(spec, inputs, exact_below=1000)
    assert worst_error(exact, run_dense(spec, inputs, exact=True)) < DOUBLE


@pytest.mark.parametrize(("near", "near_d"), [(None, None), (2, None), (1, 3), (16, 3)])
@pytest.mark.parametrize(("causal", "padding"), MASKS)
def test_sequences_shorter_than_a_chunk(
    causal: bool, padding: bool, near: int | None, near_d: int | None
) -> None:
    spec = KernelSpec(3, 2, COEFFICIENTS[3], causal, padding, near, near_d, scale=0.7, chunk=8)
    for n, m in ((1, 1), (2, 2), (7, 7), (1, 5), (5, 1)):
        inputs = make_inputs(spec, n, n if causal else m, groups=2)
        assert worst_error(run_kernel(spec, inputs), run_dense(spec, inputs)) < DOUBLE


@pytest.mark.slow
@pytest.mark.parametrize(("near", "near_d"), [(None, None), (16, 4), (48, None), (31, 4), (97, 4), (256, 4)])
@pytest.mark.parametrize(("causal", "padding"), MASKS)
@pytest.mark.parametrize(("d", "degree"), [(16, 2), (16, 3), (8, 4), (4, 6), (64, 2)])
@pytest.mark.parametrize("n", [1, 127, 300, 515])
def test_matches_dense_reference_at_the_chosen_chunk(
    d: int, degree: int, causal: bool, padding: bool, near: int | None, near_d: int | None, n: int
) -> None:
    spec = KernelSpec(d, 24, COEFFICIENTS[degree], causal, padding, near, near_d)
    inputs = make_inputs(spec, n, n if causal else 400, groups=2, batch=1)
    assert worst_error(run_kernel(spec, inputs), run_dense(spec, inputs)) < DOUBLE


@pytest.mark.parametrize(
    "spec",
    [
        KernelSpec(16, 64, COEFFICIENTS[2], causal=True),
        KernelSpec(8, 16, COEFFICIENTS[3]),
        KernelSpec(8, 16, COEFFICIENTS[2], causal=True, near=64, near_d=4),
        KernelSpec(8, 16, COEFFICIENTS[2], near=24, near_d=4, padding=True),
    ],
    ids=["causal", "unmasked", "causal near", "padded near"],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)]
)
def test_other_precisions(spec: KernelSpec, dtype: torch.dtype, tolerance: float) -> None:
    """bfloat16 keeps 8 bits and float16 11: the output is rounded to it, the state is not."""
    inputs = make_inputs(spec, 300).to(dtype)
    found = run_kernel(spec, inputs)
    assert all(x.dtype == dtype for x in found)
    assert worst_error(found, run_dense(spec, inputs.to(torch.float64))) < tolerance


def test_low_precision_does_not_accumulate_in_low_precision() -> None:
    """A bfloat16 sum of 4096 ones would stop at 256; the mean of ones is 1 whatever the length."""
    spec = KernelSpec(4, 2, COEFFICIENTS[2])
    inputs = make_inputs(spec, 4, 4096).to(torch.bfloat16)
    q, k, _ = inputs.tensors
    ones = torch.ones(2, 2, 4096, 2, dtype=torch.bfloat16)
    assert torch.equal(load_kernel(spec)(q, k, ones), torch.ones(2, 2, 4, 2, dtype=torch.bfloat16))


@pytest.mark.medium
@pytest.mark.parametrize(("near", "near_d"), [(None, None), (6, None), (6, 3), (32, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_chunk_does_not_matter(causal: bool, near: int | None, near_d: int | None) -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[3], causal, True, near, near_d, chunk=1)
    inputs = make_inputs(spec, 61)
    expected = run_kernel(spec, inputs)
    for chunk in (2, 3, 6, 7, 16, 61, 64, 200):
        assert worst_error(run_kernel(replace(spec, chunk=chunk), inputs), expected) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("near", [None, 4, 16])
def test_rows_that_see_no_key_give_zero(causal: bool, near: int | None) -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal, True, near, chunk=8)
    inputs = make_inputs(spec, 40)
    assert inputs.mask is not None
    inputs.mask[1] = False
    for exact_below in (0, 1000):
        for tensor in run_kernel(spec, inputs, exact_below):
            assert torch.equal(tensor[1], torch.zeros_like(tensor[1]))
            assert torch.isfinite(tensor).all()
            assert tensor[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("near", [5, 16])
def test_large_near_logits_do_not_overflow(causal: bool, near: int, dtype: torch.dtype) -> None:
    """Near logits of +-300: exp overflows even float64 at 710 only after m is subtracted wrongly, float32 at 89."""
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal, True, near, 3, chunk=16)
    inputs = make_inputs(spec, 50, local_size=300.0)
    found = run_kernel(spec, inputs.to(dtype))
    assert all(torch.isfinite(x).all() for x in found)
    # The derivative of exp at logits of 300 turns their rounding, 300 * 2^-24, into a relative error of 2e-5.
    tolerance = 1e-3 if dtype == torch.float32 else DOUBLE
    assert worst_error(found, run_dense(spec, inputs)) < tolerance


def test_many_rows_are_worked_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small budget splits batch and heads into rectangles, and shortens the tile; the result is the same."""
    spec = KernelSpec(3, 4, COEFFICIENTS[2], True, True, 8, 3, chunk=32)
    inputs = make_inputs(spec, 50, batch=3, heads=5, groups=2)
    expected = run_kernel(spec, inputs)
    for budget in (1, 10**5, 3 * 10**5):
        monkeypatch.setattr(attention_op, "WORK_BYTES", budget)
        assert worst_error(run_kernel(spec, inputs), expected) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_below_break_even_it_is_sdpa_in_both_passes(causal: bool) -> None:
    spec = KernelSpec(4, 3, COEFFICIENTS[2], causal, scale=0.7)
    inputs = make_inputs(spec, 21, 21 if causal else 9, groups=2)
    q, k, v = inputs.tensors
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.7, enable_gqa=True)
    expected = [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]
    assert (
        worst_error(run_kernel(spec, inputs, exact_below=22), expected) < DOUBLE
    )  # 22 is more than both lengths
    for exact_below in (0, 21):
        found = run_kernel(spec, inputs, exact_below)
        assert worst_error(found, run_dense(spec, inputs)) < DOUBLE
        assert worst_error(found, expected) > 1e-3
