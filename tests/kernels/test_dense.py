"""A polynomial of the model's own below its break-even length: all pairs are met one by one, with the same weights."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime import attention_op, polynomial_attention, selection
from fastgrad_compiler.runtime.attention_op import FLOATS
from fastgrad_compiler.runtime.polynomial_attention import backward, forward
from fastgrad_compiler.runtime.polynomial_rows import Rows
from fastgrad_compiler.runtime.sight import Sight
from fastgrad_compiler.runtime.tangent import polynomial_tangent
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs, run_dense, run_kernel, worst_error
from tests.kernels.leaks import KINDS, attack
from tests.kernels.test_memory import LargestStorage, largest
from tests.kernels.test_transforms import detached, kernel_and_dense, of_tensors, random_like

DOUBLE = 1e-11
LONGER = 1000  # than all sequences here
OWN = KernelSpec(3, 5, COEFFICIENTS[4], scale=0.7, chunk=8, own=True)
MASKS: list[dict[str, Any]] = [
    {"causal": causal, "padding": padding, "documents": documents, "forget": forget}
    for causal, padding, documents, forget in itertools.product((False, True), repeat=4)
    if causal or not forget
]
FIELDS = [(None, None), (8, None), (5, None), (3, 3), (16, 3), (64, 2)]  # near, near_d


def named(masks: dict[str, Any]) -> str:
    return ", ".join(key for key, value in masks.items() if value) or "unmasked"


def run(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
    return run_kernel(spec, inputs, exact_below=LONGER)


@pytest.mark.sampled(20)
@pytest.mark.parametrize("masks", MASKS, ids=named)
@pytest.mark.parametrize(("near", "near_d"), FIELDS)
def test_matches_the_dense_reference(masks: dict[str, Any], near: int | None, near_d: int | None) -> None:
    """Output and all gradients, and the states' too: nothing but rounding tells them apart."""
    for n, m, groups in ((37, 23, 1), (21, 50, 2), (1, 1, 2)):
        spec = replace(OWN, near=near, near_d=near_d, **masks)
        inputs = make_inputs(spec, n, n if spec.causal or spec.documents else m, groups=groups)
        found, expected = run(spec, inputs), run_dense(spec, inputs)
        assert worst_error(found, expected) < DOUBLE
        assert worst_error(found, run_kernel(spec, inputs)) < DOUBLE


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
def test_degrees_and_tiles(degree: int, chunk: int | None) -> None:
    for near in (None, 5):
        spec = KernelSpec(4, 3, COEFFICIENTS[degree], True, True, near, scale=0.7, chunk=chunk, own=True)
        inputs = make_inputs(spec, 70, groups=2)
        assert worst_error(run(spec, inputs), run_dense(spec, inputs)) < DOUBLE


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)]
)
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    for spec in (
        KernelSpec(8, 16, COEFFICIENTS[4], causal=True, own=True),
        replace(OWN, near=8, padding=True),
    ):
        inputs = make_inputs(spec, 300).to(dtype)
        found = run(spec, inputs)
        assert all(x.dtype == dtype for x in found)
        assert worst_error(found, run_dense(spec, inputs.to(torch.float64))) < tolerance


class _Refusing:
    """Kernels of a device, which are not to be asked."""

    def forward(self, *inputs: Any) -> None:
        raise AssertionError

    def backward(self, gradient: Tensor, *inputs: Any) -> None:
        raise AssertionError


def test_the_length_decides_on_either_side_and_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []

    def watched(*arguments: Any) -> Rows:
        rows = Rows(*arguments)
        taken.append(rows.dense)
        return rows

    monkeypatch.setattr(polynomial_attention, "Rows", watched)
    spec = replace(OWN, chunk=64)
    for n, m, below, dense in (
        (21, 21, 22, True),
        (21, 21, 21, False),
        (9, 21, 21, False),
        (9, 21, 22, True),
    ):
        inputs = make_inputs(spec, n, m)
        assert worst_error(run_kernel(spec, inputs, below), run_dense(spec, inputs)) < DOUBLE
        assert taken == [dense, dense]
        taken.clear()
    arguments = make_inputs(spec, 21).arguments
    with torch.no_grad():
        saved = forward(spec, [_Refusing()], *arguments, 22)
        backward(spec, [_Refusing()], saved[0], *arguments, *saved, 22)
    with pytest.raises(AssertionError):
        forward(spec, [_Refusing()], *arguments, 21)


def test_a_polynomial_that_stands_in_for_exp_is_exact_there() -> None:
    spec = replace(OWN, own=False)
    inputs = make_inputs(spec, 21)
    assert worst_error(run(spec, inputs), run_dense(spec, inputs, exact=True)) < DOUBLE


