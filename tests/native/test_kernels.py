"""C++ kernels against the dense float64 reference: output and all gradients, every mask, and any number of threads."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.codegen.cpp import emit_cpp
from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime.kernel_spec import EVERY_TOKEN, rounds_operands
from tests import dense
from tests.grids import wide
from tests.kernels.inputs import COEFFICIENTS, CPP, Inputs, make_inputs, run_dense, run_kernel, worst_error

pytestmark = pytest.mark.usefixtures("native")

DOUBLE = 1e-11  # float64: sums of some hundred terms of size 1, gradients of size 10
SINGLE = 3e-5
SLOW = pytest.mark.slow

# name: d, dv, degree, and what else the kernel is made for. One library each, which other files share: it takes
# seconds to build. Many more are in the slow set.
SPECS = {
    "causal": (16, 64, 2, {"causal": True}),
    "unmasked": (3, 70, 6, {"padding": True}),
    "causal, near": (5, 12, 4, {"causal": True, "near": 4, "near_d": 9, "padding": True}),
    "unmasked, near": (4, 5, 3, {"near": 20}),
    "documents": (8, 17, 2, {"causal": True, "documents": True, "near": 5, "near_d": 3}),
    "unmasked documents": (2, 8, 3, {"documents": True, "padding": True}),
}
MORE = {
    "one": (1, 1, 1, {"causal": True}),
    "wide": (128, 16, 2, {"causal": True}),
    "high": (4, 20, 10, {"causal": True}),
    "high rank": (8, 9, 7, {}),
    "near of a few chunks": (5, 12, 4, {"causal": True, "near": 24, "near_d": 9, "padding": True}),
    "small blocks": (6, 6, 2, {"near": 1, "padding": True}),
    "small blocks, causal": (6, 6, 2, {"near": 7, "causal": True}),
    "uneven blocks": (6, 6, 2, {"near": 100, "near_d": 2}),
    "large blocks, documents": (6, 6, 2, {"near": 33, "documents": True, "padding": True}),
    "causal documents": (6, 40, 2, {"causal": True, "documents": True, "padding": True}),
}


def specification(name: str) -> KernelSpec:
    d, dv, degree, options = {**SPECS, **MORE}[name]
    coefficients = COEFFICIENTS.get(degree) or tuple(0.6**power for power in range(degree + 1))
    return KernelSpec(d=d, dv=dv, coefficients=coefficients, scale=0.8, **options)  # type: ignore[arg-type]


def run_native(spec: KernelSpec, inputs: Inputs, threads: int = 2) -> list[torch.Tensor]:
    """Output and gradients; the kernel gets this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run_kernel(spec, inputs, native=True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.medium
@pytest.mark.parametrize("name", [*SPECS, *(pytest.param(name, marks=SLOW) for name in MORE)])
def test_matches_dense_reference(name: str) -> None:
    spec = specification(name)
    for n, groups, threads in ((1, 1, 1), (63, 1, 2), (301, 2, 2), (517, 1, 16)):
        inputs = make_inputs(spec, n, groups=groups)
        assert worst_error(run_native(spec, inputs, threads), run_dense(spec, inputs)) < DOUBLE, (n, threads)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "n", "m"), [("unmasked", 130, 77), ("unmasked, near", 60, 301), ("unmasked, near", 301, 60)]
)
def test_cross_attention(name: str, n: int, m: int) -> None:
    spec = specification(name)
    inputs = make_inputs(spec, n, m, groups=2, batch=1)
    for threads in (1, 8):
        assert worst_error(run_native(spec, inputs, threads), run_dense(spec, inputs)) < DOUBLE


WINDOWS = [(width, causal) for width in (1, 40, 64, 1000, EVERY_TOKEN) for causal in (False, True)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("window", "causal"), wide(WINDOWS, few=[(40, False), (EVERY_TOKEN, False)])
)  # causal: test_forget.py
def test_window(window: int, causal: bool) -> None:
    spec = KernelSpec(7, 20, (), causal=causal, window=window, scale=3.0, documents=True, padding=True)
    for n, threads in ((1, 1), (301, 2), (517, 16)):
        inputs = make_inputs(spec, n, groups=2)
        q, k, v = inputs.tensors
        masks = {"mask": inputs.mask, "documents": inputs.documents}
        expected = dense.softmax_attention(q, k, v, scale=3.0, causal=causal, window=window, **masks)  # type: ignore[arg-type]
        torch.set_num_threads(threads)
        found = load_kernel(spec, CPP)(q, k, v, **masks)
        gradients = [torch.autograd.grad(out, inputs.tensors, inputs.cotangent) for out in (found, expected)]
        torch.set_num_threads(2)
        assert worst_error([found, *gradients[0]], [expected, *gradients[1]]) < DOUBLE


