"""Forget gates: every kernel with them against the dense reference, and what gates may hold."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime import attention_op
from fastgrad_compiler.runtime.decay import Decays, running_sum, sum_of_later
from fastgrad_compiler.runtime.documents import document_runs
from fastgrad_compiler.runtime.exact_attention import exact_attention
from tests import dense
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs, named, run_dense, run_kernel, worst_error
from tests.kernels.leaks import gates_of

DOUBLE = 1e-12  # float64: sums of some dozen terms of size 1
FORGET = KernelSpec(3, 4, COEFFICIENTS[2], causal=True, scale=0.7, chunk=8, forget=True)
WINDOW = KernelSpec(3, 4, (), causal=True, scale=0.7, window=5, forget=True)
SLOW = pytest.mark.slow
FIELDS = [(None, None), (8, None), (5, None), (3, 3), (16, 3), (64, 2)]  # near, near_d
SHAPES = [(1, 2, 8), (37, 1, 8), (70, 2, 16), (64, 3, 64)]  # n, groups, chunk
MASKS = list(itertools.product((False, True), repeat=2))  # padding, documents
PAIRS = [  # masks, field: all fields with both masks, all masks without a field, some fields without a mask
    *(((True, True), field) for field in FIELDS),
    *((masks, (None, None)) for masks in MASKS[:3]),
    *(((False, False), field) for field in ((5, None), (16, 3))),
]
KINDS = {
    "causal": FORGET,
    "padding": replace(FORGET, padding=True),
    "documents": replace(FORGET, documents=True, padding=True),
    "near": replace(FORGET, near=5, near_d=3, padding=True),
}


def run_exact(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
    """Output and gradients of exact attention."""
    options: dict[str, Any] = {"scale": spec.scale, "causal": True, "window": spec.window, "near": spec.near}
    options |= {"mask": inputs.mask, "documents": inputs.documents, **inputs.named}
    q, k, v = inputs.tensors[:3]
    out = exact_attention(q, k, v, **options)
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]


def with_gates(inputs: Inputs, log_gate: Tensor | float) -> Inputs:
    """The same with other gates."""
    gates = torch.zeros_like(inputs.tensors[-1]) + log_gate
    return replace(inputs, tensors=(*inputs.tensors[:-1], gates.detach().requires_grad_()))


def errors(spec: KernelSpec, inputs: Inputs) -> tuple[float, float]:
    """Of a polynomial and of exact attention."""
    exactly = run_dense(spec, inputs, exact=True)
    found = worst_error(run_kernel(spec, inputs, exact_below=1000), exactly)
    return worst_error(run_kernel(spec, inputs), run_dense(spec, inputs)), found


# ---------------------------------------------------------------- values and gradients


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("masks", "field"),
    [pytest.param(*each, marks=[] if each in PAIRS else [SLOW]) for each in itertools.product(MASKS, FIELDS)],
    ids=str,
)
def test_matches_dense_reference(masks: tuple[bool, bool], field: tuple[int | None, int | None]) -> None:
    (padding, documents), (near, near_d) = masks, field
    spec = replace(FORGET, padding=padding, documents=documents, near=near, near_d=near_d)
    for n, groups, chunk in SHAPES:
        inputs = make_inputs(spec, n, groups=groups)
        assert max(errors(replace(spec, chunk=chunk), inputs)) < DOUBLE


@pytest.mark.parametrize("degree", [1, 3, 6])
def test_other_degrees(degree: int) -> None:
    spec = replace(FORGET, coefficients=COEFFICIENTS[degree], padding=True)
    assert max(errors(spec, make_inputs(spec, 41, groups=2))) < DOUBLE


@pytest.mark.parametrize(("padding", "documents"), MASKS)
def test_windows(padding: bool, documents: bool) -> None:
    for n, window in ((1, 1), (41, 1), (41, 5), (200, 70)):
        spec = replace(WINDOW, window=window, padding=padding, documents=documents)
        inputs = make_inputs(spec, n, groups=2)
        q, k, v = inputs.tensors[:3]
        given: dict[str, Any] = {"mask": inputs.mask, "documents": inputs.documents, **inputs.named}
        out = dense.softmax_attention(q, k, v, scale=0.7, causal=True, window=window, **given)
        expected = [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]
        assert worst_error(run_exact(spec, inputs), expected) < DOUBLE
        out = load_kernel(spec)(q, k, v, **given)
        found = [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]
        assert worst_error(found, expected) < DOUBLE


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunk_does_not_matter(kind: str) -> None:
    spec = KINDS[kind]
    inputs = make_inputs(spec, 61)
    expected = run_kernel(spec, inputs)
    for chunk in (1, 3, 6, 61, 200):
        assert worst_error(run_kernel(replace(spec, chunk=chunk), inputs), expected) < DOUBLE


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_worked_in_groups(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KINDS[kind]
    inputs = make_inputs(spec, 50, batch=3, heads=5, groups=2)
    expected = [run_kernel(spec, inputs), run_kernel(spec, inputs, exact_below=1000)]
    for budget in (1, 10**5):
        monkeypatch.setattr(attention_op, "WORK_BYTES", budget)
        monkeypatch.setattr("fastgrad_compiler.runtime.exact_blocks.WORK_BYTES", budget)
        assert worst_error(run_kernel(spec, inputs), expected[0]) < DOUBLE
        assert worst_error(run_kernel(spec, inputs, exact_below=1000), expected[1]) < DOUBLE


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["causal", "near"])
def test_gradcheck(kind: str) -> None:
    spec = replace(KINDS[kind], chunk=2)
    spec = spec if spec.near is None else replace(spec, near=1, near_d=2)
    inputs = make_inputs(spec, 5, batch=1, heads=1, groups=2)

    def attend(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return load_kernel(spec)(q, k, v, **named(more), mask=inputs.mask)

    assert torch.autograd.gradcheck(attend, inputs.tensors, check_forward_ad=True)


@pytest.mark.medium
def test_compile_without_graph_breaks() -> None:
    attend = load_kernel(FORGET)

    def loss(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        gates = logsigmoid(x)
        return (attend(q, k, v, log_gate=gates) + exact_attention(q, k, v, log_gate=gates, causal=True)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 19):
        tensors = make_inputs(FORGET, n).tensors
        found, expected = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss))
        torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- precisions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_other_precisions(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Gates keep their precision and their gradient's where q, k and v have less."""
    spec = replace(KINDS[kind], chunk=None)
    made = make_inputs(spec, 300)
    gates = (made.tensors[-1] / 10).detach().float().requires_grad_()
    inputs = made.to(dtype)
    inputs = replace(inputs, tensors=(*inputs.tensors[:-1], gates))
    wide = inputs.to(torch.float64)
    for exact in (False, True):
        found = run_kernel(spec, inputs, 1000 if exact else 0)
        assert {x.dtype for x in found[:-1]} == {dtype}
        assert found[-1].dtype == torch.float32
        assert worst_error(found, run_dense(spec, wide, exact=exact)) < tolerance