@pytest.mark.parametrize("near", [None, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_denominators_that_are_not_positive(causal: bool, near: int | None) -> None:
    """p(s) = s is negative as often as positive, and 0 for a query of zeros, whose row is 0 then: as by states."""
    spec = KernelSpec(3, 5, (0.0, 1.0), causal=causal, near=near, chunk=8, own=True)
    inputs = make_inputs(spec, 37)
    q = inputs.tensors[0].detach().clone()
    q[:, :, [0, 9, 30]] = 0.0
    inputs = replace(inputs, tensors=(q.requires_grad_(), *inputs.tensors[1:]))
    found, states = run(spec, inputs), run_kernel(spec, inputs)
    for one, other in zip(found, states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if near is None:
        assert not found[0][:, :, [0, 9, 30]].any()
        with torch.no_grad():
            denominator = forward(spec, (), *inputs.arguments, LONGER)[1]
        assert (denominator < 0).any()
        assert (denominator > 0).any()
        assert (denominator == 0).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("near", [None, 4])
def test_rows_that_see_no_key_give_zero(causal: bool, near: int | None) -> None:
    spec = replace(OWN, causal=causal, padding=True, near=near)
    inputs = make_inputs(spec, 40)
    assert inputs.mask is not None
    inputs.mask[1] = False
    for tensor in run(spec, inputs):
        assert torch.equal(tensor[1], torch.zeros_like(tensor[1]))
        assert tensor[0].abs().sum() > 0


@pytest.mark.parametrize("near", [5, 16])
def test_large_near_logits_do_not_overflow(near: int) -> None:
    spec = replace(OWN, causal=True, padding=True, near=near, near_d=3)
    inputs = make_inputs(spec, 50, local_size=300.0)
    found = run(spec, inputs.to(torch.float32))
    assert all(x.isfinite().all() for x in found)
    assert worst_error(found, run_dense(spec, inputs)) < 1e-3  # as of states: rounded logits of 300


@pytest.mark.sampled(10)
@pytest.mark.parametrize("masks", MASKS, ids=named)
@pytest.mark.parametrize(("near", "near_d"), [(None, None), (4, None), (4, 2)])
def test_tangents(
    masks: dict[str, Any], near: int | None, near_d: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgrad_compiler.runtime.tangent.TILE", 8)
    spec = replace(OWN, near=near, near_d=near_d, **masks)
    for n, m in ((41, 23), (1, 5)):
        inputs = make_inputs(spec, n, n if spec.causal or spec.documents else m, groups=2)
        _, reference = kernel_and_dense(spec, inputs)
        kernel = of_tensors(load_kernel(spec), inputs, exact_below=LONGER)
        primals = detached(inputs)
        tangents = random_like(primals)
        found, expected = (jvp(f, primals, tangents) for f in (kernel, reference))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "kind",
    [
        *(
            FEW := (
                "causal, padding",
                "near, documents",
                "near of the same logits, causal",
                "forget, documents",
            )
        ),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in FEW),
    ],
)
def test_nothing_hidden_leaks(kind: str) -> None:
    attack(run, replace(KINDS[kind], own=True), torch.float32, every=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["causal, padding", "near, documents, causal"])
def test_nothing_hidden_leaks_in_other_precisions(kind: str, dtype: torch.dtype) -> None:
    attack(run, replace(KINDS[kind], own=True), dtype, groups=2, every=False)


@pytest.mark.parametrize("own", [True, False])
def test_a_device_whose_kernels_select_by_themselves(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not serve short calls, so that these are careful ones."""
    monkeypatch.setattr(selection, "_reads", lambda _: False)

    def run(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
        both = partial(forward, spec, [_Refusing()]), partial(backward, spec, [_Refusing()])
        sight = Sight(spec.causal, degree=spec.degree)
        first, second = selection.selective(*both, sight, maximum=False, on_device=True)
        with torch.no_grad():
            saved = first(*inputs.arguments, LONGER)
            gradients = second(inputs.cotangent, *inputs.arguments, *saved, LONGER)
        return [saved[0], *gradients[:3]]

    attack(run, replace(KINDS["causal, padding"], own=own), torch.float32, every=False)


def test_many_rows_are_worked_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(OWN, causal=True, padding=True, near=8, near_d=3, chunk=32)
    inputs = make_inputs(spec, 50, batch=3, heads=5, groups=2)
    expected = run(spec, inputs)
    for budget in (1, 10**5, 3 * 10**5):
        monkeypatch.setattr(attention_op, "WORK_BYTES", budget)
        assert worst_error(run(spec, inputs), expected) < 1e-12


@pytest.mark.parametrize(
    "masks", [{"causal": True}, {"padding": True}, {"causal": True, "forget": True}], ids=str
)
def test_memory_is_that_of_a_tile_and_its_keys(masks: dict[str, Any]) -> None:
    """Neither n * n nor, of a rank of 20,475, n * r: no feature beyond a token's own components is made."""
    spec, n = KernelSpec(24, 64, COEFFICIENTS[4], own=True, **masks), 2048
    inputs = make_inputs(spec, n, batch=1, heads=1).to(torch.float32)
    record = largest(partial(forward, spec, ()), partial(backward, spec, ()), inputs, n + 1)
    assert record.elements <= 256 * n
    given = inputs.arguments
    with torch.no_grad():
        saved = forward(spec, (), *given, n + 1)
        flag = torch.empty(0, dtype=torch.bool)
        with LargestStorage() as record:
            polynomial_tangent(spec)(*given[:FLOATS], *given, *saved, flag, n + 1, "")
    assert record.elements <= 256 * n
