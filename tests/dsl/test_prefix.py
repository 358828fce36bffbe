"""The mask `prefix`: a query sees the first `length` tokens and its past; against dense numpy, forward and backward."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_compiler.attention.value import Mask
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.models.batches import model_inputs, random_batch
from tests.dsl.models import always_polynomial
from tests.native.compilers import NEEDS_COMPILER

Array = NDArray[np.float64]
SPEC = """
dim b
dim n <= 4096

model m(
    q: float[b, 4, n, 3],
    k: float[b, 2, n, 3],
    v: float[b, 2, n, 5],
    length: int[b],
    mask: bool[b, n],
    ids: int[b, n],
) -> float[b, 4, n, 5] {
    s = SCORES
    y = softmax(MASKS) @ repeat_heads(v, 2)
    return y
}
"""
WAYS = [
    *((degree, "torch") for degree in (0, 1, 2, 3)),  # degree 0: exact
    pytest.param(2, "cpp", marks=NEEDS_COMPILER),
]


PROVED = "0.7 * unit(q) @ repeat_heads(unit(k), 2).T"


@cache
def compiled(masks: str, degree: int, target: str, scores: str = PROVED) -> Compiled:
    """Of degree 0 for exact attention."""
    budget = f'budget {{ at "*" degree = {degree} }}\n' if degree else ""
    return fg.compile(SPEC.replace("MASKS", masks).replace("SCORES", scores) + budget, target=target)


def visible(length: Tensor, n: int) -> NDArray[np.bool_]:
    """bool [b, 1, n, n], pair by pair."""
    seen = [[[j <= i or j < each for j in range(n)] for i in range(n)] for each in length.tolist()]
    return np.array(seen).reshape(len(length), 1, n, n)


def dense(
    inputs: list[Tensor], cotangent: Tensor, seen: NDArray[np.bool_], coefficients: tuple[float, ...] | None
) -> list[Array]:
    """Output and gradients of q, k and v: docs/mathematics.md, section 4, on all pairs; q and k are of norm 1."""
    q, k, v, g = (x.detach().double().numpy() for x in (*inputs[:3], cotangent))
    k, v = (np.repeat(x, 2, axis=1) for x in (k, v))
    s = 0.7 * q @ np.swapaxes(k, -1, -2)
    weights = slope = np.exp(s)
    if coefficients is not None:
        weights = sum(c * s**power for power, c in enumerate(coefficients))
        slope = sum(power * c * s ** (power - 1) for power, c in enumerate(coefficients) if power)
    weights, slope = np.where(seen, weights, 0.0), np.where(seen, slope, 0.0)
    total = weights.sum(-1, keepdims=True)
    total = np.where(total == 0, 1.0, total)
    out = weights @ v / total
    d_scores = 0.7 * slope * (g @ np.swapaxes(v, -1, -2) - (g * out).sum(-1, keepdims=True)) / total
    shared = [np.swapaxes(d_scores, -1, -2) @ q, np.swapaxes(weights / total, -1, -2) @ g]
    d_q, (d_k, d_v) = d_scores @ k, (x.reshape(x.shape[0], 2, 2, *x.shape[2:]).sum(2) for x in shared)
    return [out, *(across(d, x) for d, x in ((d_q, q), (d_k, k[:, ::2]))), d_v]


def across(gradient: Array, row: Array) -> Array:
    """The part of a gradient that is orthogonal to its row, of norm 1: what `unit` passes on."""
    return gradient - (gradient * row).sum(-1, keepdims=True) * row


def draw(length: list[int], n: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Inputs whose logits keep their range, and a cotangent."""
    generator, b = torch.Generator().manual_seed(n), len(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(normal(b, h, n, 3), dim=-1) for h in (4, 2))
    floats = [x.to(dtype).requires_grad_() for x in (q, k, normal(b, 2, n, 5))]
    mask = torch.rand(b, n, generator=generator) < 0.8
    ids = (torch.rand(b, n, generator=generator) < 0.2).cumsum(1)
    return [*floats, torch.tensor(length), mask, ids], normal(b, 4, n, 5).to(dtype)


