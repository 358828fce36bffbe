"""C++ kernels with forget gates against the dense float64 reference: output and all gradients, those of gates too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.codegen.kernel import KernelSpec, kernel_name, load_kernel
from fastgrad_compiler.runtime.kernel_spec import EVERY_TOKEN
from tests import dense
from tests.grids import wide
from tests.kernels.inputs import COEFFICIENTS, CPP, Inputs, make_inputs, run_dense, worst_error
from tests.kernels.leaks import attack
from tests.native.test_kernels import DOUBLE, SINGLE

pytestmark = pytest.mark.usefixtures("native")

SLOW = pytest.mark.slow
INFINITE = float("inf")

# d, dv, degree, and what else the kernel is made for; degree 0: softmax.
SPECS = {
    "causal": (8, 17, 2, {}),
    "near": (5, 12, 4, {"near": 4, "near_d": 9, "padding": True, "documents": True, "chunk": 16}),
    "blocks of a chunk": (6, 6, 2, {"near": 64, "padding": True}),
    "window": (7, 20, 0, {"window": 40, "padding": True, "documents": True}),
    "every token": (7, 20, 0, {"window": EVERY_TOKEN, "padding": True, "documents": True}),
}
MORE = {
    "one": (1, 1, 1, {}),
    "high": (4, 20, 10, {}),
    "padding, documents": (16, 64, 2, {"padding": True, "documents": True}),
    "padding": (6, 9, 3, {"padding": True, "chunk": 16}),
    "blocks of some chunks": (6, 6, 2, {"near": 100, "near_d": 2}),
    "blocks of a chunk, documents": (6, 6, 2, {"near": 33, "near_d": 3, "documents": True}),
    "small blocks": (6, 6, 2, {"near": 7}),
    "narrow window": (3, 5, 0, {"window": 1}),
    "wide window": (3, 5, 0, {"window": 1000, "padding": True}),
    "every token, no other mask": (3, 5, 0, {"window": EVERY_TOKEN}),
}
MANY = [*SPECS, *(pytest.param(name, marks=SLOW) for name in MORE)]


def specification(name: str) -> KernelSpec:
    d, dv, degree, options = {**SPECS, **MORE}[name]
    coefficients = COEFFICIENTS.get(degree) or tuple(0.6**power for power in range(degree + 1))
    coefficients = coefficients if degree else ()
    return KernelSpec(d, dv, coefficients, causal=True, forget=True, scale=0.8, **options)  # type: ignore[arg-type]


def with_gates(inputs: Inputs, log_gate: Tensor) -> Inputs:
    """The inputs with other gates, [batch, heads, n] or broadcast to it."""
    *others, gates = inputs.tensors
    given = log_gate.expand(gates.shape).to(gates.dtype).clone()
    return replace(inputs, tensors=(*others, given.requires_grad_()))


def inputs_of(spec: KernelSpec, n: int, groups: int = 1) -> Inputs:
    """Gates that forget in some tokens, and in the last head in some hundred."""
    inputs = make_inputs(spec, n, groups=groups)
    gates = inputs.tensors[-1].detach().clone()
    gates[:, -1] *= 0.01
    return with_gates(inputs, gates)


def gradients(out: Tensor, inputs: Inputs) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]


def run_native(spec: KernelSpec, inputs: Inputs, threads: int = 2) -> list[Tensor]:
    """Output and gradients; the kernel gets this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        masks = {"mask": inputs.mask, "documents": inputs.documents}
        found = gradients(load_kernel(spec, CPP)(*inputs.tensors[:3], **inputs.named, **masks), inputs)
    finally:
        torch.set_num_threads(before)
    variant = str(inputs.tensors[0].dtype).removeprefix("torch.")
    assert hasattr(torch.ops.fastgrad, f"{kernel_name(spec, CPP)}_{variant}_backward"), "not served"
    return found