@pytest.mark.medium
@pytest.mark.parametrize("name", ["causal", "causal, near", pytest.param("unmasked, near", marks=SLOW)])
def test_float32_and_bfloat16(name: str) -> None:
    spec = specification(name)
    inputs = make_inputs(spec, 301)
    expected = run_dense(spec, inputs)
    assert worst_error(run_native(spec, inputs.to(torch.float32)), expected) < SINGLE
    rounded = inputs.to(torch.bfloat16)
    found = run_native(spec, rounded)
    assert {x.dtype for x in found} == {torch.bfloat16}
    assert (
        worst_error(found, run_dense(spec, rounded.to(torch.float64))) < 2e-2
    )  # 8 bits, of sums of 300 terms


EVEN = {
    "squares": (16, 70, 2, {"causal": True}),
    "squares, documents": (7, 17, 2, {"causal": True, "documents": True, "padding": True}),
    "unmasked squares": (9, 33, 2, {}),
    "fourth powers, near": (3, 8, 4, {"near": 20, "causal": True}),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", ["squares", *(pytest.param(name, marks=SLOW) for name in [*EVEN][1:])])
def test_products_of_bfloat16(name: str) -> None:
    """Polynomials whose operands may be rounded where a processor has such products: any length, any threads."""
    d, dv, degree, options = EVEN[name]
    coefficients = tuple(1.0 if power == degree else 0.3 * (power == 0) for power in range(degree + 1))
    spec = KernelSpec(d, dv, coefficients, scale=0.8, **options)  # type: ignore[arg-type]
    assert rounds_operands(spec)
    for n, groups, threads in ((1, 1, 1), (63, 2, 1), (301, 1, 2), (1003, 1, 16)):
        rounded = make_inputs(spec, n, groups=groups).to(torch.bfloat16)
        expected = run_dense(spec, rounded.to(torch.float64))
        for found, exact in zip(run_native(spec, rounded, threads), expected, strict=True):
            if exact.norm() > 1e-9:  # of one key, queries and keys have no gradient
                assert (found.double() - exact).norm() <= 0.008 * exact.norm(), n


@pytest.mark.medium
@pytest.mark.parametrize(("degree", "most"), [(2, 0.01), (3, 0.003)])
def test_weights_near_zero_in_bfloat16(degree: int, most: float) -> None:
    """Keys opposite to the queries: only where weights are sums of like terms may operands be rounded."""
    p = fit("balanced", degree, 1.0)
    spec = KernelSpec(16, 20, p.coefficients, causal=True)
    assert rounds_operands(spec) == (degree == 2)
    made = make_inputs(spec, 300)
    opposite = torch.full((16,), 0.245, dtype=torch.float64)
    q, k = (sign * opposite + 0.0 * x for sign, x in zip((1.0, -1.0), made.tensors, strict=False))
    tensors = tuple(x.detach().requires_grad_() for x in (q, k, made.tensors[2]))
    rounded = replace(made, tensors=tensors).to(torch.bfloat16)
    expected = run_dense(spec, rounded.to(torch.float64))
    out, *_ = run_native(spec, rounded)
    assert (out.double() - expected[0]).norm() <= most * expected[0].norm()


@pytest.mark.medium
@pytest.mark.usefixtures("as_shipped")
def test_float32_built_as_for_users() -> None:
    spec = replace(specification("causal, near"), scale=0.9)
    inputs = make_inputs(spec, 301, groups=2)
    assert worst_error(run_native(spec, inputs.to(torch.float32)), run_dense(spec, inputs)) < SINGLE


@pytest.mark.medium
def test_float32_computed_in_float64() -> None:
    """Rounding rules at R = 8: keys near the negatives of the queries, and the C++ kernel of the variant float64."""
    p = fit("balanced", 14, 8.0)
    spec = KernelSpec(2, 3, p.coefficients, True, precision="float64")
    made = make_inputs(spec, 200)
    towards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    q, k = 7.9 * (towards + 0.0 * made.tensors[0]), 0.05 * made.tensors[1] - 0.94 * towards
    tensors = tuple(x.detach().requires_grad_() for x in (q, k, made.tensors[2]))
    inputs = replace(made, tensors=tensors).to(torch.float32)
    wide = inputs.to(torch.float64)
    assert worst_error(run_native(spec, inputs), run_dense(spec, wide)) < SINGLE
    single = replace(spec, precision="float32")
    assert worst_error(run_kernel(single, inputs), run_dense(spec, wide)) > 1e-2


@pytest.mark.medium
def test_great_logits_nearby() -> None:
    """Near logits of +-60: exp of them alone would overflow in float32."""
    spec = specification("causal, near")
    inputs = make_inputs(spec, 200, local_size=60.0)
    assert worst_error(run_native(spec, inputs), run_dense(spec, inputs)) < 1e-10
    assert worst_error(run_native(spec, inputs.to(torch.float32)), run_dense(spec, inputs)) < 1e-3


@pytest.mark.medium
@pytest.mark.parametrize("name", ["documents", "unmasked documents"])
def test_documents_of_one_token(name: str) -> None:
    spec = specification(name)
    inputs = make_inputs(spec, 150)
    inputs = replace(inputs, documents=torch.arange(150).expand(2, 150))
    assert worst_error(run_native(spec, inputs, 8), run_dense(spec, inputs)) < DOUBLE


@pytest.mark.medium
def test_deterministic() -> None:
    """Bit for bit at the same number of threads, to rounding at another: one row is cut into segments."""
    spec = specification("causal")
    inputs = make_inputs(spec, 1500, batch=1, heads=1).to(torch.float32)
    once, again, other = (run_native(spec, inputs, threads) for threads in (3, 3, 1))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert worst_error(other, once) < SINGLE
    assert any(not torch.equal(a, b) for a, b in zip(once, other, strict=True)), "segments were not used"


@pytest.mark.medium
def test_strided_inputs() -> None:
    """Heads that lie side by side in a row, as a projection leaves them."""
    spec = specification("causal")
    inputs = make_inputs(spec, 100)
    apart = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs.tensors]
    strided = replace(inputs, tensors=tuple(apart), cotangent=inputs.cotangent.mT.contiguous().mT)
    assert worst_error(run_native(spec, strided), run_dense(spec, inputs)) < DOUBLE