def test_arithmetic_in_float64_takes_gates_along() -> None:
    spec = replace(KINDS["near"], precision="float64")
    inputs = make_inputs(spec, 60).to(torch.float32)
    found = run_kernel(spec, inputs)
    assert {x.dtype for x in found} == {torch.float32}
    assert worst_error(found, run_kernel(spec, inputs.to(torch.float64))) < 4 * 2.0**-24


@pytest.mark.medium
def test_a_gate_that_hardly_forgets_over_a_long_sequence() -> None:
    """e^-1e-4 a token, 100,000 tokens: with gates that are added up one by one in float32 all is off by 4e-4 here."""
    spec = KernelSpec(2, 2, COEFFICIENTS[2], causal=True, forget=True)
    inputs = with_gates(make_inputs(spec, 100_000, batch=1, heads=1), -1e-4)
    wide, found = run_kernel(spec, inputs), run_kernel(spec, inputs.to(torch.float32))
    for a, b in zip(found, wide, strict=True):
        assert (a.detach().double() - b.detach()).norm() < 1e-5 * b.detach().norm()


def test_the_gradient_of_gates_does_not_drown_in_the_rounding_of_outputs() -> None:
    """In bfloat16 the sum over a row of weights times their gradients is not 0, and a gate is in thousands of rows.

    The gradient of the keys alone, which would do in real arithmetic, is off by more than a tenth here.
    """
    spec = replace(FORGET, dv=16, chunk=None)
    made = make_inputs(spec, 2048, batch=1, heads=1)
    q, k, v, gates = made.tensors
    given = replace(made, tensors=(q, k, v + 1.0, gates * 0.5)).to(torch.bfloat16)
    for below in (0, 10_000):
        found, wide = (run_kernel(spec, x, below)[-1] for x in (given, given.to(torch.float64)))
        assert (found.double() - wide).norm() < 0.03 * wide.norm()


