"""Exact attention that visits a band of keys: windows and documents against the dense reference, and its memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.runtime import exact_blocks as module
from fastgrad_compiler.runtime.exact_attention import exact_attention, exact_backward, exact_forward
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from tests import dense
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs, worst_error
from tests.kernels.test_memory import LargestStorage

DOUBLE = 1e-11


def options_of(inputs: Inputs, causal: bool, window: int | None, near: int | None) -> dict[str, Any]:
    masks = {"mask": inputs.mask, "documents": inputs.documents}
    return {**inputs.named, **masks, "scale": 0.7, "causal": causal, "near": near, "window": window}


def both(inputs: Inputs, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Output and all gradients, of the blocks and of the dense reference."""
    results = []
    for attend in (exact_attention, dense.softmax_attention):
        out = attend(*inputs.tensors[:3], **options)
        gradients = torch.autograd.grad(out, inputs.tensors, inputs.cotangent, allow_unused=True)
        results.append(
            [
                out,
                *(
                    torch.zeros_like(x) if g is None else g
                    for g, x in zip(gradients, inputs.tensors, strict=True)
                ),
            ]
        )
    return results[0], results[1]


@pytest.mark.sampled(24)
@pytest.mark.parametrize(
    ("window", "documents"), [(1, False), (2, True), (5, False), (30, True), (200, False), (None, True)]
)
@pytest.mark.parametrize(("near", "near_d"), [(None, None), (4, 2)])
@pytest.mark.parametrize(("causal", "padding"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("rows", [3, 64])
def test_matches_dense_reference(
    window: int | None,
    documents: bool,
    near: int | None,
    near_d: int | None,
    causal: bool,
    padding: bool,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BANDED_ROWS", rows)
    spec = KernelSpec(3, 5, COEFFICIENTS[2], causal, padding, near, near_d, documents=documents)
    for n, groups in ((37, 2), (1, 1)):
        inputs = make_inputs(spec, n, groups=groups, batch=3)
        assert worst_error(*both(inputs, options_of(inputs, causal, window, near))) < DOUBLE


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 0.7])
def test_a_scale_of_any_sign(scale: float, causal: bool) -> None:
    """PyTorch's fused kernel masks before it scales, and gives NaN where causal scores change their sign."""
    inputs = make_inputs(KernelSpec(3, 5, COEFFICIENTS[2], causal), 9)
    assert worst_error(*both(inputs, {"scale": scale, "causal": causal})) < DOUBLE


@pytest.mark.parametrize(("n", "m"), [(9, 40), (40, 9), (1, 30), (30, 1)])
@pytest.mark.parametrize("window", [1, 6, 50])
def test_windows_over_other_keys(n: int, m: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries beyond the last key's window see nothing, and give 0."""
    monkeypatch.setattr(module, "BANDED_ROWS", 4)
    inputs = make_inputs(KernelSpec(3, 5, COEFFICIENTS[2]), n, m)
    assert worst_error(*both(inputs, options_of(inputs, False, window, None))) < DOUBLE


@pytest.mark.parametrize("documents", [False, True])
def test_small_memory_changes_nothing(documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(KernelSpec(3, 5, COEFFICIENTS[2], True, documents=documents), 150)
    options = options_of(inputs, True, 40, None)
    expected = both(inputs, options)[1]
    for budget in (1, 10**5):
        monkeypatch.setattr(module, "WORK_BYTES", budget)
        assert worst_error(both(inputs, options)[0], expected) < DOUBLE


class Products(LargestStorage):
    """Also counts the entries of the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func._opname in ("bmm", "mm"):
            self.entries += args[0].numel() * args[1].shape[-1]
        return result


def work(n: int, documents: Tensor | None, window: int, causal: bool) -> Products:
    """Both passes of one row as plain functions: a mode does not see into a custom operation."""
    inputs = make_inputs(KernelSpec(16, 64, COEFFICIENTS[2]), n, batch=1, heads=1).to(torch.float32)
    q, k, v = (x.detach() for x in inputs.tensors)
    rest = (None, None, None, None, documents)
    with torch.no_grad(), Products() as record:
        saved = exact_forward(q, k, v, *rest, 0.25, causal, 0, window)
        exact_backward(inputs.cotangent, q, k, v, *rest, *saved, 0.25, causal, 0, window)
    return record


@pytest.mark.medium
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["window", "documents"])
def test_linear_work_and_flat_memory(kind: str, causal: bool) -> None:
    """Twice the tokens: twice the products, and no tensor but inputs, outputs, gradients and ids grows."""
    width = 64

    def measure(n: int) -> Products:
        documents = (torch.arange(n) // width)[None] if kind == "documents" else None
        return work(n, documents, width if kind == "window" else 0, causal)

    small, large = measure(4096), measure(8192)
    assert large.entries == pytest.approx(2 * small.entries, rel=0.05)
    assert large.elements == 8192 * 64  # a value, an output or a gradient
    # Forward 16 + 64 and backward 3 * 16 + 2 * 64 multiply-adds a pair; a block of w queries meets 3 w keys, or 2 w.
    assert large.entries <= 8192 * (2 if causal else 3) * width * 256