@pytest.mark.medium
@pytest.mark.slow
def test_denominators_of_a_million_tokens() -> None:
    """float32 sums over 1,000,000 keys: the denominators, and outputs, stay within 1e-5 of float64."""
    spec = replace(specification("causal"), d=4, dv=4, coefficients=COEFFICIENTS[2])
    inputs = make_inputs(spec, 1_000_000, batch=1, heads=1)
    q, k, v = (x.detach() for x in inputs.tensors)
    function = load_kernel(spec, CPP)
    single, double = function(q.float(), k.float(), v.float()), function(q, k, v)
    assert (single.double() - double).abs().max() < 1e-5 * v.abs().max()


@pytest.mark.medium
def test_source_is_bounded() -> None:
    """A table of the monomials is made when the library is loaded, not written out."""
    large = KernelSpec(16, 64, tuple(1.0 for _ in range(7)), causal=True)  # rank 74,613
    assert abs(len(emit_cpp(large)) - len(emit_cpp(specification("causal")))) < 500


@pytest.mark.medium
def test_large_outputs_ask_for_large_pages() -> None:
    """A fault for each 4 KB of a fresh output is a fifth of the time. Seen in what Linux says of the memory."""
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("no large pages on this system")
    inputs = make_inputs(specification("causal"), 8000, heads=1)
    out, *gradients = run_native(specification("causal"), inputs)
    assert has_large_pages(out)
    assert has_large_pages(gradients[2])  # of v


def has_large_pages(x: torch.Tensor) -> bool:
    """Whether the mapping around the middle of a tensor is advised to have large pages."""
    middle, here = x.data_ptr() + x.numel() * x.element_size() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(mapping[1], 16) <= middle < int(mapping[2], 16)
        elif here and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False
