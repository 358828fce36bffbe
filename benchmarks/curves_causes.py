"""What of a low degree changes the loss: its forward pass, its gradients, or an error of any kind; by many seeds.

Degree 3 stands in for exact attention here, which takes five times as long and ends at the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

import fastgrad_dsl as fg
from benchmarks.budget import demo_spec
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.calibration.calibrate import calibrate
from fastgrad_dsl.calibration.capture import Subject
from fastgrad_dsl.calibration.pace import default_pace
from fastgrad_dsl.documents.calibration import UsedCalibration

LOW, STAND_IN = 1, 3
SHARE = 0.05  # of a gradient's norm: an error about as large as that of queries and keys at degree 1
DEGREES = (1, 2, 3)

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Cause:
    """Degrees of the forward and of the backward pass; `error`: what is added to each weight's gradient."""

    forward: int = STAND_IN
    backward: int = STAND_IN
    error: str = ""

    def model(self, params: Mapping[str, object], seed: int) -> nn.Module:
        """The model from the initial weights of a seed; its gradients have the error."""
        compiled = pinned(self.forward, params)
        model = compiled.module(seed=seed)
        other = pinned(self.backward, params).module(seed=seed)
        _mix(model, other)
        if self.error:
            _add_errors(model, fresh=self.error == "fresh")
        return model


CAUSES = {
    "degree 3": Cause(),
    "degree 2": Cause(2, 2),
    "degree 1": Cause(LOW, LOW),
    "degree 1 forward, 3 backward": Cause(forward=LOW),
    "degree 3 forward, 1 backward": Cause(backward=LOW),
    "degree 3, 5 % added in one direction": Cause(error="fixed"),
    "degree 3, 5 % added in a new direction each step": Cause(error="fresh"),
}


def pinned(degree: int, params: Mapping[str, object]) -> Compiled:
    """The demonstration's model with every attention at a degree, whatever the budget."""
    spec = demo_spec(f'at "*" degree = {degree}\n    at "*" family = "minimax"')
    spec = spec.replace("output <= 0.1", "output <= 10").replace("gradient <= 0.25", "gradient <= 10")
    return fg.compile(spec, params=params, validate=False)


def local_errors(compiled: Compiled, batches: list[tuple[Tensor, ...]]) -> list[dict[str, Any]]:
    """By family and degree, the largest errors of all attentions at initial weights: of the gradients of a
    polynomial's own queries and keys, and of all that an attention has."""
    subject = Subject(compiled.recognised, dict(compiled.module(seed=0).state_dict()), compiled.loss)
    used = UsedCalibration("the text", "initial weights", len(batches), {}, 0)
    found = calibrate(subject, batches, used, default_pace("torch"), probes=1)
    errors: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for each in found.attentions:
        for candidate in each.candidates:
            key = (candidate.polynomial.family, candidate.polynomial.degree)
            errors.setdefault(key, []).append((candidate.scores, candidate.gradient))
    return [
        {
            "family": family,
            "degree": degree,
            "scores": max(one for one, _ in of_all),
            "gradient": max(other for _, other in of_all),
        }
        for (family, degree), of_all in errors.items()
        if degree in DEGREES
    ]


def _mixed(one: Attention, other: Attention, *inputs: Tensor, **_: int) -> Tensor:
    """The value of one attention with the gradients of another, at any length."""
    value: Tensor = _Mixed.apply(one, other, *inputs)  # type: ignore[no-untyped-call]
    return value


class _Mixed(torch.autograd.Function):
    """The value of one attention and the gradients of another."""

    @staticmethod
    def forward(ctx: Any, one: Attention, other: Attention, *inputs: Tensor) -> Tensor:
        ctx.other = other
        ctx.save_for_backward(*inputs)
        return one(*inputs, exact_below=0)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.other(*inputs, exact_below=0)
        return (None, None, *torch.autograd.grad(output, inputs, upstream[0]))


def _mix(model: nn.Module, other: nn.Module) -> None:
    """Give the attentions of a model the gradients of those of another; modules of the same text share their code."""
    pairs = zip(_attentions(model), _attentions(other), strict=True)
    for attention, its in pairs:
        own, others = (type(each).forward for each in (attention, its))
        kernels = (each.__globals__["polynomial_attention"] for each in (own, others))
        names = {**own.__globals__, "polynomial_attention": partial(_mixed, *kernels)}
        attention.forward = MethodType(FunctionType(own.__code__, names), attention)


def _attentions(model: nn.Module) -> list[nn.Module]:
    """Those of a model, in order."""
    return [each for each in model.modules() if type(each).__name__ == "Attend"]


def _add_errors(model: nn.Module, *, fresh: bool) -> None:
    """Add SHARE of each gradient's norm, in a direction that is drawn once or at each step."""
    generator = torch.Generator().manual_seed(0)

    def drawn(weight: Tensor) -> Tensor:
        direction = torch.randn(weight.shape, generator=generator)
        unit: Tensor = direction / direction.norm()
        return unit

    for weight in model.parameters():
        once = drawn(weight)
        weight.register_hook(
            lambda gradient, once=once: (
                gradient + SHARE * gradient.norm() * (drawn(gradient) if fresh else once)
            )
        )
