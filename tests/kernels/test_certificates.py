"""Kernels against exact attention: never further apart than docs/mathematics.md, section 7, allows.

Masks, grouped heads, near fields with logits of their own and cross-attention, with logits over the whole range.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.approximation.certificates import (
    eta,
    score_factor,
)
from fastgrad_compiler.approximation.polynomial import Polynomial, fit
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from tests.kernels.inputs import Inputs, make_inputs, run_dense, run_kernel

POLYNOMIALS = [fit("balanced", 2, 1.0), fit("balanced", 4, 3.0)]
CASES = list(itertools.product((False, True), (False, True), (None, 2, 5)))  # causal, padding, near
N, M, D, DV, SCALE, GROUPS = 23, 17, 2, 3, 0.5, 2


def visible(spec: KernelSpec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Which keys each query sees, and which of them are near: bool [B, H, n, m]."""
    q, k = inputs.tensors[:2]
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    seen = torch.ones(*q.shape[:-1], k.shape[-2], dtype=torch.bool)
    if spec.causal:
        seen = seen & (j <= i)
    if inputs.mask is not None:
        seen = seen & inputs.mask[:, None, None]
    near = torch.zeros_like(seen) if spec.near is None else (i // spec.near - j // spec.near).abs() <= 1
    return seen, near


def spread(x: Tensor, seen: Tensor) -> Tensor:
    """max - min over the last dimension of what is seen; 0 where nothing is."""
    top = x.masked_fill(~seen, -torch.inf).amax(-1) - x.masked_fill(~seen, torch.inf).amin(-1)
    return top.clamp(min=0.0).nan_to_num(neginf=0.0)


def inputs_of(spec: KernelSpec, polynomial: Polynomial, seed: int) -> Inputs:
    """|s| <= R, and equal to it for many pairs: half of the queries and keys are +-e."""
    made = make_inputs(spec, N, N if spec.causal else M, groups=GROUPS, local_size=6.0, seed=seed)
    q, k, *rest = (x.detach().clone() for x in made.tensors)
    for x in (q, k):
        x[..., ::2, :] = torch.tensor([1.0, 0.0], dtype=torch.float64) * x[..., ::2, :1].sign()
    q = q * polynomial.bound / SCALE
    return Inputs(tuple(x.requires_grad_() for x in (q, k, *rest)), made.mask, made.cotangent)


def limits(
    spec: KernelSpec, polynomial: Polynomial, inputs: Inputs, errors: list[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each error and its bound: of the output's columns, dV and dK summed over keys, dQ by row.

    dS is shared out among near and far pairs; those have queries and keys of their own.
    """
    eps, eps_prime = polynomial.eps, polynomial.eps_prime
    seen, near = visible(spec, inputs)
    q, k, v, *local = (x.detach() for x in inputs.tensors)
    v = v.repeat_interleave(GROUPS, 1)
    upstream = inputs.cotangent
    omega = spread(upstream @ v.mT, seen)
    columns = spread(v.mT[:, :, None].expand(-1, -1, seen.shape[2], -1, -1), seen[..., None, :])
    given = upstream.norm(dim=-1).sum(-1).unflatten(1, (-1, GROUPS)).sum(-1)
    found = {
        "output": (errors[0].abs(), columns * (eta(eps) / 2)),
        "dv": (errors[3].norm(dim=-1).sum(-1), given * eta(eps)),
    }
    sides = [("far", SCALE * q, SCALE, k, seen & ~near, errors[1:3])]
    if local:
        sides.append(("near", local[0], 1.0, local[1], seen & near, errors[4:6]))
    for side, queries, scale, keys, pairs, (dq, dk) in sides:
        lengths = keys.repeat_interleave(GROUPS, 1).norm(dim=-1)[..., None, :]
        longest = scale * lengths.expand(pairs.shape).masked_fill(~pairs, 0.0).amax(-1)
        weighted = (omega * queries.norm(dim=-1)).sum(-1).unflatten(1, (-1, GROUPS)).sum(-1)
        found[f"{side} dq"] = (dq.norm(dim=-1), omega * score_factor(eps, eps_prime) * longest)
        found[f"{side} dk"] = (dk.norm(dim=-1).sum(-1), weighted * score_factor(eps, eps_prime))
    return found


@pytest.mark.parametrize("polynomial", POLYNOMIALS, ids=lambda p: f"{p.family}-{p.degree}-{p.bound:g}")
@pytest.mark.parametrize(("causal", "padding", "near"), CASES)
def test_no_kernel_leaves_its_certificate(
    polynomial: Polynomial, causal: bool, padding: bool, near: int | None
) -> None:
    near_d = None if near is None else 4
    spec = KernelSpec(D, DV, polynomial.coefficients, causal, padding, near, near_d, scale=SCALE, chunk=4)
    for seed in range(2):
        inputs = inputs_of(spec, polynomial, seed)
        pairs = zip(run_kernel(spec, inputs), run_dense(spec, inputs, exact=True), strict=True)
        errors = [(rough - exact).detach() for rough, exact in pairs]
        for name, (error, limit) in limits(spec, polynomial, inputs, errors).items():
            assert (error <= limit + 1e-10).all(), name
            assert (error > 1e-6).any(), f"{name}: nothing was approximated"


@pytest.mark.parametrize("near", [4, 16])
def test_near_pairs_alone_are_exact(near: int) -> None:
    """Within two blocks nothing is far, and nothing is off."""
    spec = KernelSpec(D, DV, POLYNOMIALS[0].coefficients, True, near=near, near_d=4, chunk=4)
    inputs = make_inputs(spec, 2 * near, groups=GROUPS, local_size=60.0)
    for a, b in zip(run_kernel(spec, inputs), run_dense(spec, inputs, exact=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_a_range_that_the_logits_leave_is_seen() -> None:
    """Unit queries and keys at scale 4, and a polynomial for |s| <= 1."""
    polynomial = POLYNOMIALS[0]
    spec = KernelSpec(D, DV, polynomial.coefficients, scale=4.0)
    inputs = make_inputs(spec, N)
    v = inputs.tensors[2]
    error = (run_kernel(spec, inputs)[0] - run_dense(spec, inputs, exact=True)[0]).abs()
    assert (error > (v.amax(-2, keepdim=True) - v.amin(-2, keepdim=True)) * eta(polynomial.eps) / 2).any()