def run_reference(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
    if spec.window is None:
        return run_dense(spec, inputs)
    masks = {"mask": inputs.mask, "documents": inputs.documents, "window": spec.window, **inputs.named}
    out = dense.softmax_attention(*inputs.tensors[:3], scale=spec.scale, causal=True, **masks)  # type: ignore[arg-type]
    return gradients(out, inputs)


@pytest.mark.medium
@pytest.mark.parametrize("name", MANY)
def test_matches_dense_reference(name: str) -> None:
    spec = specification(name)
    for n, groups, threads in ((1, 1, 1), (63, 1, 2), (301, 2, 2), (517, 1, 16)):
        inputs = inputs_of(spec, n, groups)
        found, expected = run_native(spec, inputs, threads), run_reference(spec, inputs)
        assert worst_error(found, expected) < DOUBLE, (n, threads)


@pytest.mark.medium
@pytest.mark.parametrize("name", MANY)
def test_segments_leave_what_they_keep_to_the_next(name: str) -> None:
    """One row, cut into three segments or more: keys of the first weigh in the last, whose gradients reach them."""
    spec, n = specification(name), 900
    inputs = make_inputs(spec, n, batch=1, heads=1)
    inputs = with_gates(inputs, inputs.tensors[-1].detach() * 0.002)
    if inputs.mask is not None:
        inputs = replace(inputs, mask=torch.ones_like(inputs.mask))
    if inputs.documents is not None:
        inputs = replace(inputs, documents=torch.arange(n)[None] // 700)
    assert worst_error(run_native(spec, inputs, 16), run_native(spec, inputs, 1)) < DOUBLE


MIXED = torch.tensor([0.0, -1e-4, -1e-4, -80.0, 0.0, -INFINITE, -0.3, -400.0, -1e-4])


@pytest.mark.medium
@pytest.mark.parametrize("gate", [0.0, -1e-4, -80.0, -INFINITE, None], ids=str)
@pytest.mark.parametrize("name", MANY)
def test_extreme_gates(name: str, gate: float | None) -> None:
    """All the same, or any next to each other."""
    spec, n = specification(name), 150
    inputs = make_inputs(spec, n)
    if gate is None:
        chosen = torch.randint(len(MIXED), (2, 2, n), generator=torch.Generator().manual_seed(0))
        inputs = with_gates(inputs, MIXED[chosen])
    else:
        inputs = with_gates(inputs, torch.tensor(gate))
    assert worst_error(run_native(spec, inputs), run_reference(spec, inputs)) < DOUBLE


@pytest.mark.medium
def test_a_document_that_vanishes_before_the_last_one() -> None:
    """In one chunk: its factors are 0, those of the last document are not, and no tokens follow to fill the chunk."""
    spec, n = replace(specification("causal"), documents=True), 22
    inputs = with_gates(make_inputs(spec, n), torch.tensor(-80.0))
    inputs = replace(inputs, documents=(torch.arange(n) >= 18).expand(2, n).long())
    assert worst_error(run_native(spec, inputs), run_reference(spec, inputs)) < DOUBLE


@pytest.mark.medium
@pytest.mark.parametrize(
    "name", ["causal", *(pytest.param(name, marks=SLOW, id=f"{name}, as shipped") for name in SPECS)]
)
def test_float32(name: str) -> None:
    """Gates like those above, and sums so great that float32 would round the last gates away."""
    spec, n = specification(name), 301
    inputs = inputs_of(spec, n)
    chosen = torch.randint(len(MIXED), (2, 2, n), generator=torch.Generator().manual_seed(0))
    great = torch.where(torch.arange(n) < 200, -1000.0, -0.01)
    for given in (inputs, with_gates(inputs, MIXED[chosen]), with_gates(inputs, great)):
        expected = run_reference(spec, given)
        assert worst_error(run_native(spec, given.to(torch.float32)), expected) < SINGLE


@pytest.mark.medium
@SLOW
@pytest.mark.parametrize("name", wide(SPECS, few=["near"]))
def test_bfloat16(name: str) -> None:
    spec = specification(name)
    rounded = inputs_of(spec, 301).to(torch.bfloat16)
    found = run_native(spec, rounded)
    assert {x.dtype for x in found} == {torch.bfloat16}
    expected = run_reference(spec, rounded.to(torch.float64))
    assert worst_error(found, expected) < 2e-2  # 8 bits, of sums of 300 terms


@pytest.mark.medium
@SLOW
def test_rounded_outputs_leave_no_trace_in_the_gradients_of_gates() -> None:
    """bfloat16: what the output's rounding adds as a query is what it adds as a key, however long the sequence."""
    spec, n = specification("causal"), 4000
    inputs = with_gates(make_inputs(spec, n, batch=1, heads=1), torch.tensor(-0.5)).to(torch.bfloat16)
    *_, found = run_native(spec, inputs)
    *_, expected = run_native(spec, inputs.to(torch.float64))
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 2e-2, error


@pytest.mark.medium
@pytest.mark.parametrize("groups", wide([1, 3], few=[3]))
def test_nothing_hidden_leaks(groups: int) -> None:
    attack(run_native, specification("near"), torch.float64, groups, every=groups == 1)


@pytest.mark.medium
def test_keys_without_a_gate_in_between_are_as_without_gates() -> None:
    """Gates that forget all at every 50th token: what follows is a sequence of its own."""
    spec = specification("causal")
    inputs = make_inputs(spec, 200)
    gates = torch.where(torch.arange(200) % 50 == 0, -INFINITE, 0.0)
    out = run_native(spec, with_gates(inputs, gates))[0]
    for first in range(0, 200, 50):
        q, k, v = (x[:, :, first : first + 50].detach() for x in inputs.tensors[:3])
        expected = dense.polynomial_attention(q, k, v, spec.coefficients, scale=spec.scale, causal=True)
        torch.testing.assert_close(out[:, :, first : first + 50], expected, rtol=0, atol=DOUBLE)
