"""What is measured: polynomial attention and PyTorch's, as functions of the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad, scaled_dot_product_attention

from fastgrad_compiler.approximation.kernel_tiles import CHUNK, tokens_at_a_time
from fastgrad_compiler.approximation.polynomial import Family
from fastgrad_compiler.planning.cost import Flops, Shape, Way, flops
from fastgrad_compiler.runtime.kernel_spec import KernelSpec, choose_chunk
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.functional import polynomial_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """q, k [1, heads, n, d] of unit rows, v [1, heads, n, dv], and the gradient of the output, as v."""

    q: Tensor
    k: Tensor
    v: Tensor
    cotangent: Tensor


def make_inputs(
    n: int, heads: int, d: int, dv: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Inputs:
    """Random inputs from a fixed seed. Unit rows and a scale of 1 keep every logit within [-1, 1]."""
    generator = torch.Generator(device).manual_seed(0)

    def random(width: int) -> Tensor:
        return torch.randn(1, heads, n, width, generator=generator, device=device)

    q, k, v, cotangent = normalize(random(d), dim=-1), normalize(random(d), dim=-1), random(dv), random(dv)
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    return Inputs(q, k, v, cotangent.to(dtype))


@dataclass(frozen=True)
class Contender:
    """One causal attention, by data alone, so that a process of its own can be asked for it.

    degree: of the polynomial, None for scaled_dot_product_attention; near: tokens in a block of the exact near field.
    """

    heads: int
    d: int
    dv: int
    degree: int | None = None
    near: int | None = None
    target: str = "auto"
    family: Family = "balanced"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """As tables call it."""
        if self.degree is None:
            return "SDPA"
        family = "" if self.family == "balanced" else f", {self.family}"
        return f"degree {self.degree}{family}" + (f", near {self.near}" if self.near else "")

    @property
    def rank(self) -> int | None:
        """Monomials of a token's features; None for SDPA."""
        return None if self.degree is None else rank(self.d, self.degree)

    @property
    def chunk(self) -> int | None:
        """Keys that a query meets densely, besides a near field; None for SDPA."""
        if self.degree is None:
            return None
        if BACKENDS[self.target].cpp:
            return tokens_at_a_time(rank(self.d, self.degree))
        coefficients = (1.0,) * (self.degree + 1)
        return choose_chunk(KernelSpec(self.d, self.dv, coefficients, causal=True, near=self.near))

    def flops(self, n: int) -> Flops:
        """Of all heads, by the formulas of docs/mathematics.md, section 4; near pairs are counted with the chunk's."""
        way = Way(self.degree, self.near, chunk=self.chunk or CHUNK)
        work = flops(Shape(n=n, m=n, d=self.d, dv=self.dv), way)
        return Flops(self.heads * work.forward, self.heads * work.backward)

    def inputs(self, n: int) -> Inputs:
        """Its inputs at a length."""
        return make_inputs(n, self.heads, self.d, self.dv, dtype=getattr(torch, self.dtype))

    def function(self) -> Attention:
        """attention(q, k, v); TfgError FG420 at the first call where the target is not available."""
        if self.degree is None:
            return exact
        return partial(
            polynomial_attention,
            degree=self.degree,
            bound=1.0,
            family=self.family,
            scale=1.0,
            causal=True,
            near=self.near,
            target=self.target,
        )

    def ready(self) -> Attention:
        """`function` after a first use on two tokens, which builds what is built once; TfgError FG420 as there."""
        function = self.function()
        results(function, self.inputs(2))
        return function


def results(attention: Attention, inputs: Inputs) -> tuple[Tensor, ...]:
    """Output and gradients of q, k, v."""
    out = attention(inputs.q, inputs.k, inputs.v)
    return (out.detach(), *torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.cotangent))


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention, scale 1, on PyTorch's fast path: its fused CPU kernel needs one width for all.

    Zeros change neither logits nor results. The padding is part of what is timed.
    """
    width = max(q.shape[-1], v.shape[-1])
    q, k, wide = (pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, wide, is_causal=True, scale=1.0)[..., : v.shape[-1]]
