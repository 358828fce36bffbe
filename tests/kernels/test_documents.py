"""Packed documents in kernels and in exact attention: the dense reference, boundaries at every place, no leak."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime import attention_op
from fastgrad_compiler.runtime.documents import document_ranges, document_runs
from fastgrad_compiler.runtime.exact_attention import exact_attention
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs, run_dense, run_kernel, worst_error

DOUBLE = 1e-11  # float64: sums of some hundred terms of size 1, gradients of size 10
MASKS = list(itertools.product((False, True), repeat=2))  # causal, padding
FIELDS = [(None, None), (8, None), (5, None), (3, 3), (16, 3), (64, 2), (1, None)]  # near, near_d


def packed(
    causal: bool, padding: bool = False, near: int | None = None, near_d: int | None = None
) -> KernelSpec:
    return KernelSpec(3, 5, COEFFICIENTS[2], causal, padding, near, near_d, 0.7, chunk=8, documents=True)


def of_lengths(*rows: list[int]) -> Tensor:
    """Ids of documents of these lengths; every third document has the same id."""
    return torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)) % 3, torch.tensor(row)) for row in rows]
    )


@pytest.mark.parametrize(("near", "near_d"), FIELDS)
@pytest.mark.parametrize(("causal", "padding"), MASKS)
@pytest.mark.parametrize(
    ("chunk", "n", "groups"),
    [
        (8, 37, 1),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 20, 2), (16, 50, 2), (64, 37, 1))),
    ],
)
def test_matches_dense_reference(
    causal: bool, padding: bool, near: int | None, near_d: int | None, chunk: int, n: int, groups: int
) -> None:
    spec = replace(packed(causal, padding, near, near_d), chunk=chunk)
    inputs = make_inputs(spec, n, groups=groups, batch=3)
    assert worst_error(run_kernel(spec, inputs), run_dense(spec, inputs)) < DOUBLE
    exact = run_kernel(spec, inputs, exact_below=1000)
    assert worst_error(exact, run_dense(spec, inputs, exact=True)) < DOUBLE


@pytest.mark.parametrize("near", [None, 4, 8])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [
        [[1] * 32, [32]],
        [[8, 8, 16], [16, 8, 8]],
        [[7, 1, 1, 7, 16], [9, 14, 1, 1, 7]],
        [[31, 1], [1, 31]],
        [[4, 4, 4, 4, 16], [3, 5, 24]],
    ],
    ids=["one token", "edges of tiles", "around edges", "first and last", "edges of blocks"],
)
def test_boundaries_anywhere(lengths: list[list[int]], causal: bool, near: int | None) -> None:
    spec = packed(causal, near=near)
    inputs = replace(make_inputs(spec, 32), documents=of_lengths(*lengths))
    assert worst_error(run_kernel(spec, inputs), run_dense(spec, inputs)) < DOUBLE


@pytest.mark.parametrize("near", [None, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 33])
def test_one_document_is_no_document(causal: bool, near: int | None, n: int) -> None:
    spec = packed(causal, near=near)
    inputs = replace(make_inputs(spec, n), documents=torch.full((2, n), 7))
    plain = replace(spec, documents=False)
    expected = run_kernel(plain, replace(inputs, documents=None))
    assert worst_error(run_kernel(spec, inputs), expected) < 1e-12


@pytest.mark.parametrize("exact_below", [0, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_documents_are_as_if_alone(causal: bool, exact_below: int) -> None:
    """Also where the id of the first comes again: documents are runs."""
    spec = packed(causal)
    lengths = [11, 1, 20, 8]
    inputs = make_inputs(spec, 40, batch=1)
    inputs = replace(inputs, documents=of_lengths(lengths))
    whole = run_kernel(spec, inputs, exact_below)
    plain = replace(spec, documents=False)
    for start, stop in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        part = Inputs(
            tuple(x[:, :, start:stop].detach().requires_grad_() for x in inputs.tensors),
            None,
            inputs.cotangent[:, :, start:stop],
        )
        found = [x[:, :, start:stop] for x in whole]
        assert worst_error(found, run_kernel(plain, part, exact_below)) < 1e-12


@pytest.mark.parametrize(("near", "near_d"), [(None, None), (5, 3), (8, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_leaks(causal: bool, near: int | None, near_d: int | None) -> None:
    """The gradient of one document's output is exactly 0 on every other document."""
    spec = packed(causal, near=near, near_d=near_d)
    inputs = replace(make_inputs(spec, 40, batch=1), documents=of_lengths([11, 1, 20, 8]))
    q, k, v = inputs.tensors[:3]
    out = load_kernel(spec)(q, k, v, **inputs.named, documents=inputs.documents)
    for gradient in torch.autograd.grad(out[:, :, 12:32].square().sum(), inputs.tensors):
        assert not gradient[:, :, :12].any()
        assert not gradient[:, :, 32:].any()
        assert gradient[:, :, 12:32].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("near", [5, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_large_near_logits(causal: bool, near: int, dtype: torch.dtype) -> None:
    """Near logits of +-60: e^60 of one document must not weigh against the far sums of another."""
    spec = packed(causal, True, near, 3)
    inputs = make_inputs(spec, 50, local_size=60.0)
    found = run_kernel(spec, inputs.to(dtype))
    assert all(torch.isfinite(x).all() for x in found)
    # The derivative of exp at logits of 60 turns their rounding, 60 * 2^-24, into a relative error of 4e-6.
    tolerance = 2e-4 if dtype == torch.float32 else DOUBLE
    assert worst_error(found, run_dense(spec, inputs)) < tolerance


@pytest.mark.sampled(1)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("near", [None, 6])
def test_schedule_does_not_matter(causal: bool, near: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = packed(causal, True, near)
    inputs = make_inputs(spec, 61, heads=3, batch=3)
    expected = run_kernel(spec, inputs)
    for chunk in (1, 3, 6, 16, 200):
        assert worst_error(run_kernel(replace(spec, chunk=chunk), inputs), expected) < 1e-12
    for budget in (1, 10**5):
        monkeypatch.setattr(attention_op, "WORK_BYTES", budget)
        assert worst_error(run_kernel(spec, inputs), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    spec = packed(True)
    inputs = make_inputs(spec, 20)
    assert inputs.documents is not None
    expected = run_kernel(spec, inputs)
    found = run_kernel(spec, replace(inputs, documents=inputs.documents.to(dtype)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_leading_dimensions_of_ids() -> None:
    spec = packed(True)
    inputs = make_inputs(spec, 12, batch=6)
    q, k, v = (x.detach() for x in inputs.tensors)
    documents, attend = inputs.documents, load_kernel(spec)
    assert documents is not None
    expected = attend(q, k, v, documents=documents)
    several = attend(*(x.unflatten(0, (2, 3)) for x in (q, k, v)), documents=documents.unflatten(0, (2, 3)))
    assert torch.equal(several, expected.unflatten(0, (2, 3)))
    assert torch.equal(attend(q[4], k[4], v[4], documents=documents[4]), expected[4])


def test_wrong_ids_are_value_errors() -> None:
    q, k, v = (x.detach() for x in make_inputs(packed(False), 9).tensors)
    ids = torch.zeros(2, 9, dtype=torch.int64)
    cases: list[tuple[str, tuple[Tensor, ...], Tensor | None]] = [
        ("integer ids", (q, k, v), ids.double()),
        ("integer ids", (q, k, v), ids > 0),
        ("documents has shape", (q, k, v), ids[:, :4]),
        ("documents has shape", (q, k, v), ids[:1]),
        ("tokens to each other", (q[:, :, :4], k, v), ids[:, :4]),
        ("documents = 1, not 0", (q, k, v), None),
    ]
    for message, tensors, documents in cases:
        with pytest.raises(ValueError, match=message):
            load_kernel(packed(False))(*tensors, documents=documents)
    with pytest.raises(ValueError, match="documents = 0, not 1"):
        load_kernel(replace(packed(False), documents=False))(q, k, v, documents=ids)
    with pytest.raises(ValueError, match="integer ids"):
        exact_attention(q, k, v, documents=ids.float())


def test_runs_and_ranges() -> None:
    runs = document_runs(torch.tensor([[4, 4, 0, 4, 4, 4], [1, 1, 1, 1, 1, 1]], dtype=torch.uint8))
    assert runs.tolist() == [[0, 0, 1, 2, 2, 2], [0] * 6]
    first, behind = document_ranges(runs)
    assert first.tolist() == [[0, 0, 2, 3, 3, 3], [0] * 6]
    assert behind.tolist() == [[2, 2, 3, 6, 6, 6], [6] * 6]
