"""The polynomials that could serve an attention, their local errors on data, and how its errors reach the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrad_compiler.approximation.polynomial import Polynomial
from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_dsl.calibration.capture import Call, Errors, exact
from fastgrad_dsl.calibration.samples import LocalErrors, headed


@dataclass(frozen=True)
class Candidate:
    """A polynomial with the local errors that it was measured to have on the sampled rows, by query head.

    near: block of the near field of the rewrite (not of the model); heads: those whose range it was fitted for.
    """

    polynomial: Polynomial
    near: int | None
    heads: tuple[int, ...]
    errors: LocalErrors

    @property
    def output(self) -> float:
        """Relative L2 error of the output of its heads."""
        return self.errors.output_error(self.heads)

    @property
    def gradient(self) -> float:
        """Relative L2 error of the gradients of q, k and v of its heads, as one vector."""
        return self.errors.gradient_error(self.heads)


def kernel_of(
    call: Call, coefficients: Sequence[float], near: int | None, centre: Tensor | None
) -> Callable[..., Tensor]:
    """The attention with a polynomial, as a function of the node's inputs; by PyTorch kernels."""
    node, others = call.node, call.others
    q, _, v = call.inputs[:3]
    own = node["near"] if isinstance(node["near"], int) else None
    spec = KernelSpec(
        d=q.shape[-1],
        dv=v.shape[-1],
        coefficients=tuple(coefficients),
        causal=bool(node["causal"]),
        padding="padding" in others,
        near=own or near,
        near_d=others["near_q"].shape[-1] if "near_q" in others else None,
        scale=float(str(node["scale"])),
        documents="documents" in others,
    )
    kernel = load_kernel(spec)
    roles = tuple(others)

    def attention(*tensors: Tensor) -> Tensor:
        given = dict(zip(roles, tensors[3:], strict=True))
        q, k, v = (headed(x, call) for x in tensors[:3])
        near_q, near_k = (headed(given[r], call) if r in given else None for r in ("near_q", "near_k"))
        masks = (given.get("padding"), given.get("documents"))
        k = k if centre is None else k - centre[:, :: centre.shape[1] // k.shape[1]].to(k)
        spread = [None if x is None else x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in masks]
        return kernel(q, k, v, near_q, near_k, *spread).reshape(call.output.shape)

    return attention


def whole_errors(
    call: Call, coefficients: Sequence[float], near: int | None, centre: Tensor | None
) -> tuple[Errors, float, float]:
    """What a polynomial changes in one attention on a whole batch, and its relative errors of output and gradient."""
    served = kernel_of(call, coefficients, near, centre)
    output, gradients = _differentiated(call, served)
    reference, wanted = _differentiated(call, lambda *tensors: exact(call.node, tensors))
    errors = Errors(output - reference, tuple(g - w for g, w in zip(gradients, wanted, strict=True)))
    return errors, _relative([errors.output], [reference]), _relative(errors.gradients, wanted)


def _differentiated(call: Call, function: Callable[..., Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    tensors = [x.detach().requires_grad_(x.is_floating_point()) for x in call.inputs]
    output = function(*tensors)
    leaves = [x for x in tensors if x.requires_grad]
    return output.detach(), torch.autograd.grad(output, leaves, call.upstream)


def _relative(errors: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    size = sum(x.double().square().sum().item() for x in references)
    return (sum(x.double().square().sum().item() for x in errors) / size) ** 0.5 if size else 0.0
