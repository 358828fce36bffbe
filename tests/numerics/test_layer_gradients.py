"""Gradients of a whole attention layer (docs/mathematics.md, 4 and 6), by central differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.approximation.polynomial import fit

N, WIDTH, D, DV = 6, 5, 3, 4
POLYNOMIAL = fit("balanced", 3, 2.0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Layer:
    """One head with input x (n, width), without an output projection."""

    x: Tensor
    w_q: Tensor
    w_k: Tensor
    w_v: Tensor


LAYER = Layer(
    x=0.5 * draw(0, N, WIDTH), w_q=draw(1, WIDTH, D), w_k=0.4 * draw(2, WIDTH, D), w_v=draw(3, WIDTH, DV)
)
UPSTREAM = draw(4, N, DV)


def horner(coefficients: tuple[float, ...], scores: Tensor) -> Tensor:
    total = torch.zeros_like(scores)
    for coefficient in reversed(coefficients):
        total = total * scores + coefficient
    return total


def exact(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores.exp(), scores.exp()


def polynomial(scores: Tensor) -> tuple[Tensor, Tensor]:
    slope = tuple(j * value for j, value in enumerate(POLYNOMIAL.coefficients))[1:]
    return horner(POLYNOMIAL.coefficients, scores), horner(slope, scores)


Weighting = Callable[[Tensor], tuple[Tensor, Tensor]]  # scores to weights and their slopes


def seen(causal: bool) -> Tensor:
    mask = torch.ones(N, N, dtype=torch.float64)
    return mask.tril() if causal else mask


def loss(layer: Layer, weigh: Weighting, causal: bool) -> float:
    raw = weigh(layer.x @ layer.w_q @ (layer.x @ layer.w_k).T)[0] * seen(causal)
    output = raw / raw.sum(dim=1, keepdim=True) @ (layer.x @ layer.w_v)
    return float((UPSTREAM * output).sum())


def by_differences(name: str, weigh: Weighting, causal: bool) -> Tensor:
    step, base = 1e-5, getattr(LAYER, name)
    gradient = torch.zeros_like(base)
    for place in range(base.numel()):
        shift = torch.zeros_like(base)
        shift.view(-1)[place] = step
        above = loss(replace(LAYER, **{name: base + shift}), weigh, causal)
        below = loss(replace(LAYER, **{name: base - shift}), weigh, causal)
        gradient.view(-1)[place] = (above - below) / (2 * step)
    return gradient


def by_formula(weigh: Weighting, causal: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """f, P and the gradients; P carries p' / p in place of exp' / exp = 1."""
    x, w_q, w_k, w_v = LAYER.x, LAYER.w_q, LAYER.w_k, LAYER.w_v
    raw, slope = (part * seen(causal) for part in weigh(x @ w_q @ (x @ w_k).T))
    denominator = raw.sum(dim=1, keepdim=True)
    f, h = raw / denominator, x @ w_v
    kappa = (UPSTREAM * (f @ h)).sum(dim=1, keepdim=True)
    p = slope / denominator * (UPSTREAM @ h.T - kappa)
    w = w_q @ w_k.T
    d_w = x.T @ p @ x
    return (
        f,
        p,
        {
            "w_q": d_w @ w_k,
            "w_k": d_w.T @ w_q,
            "w_v": x.T @ f.T @ UPSTREAM,
            "x": p @ x @ w.T + p.T @ x @ w + f.T @ UPSTREAM @ w_v.T,
        },
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("weigh", [exact, polynomial])
@pytest.mark.parametrize("name", ["w_q", "w_k", "w_v", "x"])
def test_layer_gradients(name: str, weigh: Weighting, causal: bool) -> None:
    gradients = by_formula(weigh, causal)[2]
    torch.testing.assert_close(gradients[name], by_differences(name, weigh, causal), rtol=1e-7, atol=1e-7)


def test_gradient_of_the_joint_matrix() -> None:
    """dL/dW for W = W_Q W_K^T, which is all that the exact scores depend on."""
    _, p, _ = by_formula(exact, causal=True)
    x, w, step = LAYER.x, LAYER.w_q @ LAYER.w_k.T, 1e-5
    differences = torch.zeros_like(w)
    for place in range(w.numel()):
        shift = torch.zeros_like(w)
        shift.view(-1)[place] = step
        sides = []
        for moved in (w + shift, w - shift):
            raw = (x @ moved @ x.T).exp() * seen(True)
            sides.append(float((UPSTREAM * (raw / raw.sum(dim=1, keepdim=True) @ x @ LAYER.w_v)).sum()))
        differences.view(-1)[place] = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(x.T @ p @ x, differences, rtol=1e-7, atol=1e-7)


def test_the_printed_value_gradient_is_transposed() -> None:
    """arXiv 2408.13233 prints X^T f G where X^T f^T G is right."""
    f, _, gradients = by_formula(exact, causal=True)
    printed = LAYER.x.T @ f @ UPSTREAM
    assert (printed - gradients["w_v"]).norm() > 0.1 * gradients["w_v"].norm()


@pytest.mark.parametrize("causal", [True, False])
def test_augmented_form_of_the_backward(causal: bool) -> None:
    """dS_ij = (u~_i . v~_j) p'(s_ij) and dV_j = sum_i a~_ij u_i, with u~ = [u, -delta] and v~ = [v, 1]."""
    query, key, value = LAYER.x @ LAYER.w_q, LAYER.x @ LAYER.w_k, LAYER.x @ LAYER.w_v
    for tensor in (query, key, value):
        tensor.requires_grad_()
    raw, slope = (part * seen(causal) for part in polynomial(query @ key.T))
    denominator = raw.sum(dim=1, keepdim=True)
    output = raw / denominator @ value
    d_query, d_key, d_value = torch.autograd.grad((output * UPSTREAM).sum(), (query, key, value))
    u = UPSTREAM / denominator
    delta = (UPSTREAM * output).sum(dim=1, keepdim=True) / denominator
    augmented = torch.cat([u, -delta], dim=1) @ torch.cat([value, torch.ones(N, 1).double()], dim=1).T
    d_scores = augmented * slope
    torch.testing.assert_close(raw.T @ u, d_value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_scores @ key, d_query, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_scores.T @ query, d_key, rtol=1e-12, atol=1e-12)