# ---------------------------------------------------------------- what gates may hold


@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_0_forget_nothing(kind: str) -> None:
    spec = KINDS[kind]
    inputs = with_gates(make_inputs(spec, 50, groups=2), 0.0)
    plain = replace(inputs, tensors=inputs.tensors[:-1])
    for below in (0, 1000):
        expected = run_kernel(replace(spec, forget=False), plain, below)
        assert worst_error(run_kernel(spec, inputs, below)[:-1], expected) < 1e-14


STRONG = [
    (-80.0, torch.float64),
    (-1000.0, torch.bfloat16),
    (-1e30, torch.float32),
    (-torch.inf, torch.float32),
]
GATES = (-80.0, -1000.0, -1e30, -torch.inf)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("gate", "dtype"),
    [
        pytest.param(*each, marks=[] if each in STRONG else [SLOW])
        for each in itertools.product(GATES, (torch.float32, torch.float64, torch.bfloat16))
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_strong_gates(kind: str, gate: float, dtype: torch.dtype) -> None:
    """Everywhere, at every third token, and at one: what they leave is what is left, and nothing is lost to underflow.

    A row whose last keys are hidden sees none but forgotten ones.
    """
    spec = KINDS[kind]
    made = make_inputs(spec, 40, groups=2)
    place = torch.arange(40)
    tolerance = {torch.float32: 1e-5, torch.float64: DOUBLE, torch.bfloat16: 3e-2}[dtype]
    for chosen in (place >= 0, place % 3 == 1, place == 20):
        gates = torch.where(chosen, gate, made.tensors[-1].detach())
        inputs = with_gates(made, gates).to(dtype)
        for below in (0, 1000):
            found = run_kernel(spec, inputs, below)
            assert all(torch.isfinite(x).all() for x in found)
            wide = inputs.to(torch.float64)
            assert worst_error(found, run_dense(spec, wide, exact=below > 0)) < tolerance


def test_a_gate_that_forgets_everything_begins_a_document() -> None:
    packed = replace(FORGET, documents=True)
    inputs = make_inputs(packed, 40)
    assert inputs.documents is not None
    begins = torch.nn.functional.pad(inputs.documents.diff(dim=1) != 0, (1, 0))
    gates = inputs.tensors[-1].detach().masked_fill(begins[:, None], -torch.inf)
    cut = replace(with_gates(inputs, gates), documents=None)
    for below in (0, 1000):
        found = run_kernel(FORGET, cut, below)
        assert worst_error(found, run_kernel(packed, inputs, below)) < DOUBLE


def test_alone_a_token_sees_itself() -> None:
    inputs = with_gates(make_inputs(FORGET, 40), -torch.inf)
    for below in (0, 1000):
        torch.testing.assert_close(
            run_kernel(FORGET, inputs, below)[0], inputs.tensors[2], rtol=1e-14, atol=0
        )


def test_a_gate_above_0_counts_as_0() -> None:
    inputs = make_inputs(FORGET, 40)
    above = inputs.tensors[-1] > -0.1
    gates = torch.where(above, 0.5, inputs.tensors[-1].detach())
    found = run_kernel(FORGET, with_gates(inputs, gates))
    expected = run_kernel(FORGET, with_gates(inputs, gates.clamp(max=0.0)))
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], expected, strict=False))
    assert not found[-1][above].any()
    assert torch.equal(found[-1][~above], expected[-1][~above])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("below", [0, 1000])
def test_a_gate_of_nan_is_of_the_rows_that_see_across_it(below: int, dtype: torch.dtype) -> None:
    """Not of earlier rows, of another document's, of those whose keys are all after it, or all before it."""
    spec = KINDS["documents"]
    made = make_inputs(spec, 30)
    documents = (torch.arange(30) >= 20).long().expand(2, 30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :4] = mask[1, 12:] = False
    made = replace(made, documents=documents, mask=mask).to(dtype)
    expected = run_kernel(spec, made, below)
    for token, spoilt in ((0, []), (3, [[], [*range(3, 20)]]), (14, [[*range(14, 20)], []]), (20, [])):
        gates = made.tensors[-1].detach().clone()
        gates[:, :, token] = torch.nan
        found = run_kernel(spec, with_gates(made, gates), below)
        for row, rows in enumerate(spoilt or [[], []]):
            dirty = torch.zeros(30, dtype=torch.bool)
            dirty[rows] = True
            assert torch.isnan(found[0][row, :, dirty]).all()
            assert torch.equal(torch.isnan(found[0][row]).any(0).any(-1), dirty), (token, row)
            torch.testing.assert_close(found[0][row, :, ~dirty], expected[0][row, :, ~dirty])
            gradient = found[-1][row]
            crossed = torch.zeros(30, dtype=torch.bool)
            if rows:  # from the first visible key on, up to the last row
                crossed[1 if row else 5 : 12 if row else 20] = True
            assert torch.equal(torch.isnan(gradient), crossed.expand_as(gradient)), (token, row)


