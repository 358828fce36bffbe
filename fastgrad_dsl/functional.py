"""Polynomial attention as a function of tensors, without a spec."""

from __future__ import annotations

import math

from torch import Tensor

from fastgrad_compiler.approximation.polynomial import Family, fit
from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.targets import BACKENDS, check_target


def polynomial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    degree: int = 2,
    bound: float = 1.0,
    family: Family = "balanced",
    causal: bool = False,
    near: int | None = None,
    near_qk: tuple[Tensor, Tensor] | None = None,
    documents: Tensor | None = None,
    log_gate: Tensor | None = None,
    scale: float | None = None,
    target: str = "auto",
) -> Tensor:
    """Softmax attention with exp replaced by a polynomial: O(n) in time, forward and backward, and in memory.

    q [.., n, d], k [.., m, d], v [.., m, dv] with any leading dimensions, as for scaled_dot_product_attention; the
    third last is heads, of which q may have a multiple of k's. Returns [.., n, dv]. The weights are p(s),
    s = scale * q.k, with p fitted to exp on [-bound, bound] (docs/mathematics.md, section 1): logits beyond it
    have an unbounded error. scale: 1 / sqrt(d) by default. near: pairs whose blocks of `near` tokens are the same or
    touch are exact, with exp of their own logits: those of near_qk = (q', k'), already scaled, or s. documents:
    integers [.., n] without the dimension of heads; a token sees only its own run of equal ones. log_gate [.., n] with
    the heads of k, at most 0, needs `causal`: the weight of a pair is times e^(its sum over the tokens after the key,
    up to the query). Differentiable once, with respect to every tensor.

    Raises ValueError for shapes that do not fit, and for a polynomial that float64 cannot fit or that is not positive
    on the range; TfgError FG420 for a target that is not available.
    """
    check_target(target)
    if min(q.ndim, k.ndim, v.ndim) < 2:
        raise ValueError("q, k and v need at least two dimensions: [.., tokens, width]")
    polynomial = fit(family, degree, float(bound))
    if not polynomial.positive:
        raise ValueError(
            f"the {family} polynomial of degree {degree} is not positive on [-{bound:g}, {bound:g}]: "
            "take an even degree or a smaller bound"
        )
    near_q, near_k = near_qk or (None, None)
    spec = KernelSpec(
        d=q.shape[-1],
        dv=v.shape[-1],
        coefficients=polynomial.coefficients,
        causal=causal,
        near=near,
        near_d=None if near_q is None else near_q.shape[-1],
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        documents=documents is not None,
        forget=log_gate is not None,
    )
    headless = q.ndim == 2
    inputs = [
        None if x is None else x.unsqueeze(0) if headless else x for x in (q, k, v, near_q, near_k, log_gate)
    ]
    *floats, gates = inputs
    out = load_kernel(spec, BACKENDS[target])(*floats, documents=documents, log_gate=gates)
    return out.squeeze(0) if headless else out
