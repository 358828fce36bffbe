"""Random inputs of an attention kernel, and the comparison with the dense reference that the tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.targets import BACKENDS, PYTORCH
from tests import dense

CPP = BACKENDS["cpp"]
COEFFICIENTS: dict[int, tuple[float, ...]] = {
    1: (1.0, 0.4),
    2: (1.0, 0.9, 0.55),
    3: (1.0, 1.0, 0.5, 0.12),
    4: (1.0, 1.0, 0.5, 0.16, 0.05),
    5: (1.0, 1.0, 0.5, 0.16, 0.04, 0.01),
    6: (1.0, 1.0, 0.5, 0.16, 0.04, 0.01, 0.002),
}


@dataclass(frozen=True)
class Inputs:
    """q, k, v, near_q, near_k, log_gate (those that there are, which require gradients), a mask, ids of documents, and
    the gradient of the output.
    """

    tensors: tuple[Tensor, ...]
    mask: Tensor | None
    cotangent: Tensor
    documents: Tensor | None = None

    @property
    def named(self) -> dict[str, Tensor]:
        """near_q, near_k and log_gate by name, those that there are."""
        return named(self.tensors[3:])

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """The inputs of an operation, in its order."""
        more = (self.named.get(name) for name in ("near_q", "near_k", "log_gate"))
        return (*self.tensors[:3], *more, self.mask, self.documents)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another precision."""
        tensors = tuple(x.detach().to(dtype).requires_grad_() for x in self.tensors)
        return replace(self, tensors=tensors, cotangent=self.cotangent.to(dtype))


def named(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """What follows q, k and v in `Inputs.tensors`, by name."""
    near, gates = ("near_q", "near_k"), ("log_gate",)
    return dict(zip(((), gates, near, near + gates)[len(tensors)], tensors, strict=True))


def make_inputs(
    spec: KernelSpec,
    n: int,
    m: int | None = None,
    *,
    batch: int = 2,
    heads: int = 2,
    groups: int = 1,
    local_size: float = 2.0,
    seed: int = 0,
) -> Inputs:
    """float64 inputs for a kernel: unit q and k, near logits of about +-local_size, a mask with a hidden beginning.

    Documents of some tokens, down to one, others in each row of the batch; ids of two documents may be the same.
    """
    generator = torch.Generator().manual_seed(seed)
    m = n if m is None else m

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q = normalize(random(batch, heads * groups, n, spec.d), dim=-1)
    k = normalize(random(batch, heads, m, spec.d), dim=-1)
    tensors = [q, k, random(batch, heads, m, spec.dv)]
    if spec.near_d is not None:
        tensors.append(local_size * normalize(random(batch, heads * groups, n, spec.near_d), dim=-1))
        tensors.append(normalize(random(batch, heads, m, spec.near_d), dim=-1))
    mask = None
    if spec.padding:
        mask = torch.rand(batch, m, generator=generator) > 0.4
        mask[0, : m // 3] = False
    cotangent = random(batch, heads * groups, n, spec.dv)
    documents = None
    if spec.documents:
        begins = torch.rand(batch, n, generator=generator) < torch.linspace(0.7, 0.08, batch)[:, None]
        documents = begins.cumsum(1) % 3
    if spec.forget:
        tensors.append(-torch.exp(2.0 * random(batch, heads, n) - 2.0))  # from 0.001 to 5
    return Inputs(tuple(x.requires_grad_() for x in tensors), mask, cotangent, documents)


def run_kernel(
    spec: KernelSpec, inputs: Inputs, exact_below: int = 0, *, native: bool = False
) -> list[Tensor]:
    """Output and the gradients of all inputs, of the kernel."""
    q, k, v = inputs.tensors[:3]
    masks = {"mask": inputs.mask, "documents": inputs.documents}
    out = load_kernel(spec, CPP if native else PYTORCH)(
        q, k, v, **inputs.named, **masks, exact_below=exact_below
    )
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]


def run_dense(spec: KernelSpec, inputs: Inputs, *, exact: bool = False) -> list[Tensor]:
    """Output and the gradients of all inputs, of the dense reference."""
    q, k, v = inputs.tensors[:3]
    options: dict[str, object] = {"scale": spec.scale, "causal": spec.causal, "near": spec.near}
    options |= {"mask": inputs.mask, "documents": inputs.documents}
    if exact:
        out = dense.softmax_attention(q, k, v, **options, **inputs.named)  # type: ignore[arg-type]
    else:
        out = dense.polynomial_attention(q, k, v, spec.coefficients, **options, **inputs.named)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(out, inputs.tensors, inputs.cotangent, allow_unused=True)
    zeros = (torch.zeros_like(x) for x in inputs.tensors)
    return [out, *(z if g is None else g for g, z in zip(gradients, zeros, strict=True))]


def worst_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any tensor, relative to one plus that tensor's largest entry; nan where one is."""
    errors = [
        (a.detach().double() - b.detach().double()).abs().max() / (1.0 + b.detach().double().abs().max())
        for a, b in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).max())