@pytest.mark.parametrize("below", [0, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_that_no_query_sees_across_decides_nothing(kind: str, below: int) -> None:
    """No key before it in its document is visible, or none from it on: no bit depends on it, and its gradient is 0."""
    spec = KINDS[kind]
    inputs = make_inputs(spec, 40)
    hidden = dense.hidden_pairs(40, 40, True, None, inputs.mask, inputs.documents).expand(2, 1, 40, 40)[:, 0]
    crossed = gates_of(~hidden).any(1)[:, None].expand(inputs.tensors[-1].shape)
    others = torch.where(crossed, inputs.tensors[-1].detach(), -3.0)
    found, expected = (run_kernel(spec, x, below) for x in (with_gates(inputs, others), inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(expected[-1] != 0, crossed)


def test_what_is_hidden_decides_no_bit_of_a_gate() -> None:
    """Values of 1e30 in another document, whose rows add up to 0 in real arithmetic alone."""
    spec = replace(KINDS["documents"], padding=False)
    inputs = replace(make_inputs(spec, 40), documents=(torch.arange(40) >= 21).long().expand(2, 40))
    for below in (0, 1000):
        for dtype, huge in ((torch.float32, 1e30), (torch.float64, 1e200)):
            given = inputs.to(dtype)
            values = given.tensors[2].detach().clone()
            values[:, :, 30] = huge
            tensors = (*given.tensors[:2], values.requires_grad_(), given.tensors[3])
            expected = run_kernel(spec, given, below)[-1]
            found = run_kernel(spec, replace(given, tensors=tensors), below)[-1]
            assert torch.equal(found[..., :21], expected[..., :21])
            assert not torch.equal(found[..., 21:], expected[..., 21:])


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 1000])
def test_running_sums(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=generator)
    ids = (torch.rand(2, n, generator=generator) < 0.05).cumsum(1)
    for runs in (None, document_runs(ids)):
        own = runs if runs is not None else torch.zeros(2, n, dtype=torch.int64)
        earlier = ((own[:, :, None] == own[:, None]) & torch.ones(n, n).tril().bool()).double()
        torch.testing.assert_close(running_sum(x, runs), torch.einsum("bhj,bij->bhi", x, earlier))
        torch.testing.assert_close(sum_of_later(x, runs), torch.einsum("bhi,bij->bhj", x, earlier))


def test_no_factor_is_above_1() -> None:
    """Sums may rise from a document to the next: what such a factor is for is 0, and 0 times infinity is not."""
    decays = Decays(torch.tensor([0.0, -900.0, 0.0, -1e-3], dtype=torch.float64)[None, None], torch.float32)
    whole = slice(0, 4)
    for factor in (
        decays.log_pairs(whole, whole).exp(),
        decays.since(1, whole),
        decays.until(3, whole),
        decays.between(1, 2),
    ):
        assert torch.isfinite(factor).all()
        assert factor.max() <= 1.0


# ---------------------------------------------------------------- refusals


def test_refusals() -> None:
    q, k, v, gates = make_inputs(FORGET, 9, groups=2).tensors
    attend = load_kernel(FORGET)
    with pytest.raises(ValueError, match=r"log_gate has shape \[2, 2, 8\], expected \[.., kv_heads, n\]"):
        attend(q, k, v, log_gate=gates[..., 1:])
    with pytest.raises(ValueError, match="log_gate has shape"):
        attend(q, k, v, log_gate=gates.repeat_interleave(2, 1))
    with pytest.raises(ValueError, match="made for forget = 1, not 0"):
        attend(q, k, v)
    with pytest.raises(ValueError, match="made for forget = 0, not 1"):
        load_kernel(replace(FORGET, forget=False))(q, k, v, log_gate=gates)
    with pytest.raises(ValueError, match="log_gate is of causal attention"):
        exact_attention(q, k, v, log_gate=gates)
    with pytest.raises(ValueError, match="give `causal` too"):
        replace(FORGET, causal=False)