def run(case: Compiled, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    module = always_polynomial(case, case.module())
    out = module(*inputs)
    return [out, *torch.autograd.grad(out, inputs[:3], cotangent)]


def coefficients_of(case: Compiled) -> tuple[float, ...] | None:
    (found,) = {entry.attention.polynomial for entry in case.plan}
    return None if found is None else found.coefficients


def error(found: list[Tensor], expected: list[Array]) -> float:
    """The largest difference, of the largest entry."""
    pairs = zip(found, expected, strict=True)
    return max(np.abs(x.detach().double().numpy() - y).max() / max(np.abs(y).max(), 1e-3) for x, y in pairs)


LENGTHS = [(n, length) for n in (1, 2, 37, 300) for length in ([0], [1, n, n + 9], [-3, n // 2, n - 1])]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("degree", "target"), WAYS)
def test_matches_dense_numpy(degree: int, target: str) -> None:
    case = compiled("prefix(s, length)", degree, target)
    for n, length in LENGTHS:
        inputs, cotangent = draw(length, n)
        expected = dense(inputs, cotangent, visible(inputs[3], n), coefficients_of(case))
        assert error(run(case, inputs, cotangent), expected) < 1e-10, (n, length)


@pytest.mark.parametrize(("degree", "target"), WAYS)
def test_in_bfloat16(degree: int, target: str) -> None:
    case = compiled("prefix(s, length)", degree, target)
    inputs, cotangent = draw([0, 11, 50], 37, torch.bfloat16)
    found = run(case, inputs, cotangent)
    assert {x.dtype for x in found} == {torch.bfloat16}
    assert error(found, dense(inputs, cotangent, visible(inputs[3], 37), coefficients_of(case))) < 0.03


@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize("masks", ["padding(documents(prefix(s, length), ids), mask)", "causal(prefix(s, length))",
                                   "window(prefix(padding(s, mask), length); 5)"])  # fmt: skip
def test_with_other_masks(masks: str, degree: int) -> None:
    """A pair is visible where all masks show it."""
    case, n = compiled(masks, degree if "window" not in masks else 0, "torch"), 37
    inputs, cotangent = draw([0, 11, 50], n)
    length, mask, ids = inputs[3:]
    seen, place = visible(length, n), np.arange(n)
    if "mask" in masks:
        seen = seen & mask.numpy()[:, None, None]
    if "ids" in masks:
        seen = seen & (ids[:, None, :, None] == ids[:, None, None]).numpy()
    if "causal" in masks:
        seen = seen & (place[:, None] >= place)
    if "window" in masks:
        seen = seen & (np.abs(place[:, None] - place) < 5)
    assert error(run(case, inputs, cotangent), dense(inputs, cotangent, seen, coefficients_of(case))) < 1e-10


@pytest.mark.parametrize(("degree", "target"), WAYS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_what_is_hidden_does_not_leak(value: float, degree: int, target: str) -> None:
    """Token 20 is in no prefix: rows before it have the same outputs and gradients whatever it holds, bit by bit."""
    case = compiled("prefix(s, length)", degree, target)
    results = []
    for spoilt in (0.0, value):
        inputs, cotangent = draw([0, 11], 37)
        with torch.no_grad():
            inputs[2][:, :, 20] = spoilt
        cotangent[:, :, 20:] = 0.0
        out, *gradients = run(case, inputs, cotangent)
        results.append([out[:, :, :20], *gradients])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_prefix_is_two_attentions_of_the_plan() -> None:
    """By queries: the prefix, which sees nothing after it, and the past. Both are recognised in the user's name."""
    found = compiled("prefix(s, length)", 2, "torch")
    masks = {entry.path: entry.attention.mask for entry in found.plan}
    assert masks == {"y_prefix": Mask(operands=("padding",)), "y_past": Mask(causal=True)}
    assert all(entry.attention.is_polynomial for entry in found.plan)
    exact = compiled("window(prefix(s, length); 5)", 0, "torch")
    assert not any(entry.attention.is_polynomial for entry in exact.plan)
    assert [entry.attention.mask.window for entry in exact.plan] == [5, 5]
    assert not any(node.op == "prefix" for graph in found.program.graphs for node in graph.nodes)


def test_a_prefix_of_a_causal_attention_changes_nothing() -> None:
    (entry,) = compiled("causal(prefix(s, length))", 2, "torch").plan
    assert entry.attention.mask == Mask(causal=True)


def test_random_lengths_reach_the_end() -> None:
    """So that a report measures prefixes and not only the past."""
    case = compiled("prefix(s, length)", 2, "torch")
    lengths = random_batch(model_inputs(case.program), {"b": 200, "n": 16})[3]
    assert (int(lengths.min()), int(lengths.max())) == (0, 16)


def test_guards_watch_both_parts() -> None:
    """A logit beyond an asserted range, of a pair that only the prefix shows, is counted by its guard alone."""
    case = compiled("prefix(s, length)", 2, "torch", "assume_bound(q @ repeat_heads(k, 2).T; 1.5)")
    (q, k, *rest), _ = draw([12], 20)
    with torch.no_grad():
        q[:, :, 3:] = 0.0
        k[:, :, 5] *= 100.0
    module = always_polynomial(case, case.module())
    module(q, k, *rest)
    status = {each["path"]: each for each in module.budget_status()}  # type: ignore[operator]
    assert status["y_prefix"]["largest"] > 1.5
    assert status["y_past"]["largest"] <= 1.0 + 1e-6
