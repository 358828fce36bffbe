"""`functional.polynomial_attention` against a dense computation, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_compiler.approximation.polynomial import Family, fit
from fastgrad_dsl.functional import polynomial_attention


def qkv(*lead: int, n: int = 9, m: int | None = None, d: int = 4, dv: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n + d)

    def unit(rows: int, width: int) -> Tensor:
        x = torch.randn(*lead, rows, width, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(x, dim=-1)

    m = n if m is None else m
    return [x.requires_grad_() for x in (unit(n, d), unit(m, d), unit(m, dv))]


def dense(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, causal: bool = False) -> Tensor:
    if causal:
        weights = weights.tril()
    return weights / weights.sum(-1, keepdim=True) @ v


def evaluated(coefficients: tuple[float, ...], s: Tensor) -> Tensor:
    return sum((c * s**power for power, c in enumerate(coefficients)), torch.zeros_like(s))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_dense_computation(lead: tuple[int, ...], causal: bool) -> None:
    q, k, v = qkv(*lead)
    found = polynomial_attention(q, k, v, degree=3, bound=0.5, causal=causal)
    p = fit("balanced", 3, 0.5).coefficients
    expected = dense(q, k, v, evaluated(p, q @ k.mT / math.sqrt(4)), causal)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("family", ["taylor", "minimax", "balanced"])
def test_family_scale_and_other_keys(family: Family) -> None:
    q, k, v = qkv(2, 1, n=5, m=11)
    found = polynomial_attention(q, k, v, degree=4, bound=0.7, family=family, scale=0.7)
    p = fit(family, 4, 0.7).coefficients
    torch.testing.assert_close(found, dense(q, k, v, evaluated(p, 0.7 * q @ k.mT)))


def test_grouped_heads() -> None:
    q, k, v = qkv(2, 4)
    found = polynomial_attention(q, k[:, ::2], v[:, ::2], causal=True)
    spread = [x[:, ::2].repeat_interleave(2, 1) for x in (k, v)]
    torch.testing.assert_close(found, polynomial_attention(q, *spread, causal=True))


def test_near_pairs_are_exact() -> None:
    q, k, v = qkv(1, 2, n=12)
    blocks = torch.arange(12) // 3
    near = (blocks[:, None] - blocks).abs() <= 1
    scores = q @ k.mT / math.sqrt(4)
    p = fit("balanced", 2, 0.5).coefficients
    weights = torch.where(near, scores.exp(), evaluated(p, scores))
    found = polynomial_attention(q, k, v, bound=0.5, causal=True, near=3)
    torch.testing.assert_close(found, dense(q, k, v, weights, causal=True))
    near_q, near_k = 5 * q, k + 0.1
    weights = torch.where(near, (near_q @ near_k.mT).exp(), evaluated(p, scores))
    found = polynomial_attention(q, k, v, bound=0.5, causal=True, near=3, near_qk=(near_q, near_k))
    torch.testing.assert_close(found, dense(q, k, v, weights, causal=True))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_documents(lead: tuple[int, ...], causal: bool) -> None:
    """Those of each sequence are as if alone, although two of them have the same id."""
    q, k, v = qkv(*lead)
    rows = torch.tensor([[3, 3, 3, 0, 3, 3, 3, 3, 1], [2, 2, 2, 2, 2, 2, 2, 2, 2]])
    documents = rows[: lead[0]] if len(lead) == 2 else rows[0]
    found = polynomial_attention(q, k, v, bound=0.5, causal=causal, documents=documents)
    runs = (documents.diff(prepend=documents[..., :1]) != 0).cumsum(-1)
    visible = (
        (runs[..., :, None] == runs[..., None, :])[..., None, :, :]
        if len(lead) == 2
        else runs[:, None] == runs
    )
    weights = evaluated(fit("balanced", 2, 0.5).coefficients, q @ k.mT / math.sqrt(4)) * visible
    expected = dense(q, k, v, weights, causal)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("lead", [(), (3,), (2, 4)])
def test_forget_gates(lead: tuple[int, ...]) -> None:
    """One for each token and key head, of which two query heads share one where there are four."""
    q, k, v = qkv(*lead)
    heads = (*lead[:-1], 2) if len(lead) == 2 else lead
    k, v = (x[:, ::2] if len(lead) == 2 else x for x in (k, v))
    gates = (-0.1 * torch.arange(9.0).double().expand(*heads, 9)).contiguous().requires_grad_()
    found = polynomial_attention(q, k, v, bound=0.5, causal=True, log_gate=gates)
    shared = [x.repeat_interleave(2, 1) if len(lead) == 2 else x for x in (k, v, gates)]
    sums = shared[2].cumsum(-1)
    decay = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).tril().exp()
    weights = evaluated(fit("balanced", 2, 0.5).coefficients, q @ shared[0].mT / math.sqrt(4)) * decay
    expected = dense(q, shared[0], shared[1], weights, causal=True)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.square().sum(), (q, k, v, gates)) for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_close_to_softmax_attention() -> None:
    q, k, v = qkv(2, 3)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = polynomial_attention(q, k, v, degree=8, bound=0.5, causal=True)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"degree": 1, "bound": 3.0, "family": "taylor"}, "not positive"),
        ({"near": 0}, "near >= 1"),
        ({"causal": True, "m": 7}, "as many queries as keys"),
        ({"bound": 100.0}, "float64"),
        ({"documents": torch.zeros(1, 4, dtype=torch.int64)}, "documents has shape"),
        ({"documents": torch.zeros(1, 5)}, "integer ids"),
        ({"documents": torch.zeros(1, 5, dtype=torch.int64), "m": 7}, "tokens to each other"),
        ({"log_gate": torch.zeros(1, 2, 5)}, "give `causal` too"),
        ({"log_gate": torch.zeros(1, 2, 4), "causal": True}, "log_gate has shape"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    q, k, v = qkv(1, 2, n=5, m=change.pop("m", None))
    with pytest.raises(ValueError, match=message):
        polynomial_attention(q, k, v, **change)


def test_vectors_and_targets_are_refused() -> None:
    x = torch.randn(4)
    with pytest.raises(ValueError, match="at least two dimensions"):
        polynomial_attention(x, x, x)
    q, k, v = qkv(1, 2)
    with pytest.raises(fg.TfgError, match="did you mean triton"):
        polynomial_attention(q, k, v, target="tritton")


def test_is_reached_from_the_package() -> None:
    assert fg.functional.polynomial_attention is polynomial_attention
