"""The polynomials that could serve an attention, their local errors on data, and how its errors reach the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrad_compiler.approximation.polynomial import Polynomial
from fastgrad_compiler.attention.kernel import spec_of
from fastgrad_compiler.attention.value import Polynomial as Weights
from fastgrad_compiler.codegen.kernel import load_kernel
from fastgrad_dsl.calibration.capture import Call, Errors, exact, named
from fastgrad_dsl.calibration.samples import LocalErrors
from fastgrad_dsl.models.measure import leaf


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

    @property
    def scores(self) -> float:
        """Relative L2 error of the gradients of the queries and keys that it takes, of its heads, as one vector."""
        return self.errors.scores_error(self.heads)


def kernel_of(
    call: Call, coefficients: Sequence[float], near: int | None, centre: Tensor | None
) -> Callable[..., Tensor]:
    """The attention with a polynomial, as a function of the node's inputs; by PyTorch kernels."""
    value = call.attention
    value = replace(
        value, polynomial=Weights("", tuple(coefficients)), near=near if value.near is None else value.near
    )
    widths = {role: x.shape[-1] for role, x in call.by_role.items()}
    kernel = load_kernel(spec_of(value, widths["q"], widths["v"], widths.get("near_q", 0)))

    def attention(*tensors: Tensor) -> Tensor:
        given = value.by_role(tensors)
        k = given["k"]
        k = k if centre is None else k - centre[:, :: centre.shape[1] // k.shape[1]].to(k)
        return kernel(given["q"], k, given["v"], **named(given))

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
    tensors = list(map(leaf, call.inputs))
    output = function(*tensors)
    leaves = [x for x in tensors if x.requires_grad]
    return output.detach(), torch.autograd.grad(output, leaves, call.upstream)


def _relative(errors: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    size = sum(x.double().square().sum().item() for x in references)
    return (sum(x.double().square().sum().item() for x in errors) / size) ** 0.5 if size else 0.0
