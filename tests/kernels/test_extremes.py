"""Values of 1e37, no tokens, one token: what float64 can do within float32's range, and empty calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime import selection
from fastgrad_compiler.runtime.exact_attention import exact_attention
from fastgrad_compiler.targets import PYTORCH
from tests.kernels.inputs import CPP, Inputs, make_inputs, run_dense, run_kernel
from tests.kernels.leaks import KINDS, WINDOWS, attack

EVERY = {**KINDS, **WINDOWS, "unmasked": KernelSpec(3, 5, KINDS["causal"].coefficients, scale=0.7)}


def attend(spec: KernelSpec, inputs: Inputs, kind: str) -> Tensor:
    q, k, v = inputs.tensors[:3]
    masks: dict[str, Any] = {"mask": inputs.mask, "documents": inputs.documents, **inputs.named}
    if kind == "exact":
        masks |= {"causal": spec.causal, "near": spec.near, "window": spec.window}
        return exact_attention(q, k, v, **masks, scale=spec.scale)
    return load_kernel(spec, CPP if kind == "cpp" else PYTORCH)(q, k, v, **masks)


def scaled(inputs: Inputs, values: float, cotangent: float) -> Inputs:
    q, k, v, *near = (x.detach().clone() for x in inputs.tensors)
    tensors = tuple(x.requires_grad_() for x in (q, k, v * values, *near))
    return replace(inputs, tensors=tensors, cotangent=inputs.cotangent * cotangent)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["causal", "near, padding", "documents, causal", "unmasked"])
@pytest.mark.parametrize(("values", "cotangent"), [(3e37, 1e-30), (3e37, 1.0), (1.0, 3e37)])
def test_large_values_are_those_of_float64(kind: str, exact: bool, values: float, cotangent: float) -> None:
    """Sums of 200 values of 3e37 overflow in float32; outputs, and gradients that float32 can hold, do not."""
    spec = EVERY[kind]
    plain = make_inputs(spec, 200, batch=1 if not spec.documents else 2)
    large = scaled(plain, values, cotangent)
    found = run_kernel(spec, large.to(torch.float32), exact_below=1000 if exact else 0)
    expected = run_dense(spec, large.to(torch.float32).to(torch.float64), exact=exact)
    for x, y in zip(found, expected, strict=True):
        fits = y.abs() < 1e38
        assert fits.any() or x is not found[0]
        difference = (x.double() - y).abs()[fits]
        assert not difference.numel() or difference.max() <= 3e-5 * y[fits].abs().max()


def test_an_ordinary_call_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a careful pass")

    spec = EVERY["causal"]
    inputs = make_inputs(spec, 50).to(torch.float32)
    expected = run_kernel(spec, inputs)
    monkeypatch.setattr(selection, "_Careful", refuse)
    assert all(torch.equal(x, y) for x, y in zip(run_kernel(spec, inputs), expected, strict=True))


@pytest.mark.parametrize("kind", EVERY)
def test_a_careful_pass_has_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose results are not read: nothing differs where nothing is spoilt."""
    spec = EVERY[kind]
    inputs = make_inputs(spec, 45, groups=2).to(torch.float32)
    results = []
    for reads in (True, False):
        monkeypatch.setattr(selection, "_reads", lambda _, reads=reads: reads)
        out = attend(spec, inputs, "torch")
        results.append([out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["causal, padding", "near, documents", "window, causal"])
def test_nothing_leaks_where_nothing_is_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_reads", lambda _: False)

    def run(spec: KernelSpec, inputs: Inputs) -> list[Tensor]:
        out = attend(spec, inputs, "torch")
        return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]

    attack(run, EVERY[kind], torch.float32, every=False)


SIZES = [(2, 0, 0), (0, 5, 5), (2, 0, 4), (2, 3, 0), (1, 1, 1)]  # batch, queries, keys
CROSS = {kind for kind, spec in EVERY.items() if not (spec.causal or spec.documents)}


@pytest.mark.sampled(40)
@pytest.mark.parametrize("target", ["torch", "exact"])
@pytest.mark.parametrize(
    ("kind", "batch", "n", "m"),
    [(kind, *size) for kind in EVERY for size in SIZES if kind in CROSS or size[1] == size[2]],
)
def test_empty_and_short(kind: str, batch: int, n: int, m: int, target: str) -> None:
    """No exception, no crash: empty results, and 0 for queries that see no key."""
    spec = EVERY[kind]
    inputs = make_inputs(spec, n, m, batch=2, heads=1).to(torch.float32)
    mask, documents = (None if x is None else x[:batch] for x in (inputs.mask, inputs.documents))
    tensors = tuple(x.detach()[:batch].requires_grad_() for x in inputs.tensors)
    inputs = Inputs(tensors, mask, inputs.cotangent[:batch], documents)
    out = attend(spec, inputs, target)
    assert out.shape == (batch, 1, n, spec.dv)
    gradients = torch.autograd.grad(out, inputs.tensors, inputs.cotangent)
    assert [g.shape for g in gradients] == [x.shape for x in inputs.tensors]
    assert all(torch.isfinite(x).all() for x in (out, *gradients))
    if m == 0:
        assert not out.any()
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("causal", [False, True])
def test_no_heads_and_no_width(causal: bool) -> None:
    """Heads of queries may be none; key heads and widths may not."""
    q, k = torch.zeros(1, 0, 4, 3), torch.zeros(1, 1, 4, 3)
    assert exact_attention(q, k, k, causal=causal).shape == q.shape
    with pytest.raises(ValueError, match="key head"):
        exact_attention(q, q, q, causal=causal)
    with pytest.raises(ValueError, match="width"):
        exact_attention(k[..., :0], k[..., :0], k, causal=causal)


def test_no_key_is_seen() -> None:
    spec = EVERY["padding"]
    inputs = make_inputs(spec, 9)
    inputs = replace(inputs, mask=torch.zeros(2, 9, dtype=torch.bool))
    for kind in ("torch", "exact"):
        out = attend(spec, inputs, kind)
        gradients = torch.autograd.grad(out, inputs.tensors, inputs.cotangent)
        assert not any(x.any() for x in (out, *gradients))
