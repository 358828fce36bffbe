"""Measured errors of a compiled model: of each attention alone, by its effect on the whole, and of the whole.

A dispatch mode watches the attention operations that a forward and a backward pass run. It compares each with
exact attention on the same inputs, and it can make chosen ones exact, which shows what one attention does to the
model's output and gradients. With all of them exact the model is the exact model. Attentions whose weights are a
polynomial of the model's own are exact already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrad_compiler.approximation.certificates import (
    eta,
    output_rounding,
    score_factor,
    score_gradient_rounding,
    value_gradient_rounding,
)
from fastgrad_compiler.approximation.rounding import EXACT, UNITS, Rounding, Run, Sizes, rounding
from fastgrad_compiler.runtime.attention_op import INPUTS, Inputs, is_short
from fastgrad_compiler.runtime.guard import BudgetViolation
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.targets import PYTORCH, Backends
from fastgrad_dsl.models.spread import Spread, clamped, spread_of
from fastgrad_grammar.diagnostics import TfgError

ALWAYS_EXACT = 2**62  # as `exact_below`: every length is below it
LARGEST_DOUBLE = 2048 * 2048  # pairs of a query and a key up to which a reference is computed in float64
GRADIENTS = ("dq", "dk", "dv")
PLACES = (*GRADIENTS, "dq", "dk")  # what the results of a backward operation are; the last two of near logits
Objective = Callable[..., Tensor]


@dataclass(frozen=True)
class Served:
    """What is known of a polynomial attention before any data: its path, eps, eps' and the logits' scale.

    `own`: the polynomial is the model's own. It stands in for nothing: it is run, and not compared with softmax.
    `bound` is R; `spec` is the kernel and `backends` the target's, for the bound of rounding and for its weights:
    without it nothing is added, and how they spread is not known.
    """

    path: str
    eps: float
    eps_prime: float
    scale: float
    own: bool = False
    bound: float = 0.0
    spec: KernelSpec | None = None
    backends: Backends = PYTORCH

    def rounding(self, q: Tensor, k: Tensor, v: Tensor) -> Rounding:
        """What rounding adds in a call, whose queries and keys are as long as they are."""
        if self.spec is None:
            return EXACT
        longest = [x.detach().double().norm(dim=-1).amax().item() for x in (q, k)]
        reach = abs(self.scale) * longest[0] * longest[1]
        sizes = Sizes(q.shape[-2], k.shape[-2], q.shape[1] // k.shape[1])
        dtype = min((str(x.dtype).removeprefix("torch.") for x in (q, k, v)), key=lambda name: -UNITS[name])
        run = Run("gpu" if q.is_cuda else "cpu", dtype)
        return rounding(self.spec, sizes, min(self.bound, reach), reach, self.backends, run)


@dataclass(frozen=True)
class Local:
    """Relative L2 error of one tensor of one attention: `measured`, and the `bound` proved for the same inputs.

    `exact_is_zero`: the exact tensor is 0 up to its own rounding, as dq and dk are where each query sees one key.
    No error is relative to it, and both numbers are 0.
    """

    measured: float
    bound: float
    exact_is_zero: bool = False


ZERO = Local(0.0, 0.0, exact_is_zero=True)


@dataclass(frozen=True)
class HeadErrors:
    """One query head on a batch: its output's error, and what its logits cannot exceed there.

    `reach` is scale max ||q_i|| max ||k_j||, a bound of |s_ij| for the batch by Cauchy-Schwarz.
    """

    output: Local
    reach: float


@dataclass(frozen=True)
class AttentionErrors:
    """Relative L2 errors of one attention on a batch.

    `local` has "output", "dq", "dk" and "dv", on the inputs that it really got, against exact softmax, in float64 up to
    LARGEST_DOUBLE pairs of tokens and in the model's dtype beyond. Near logits of
    their own count with dq and dk, the larger of the two. Bounds (docs/mathematics.md, section 7) are shares of the
    same norms. `output_effect`, `gradient_effect`: estimates of its part in the model's error: how far the model's
    output, and all weights' gradients, move when this attention alone is made exact.
    """

    path: str
    local: Mapping[str, Local]
    heads: tuple[HeadErrors, ...]
    output_effect: float
    gradient_effect: float

    @property
    def gradient(self) -> Local:
        """The largest measured error, and the largest bound, of dq, dk and dv."""
        found = [self.local[name] for name in GRADIENTS]
        return Local(max(each.measured for each in found), max(each.bound for each in found))


@dataclass(frozen=True)
class Spreads:
    """How an attention spreads its weight in the compiled model and in the exact one; None where no row sees a key."""

    planned: Spread | None
    exact: Spread | None


@dataclass(frozen=True)
class ModelErrors:
    """Relative L2 errors of the whole model on a batch against the exact model with the same weights.

    The estimates add up the effects of the attentions (first order, no cancellation assumed). `loss` is the
    compiled model's and `exact_loss` the exact one's (None without an objective). `spreads`: by path, of the attentions
    that a polynomial serves, the model's own among them.
    """

    output: float
    gradient: float
    output_estimate: float
    gradient_estimate: float
    loss: float | None
    exact_loss: float | None
    weight_gradients: Mapping[str, float]
    attentions: tuple[AttentionErrors, ...]
    spreads: Mapping[str, Spreads]


@dataclass
class _Call:
    """One attention's inputs and output in a forward pass, and its local errors as they become known."""

    inputs: tuple[Any, ...]
    out: Tensor
    local: dict[str, Local] = field(
        default_factory=lambda: dict.fromkeys(("output", *GRADIENTS), Local(0.0, 0.0))
    )
    heads: tuple[HeadErrors, ...] = ()
    spread: Spread | None = None


@dataclass
class _Attentions(TorchDispatchMode):
    """Watches the attention operations of one forward and backward pass, in order; `exact` are made exact."""

    exact: frozenset[int] = frozenset()
    at_any_length: frozenset[int] = frozenset()  # whose polynomials serve below their break-even length too
    compare: Sequence[Served] = ()
    weigh: Sequence[Served] = ()
    calls: list[_Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = str(func)
        if not name.startswith("fastgrad.attention_") or func._schema.arguments[-1].name != "guard":
            return func(*args, **(kwargs or {}))  # kernels of windows are exact at any length
        if "_backward" in name:
            return self._backward(func, args)
        return self._forward(func, args)

    def _forward(self, func: Any, args: tuple[Any, ...]) -> Any:
        index = len(self.calls)
        inputs, (exact_below, guard) = args[:INPUTS], args[INPUTS:]
        below = self._limit(index, exact_below)
        try:
            result = func(*inputs, below, guard)
        except BudgetViolation:  # what it costs is measured here, and not refused
            result = func(*inputs, below, "")
        call = _Call(inputs, result[0])
        self.calls.append(call)
        if self.compare and not (served := self.compare[index]).own:
            reference = func(*_precise(inputs), ALWAYS_EXACT, "")[0]
            bounds = _output_bounds(served, inputs, reference)
            call.local["output"] = _local(result[0], reference, bounds)
            call.heads = _heads(served, inputs, result[0], reference, bounds)
        if self.weigh and (spec := self.weigh[index].spec) is not None:
            given, flag = Inputs(*inputs), result[-1]
            with_exp = is_short(given, below) or bool(flag.numel() and flag)
            is_exact = with_exp and not self.weigh[index].own
            given = given if is_exact else clamped(given, spec, guard)
            call.spread = spread_of(given, spec, exact=is_exact)
        return result

    def _limit(self, index: int, exact_below: int) -> int:
        return ALWAYS_EXACT if index in self.exact else 0 if index in self.at_any_length else exact_below

    def _backward(self, func: Any, args: tuple[Any, ...]) -> Any:
        *saved, exact_below, guard = args[1 + INPUTS :]
        out = saved[0]
        index = next(i for i, call in enumerate(self.calls) if call.out.data_ptr() == out.data_ptr())
        gradients = func(*args[:-2], self._limit(index, exact_below), guard)
        if self.compare and not self.compare[index].own:
            call, served = self.calls[index], self.compare[index]
            cotangent, *inputs = _precise(args[: 1 + INPUTS])
            name = func._schema.name.split("::")[1].removesuffix("_backward")
            forward = getattr(torch.ops.fastgrad, name).default
            reference = func(cotangent, *inputs, *forward(*inputs, ALWAYS_EXACT, ""), ALWAYS_EXACT, "")
            bounds = _gradient_bounds(served, cotangent, inputs, reference, served.rounding(*args[1:4]))
            found: dict[str, Local] = dict.fromkeys(GRADIENTS, ZERO)
            for place, gradient, exact, bound in zip(PLACES, gradients, reference, bounds, strict=False):
                if bound is not None:
                    measured = relative_error(gradient, exact)
                    found[place] = Local(max(measured, found[place].measured), max(bound, found[place].bound))
            call.local |= found
        return gradients


def measure_errors(
    model: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    objective: Objective | None,
    served: Sequence[Served],
    *,
    at_any_length: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> ModelErrors:
    """Compare a compiled model with itself made exact, on one batch.

    `served` are the polynomial attentions, the model's own among them, in the order in which the model runs them.
    Without an objective, gradients are those of a fixed random projection of the output. `at_any_length`: polynomials
    are measured below their break-even length too. Runs two forward and backward passes and one for each approximated
    attention; `progress` is told of each. Raises TfgError FG427 where the batch gives what is not finite.
    """
    approximated = [index for index, attention in enumerate(served) if not attention.own]
    progress("the compiled model")
    anywhere = frozenset(approximated) if at_any_length else frozenset()
    watched = _Attentions(at_any_length=anywhere, compare=served, weigh=served)
    run = partial(_pass, model, inputs, targets, objective)
    found = run(watched)
    progress("the exact model")
    reference = _Attentions(exact=frozenset(approximated), weigh=served)
    exact = run(reference)
    _check(exact, found)
    attentions = []
    for index in approximated:
        progress(served[index].path)
        moved = run(_Attentions(exact=frozenset({index}), at_any_length=anywhere))
        call = watched.calls[index]
        attentions.append(AttentionErrors(served[index].path, call.local, call.heads, *moved.errors(found)))
    output, gradient = found.errors(exact)
    return ModelErrors(
        output=output,
        gradient=gradient,
        output_estimate=sum(a.output_effect for a in attentions),
        gradient_estimate=sum(a.gradient_effect for a in attentions),
        loss=found.loss,
        exact_loss=exact.loss,
        weight_gradients={
            name: relative_error(each, exact.gradients[name]) for name, each in found.gradients.items()
        },
        attentions=tuple(attentions),
        spreads={
            each.path: Spreads(planned.spread, other.spread)
            for each, planned, other in zip(served, watched.calls, reference.calls, strict=True)
        },
    )


def whole_errors(
    model: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    objective: Objective | None,
    approximated: Sequence[bool],
) -> tuple[float, float]:
    """Relative L2 errors of a model's output and of all weights' gradients against itself made exact.

    `approximated` says of each polynomial attention, in the order in which the model runs them, whether it stands in
    for softmax. Polynomials are measured at any length, below their break-even too. Raises TfgError FG427.
    """
    run = partial(_pass, model, inputs, targets, objective)
    those = frozenset(index for index, each in enumerate(approximated) if each)
    found, exact = run(_Attentions(at_any_length=those)), run(_Attentions(exact=those))
    _check(exact, found)
    return found.errors(exact)


@dataclass(frozen=True)
class _Results:
    """Output (several are flattened into one), weights' gradients and loss of a pass."""

    output: Tensor
    gradients: Mapping[str, Tensor]
    loss: float | None

    def errors(self, reference: _Results) -> tuple[float, float]:
        """Relative errors of the output, and of all weights' gradients as one vector."""
        pairs = [(self.gradients[name].double(), r.double()) for name, r in reference.gradients.items()]
        difference = sum((value - r).square().sum().item() for value, r in pairs)
        size = sum(r.square().sum().item() for _, r in pairs)
        return relative_error(self.output, reference.output), math.sqrt(_ratio(difference, size))


def _check(exact: _Results, found: _Results) -> None:
    check_finite("the exact model", exact.output, *exact.gradients.values())
    check_finite("the compiled model", found.output, *found.gradients.values())


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raise TfgError FG427 where a number is not finite: nothing can be compared with it."""
    if all(bool(x.isfinite().all()) for x in tensors):
        return
    message = f"{what} gives numbers that are not finite on this batch, so that no error can be measured"
    help_ = ("look for weights or inputs that are NaN, infinite or too large for the model",)
    raise TfgError.of("FG427", message, *help_)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| in float64; 0 where both vanish, infinite where one is not finite."""
    reference = reference.double()
    size, difference = reference.norm().item(), (value.double() - reference).norm().item()
    return _ratio(difference, size)


def _ratio(difference: float, size: float) -> float:
    """0 where both vanish; infinite if one is not a number."""
    if difference == 0.0:
        return 0.0
    return difference / size if size and not math.isnan(difference / size) else math.inf


def _pass(
    model: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    objective: Objective | None,
    mode: _Attentions,
) -> _Results:
    """One evaluation pass.

    Gradients are those of all weights, frozen ones too, whatever the caller's gradient mode. The backward pass goes on
    to the float inputs, so that attentions of a model without weights have one too.
    """
    training = model.training
    model.eval()
    with torch.inference_mode(False), torch.enable_grad():
        weights = {name: leaf(parameter) for name, parameter in model.named_parameters()}
        inputs = [leaf(x) for x in inputs]
        moving = [x for x in (*weights.values(), *inputs) if x.requires_grad]
        with mode:
            results = torch.func.functional_call(model, weights, tuple(inputs))
            outputs = results if isinstance(results, tuple) else (results,)
            if objective is None:
                floats = [out for out in outputs if out.is_floating_point()]
                scalar = sum((projection(out) * out).sum() for out in floats) + torch.zeros(())
            else:
                scalar = objective(*outputs, *targets)
            found: Sequence[Tensor | None] = [None] * len(moving)
            if scalar.requires_grad:
                found = torch.autograd.grad(scalar, moving, allow_unused=True)
    model.train(training)
    gradients = {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(weights.items(), found, strict=False)
    }
    detached = [out.detach() for out in outputs]
    joined = detached[0] if len(detached) == 1 else torch.cat([out.flatten() for out in detached])
    return _Results(joined, gradients, None if objective is None else scalar.item())


def leaf(x: Tensor) -> Tensor:
    """The same numbers, with a gradient of their own where they are floats."""
    x = x.clone() if x.is_inference() else x.detach()
    return x.requires_grad_(x.is_floating_point())


def projection(output: Tensor) -> Tensor:
    """A fixed random cotangent, for models without an objective."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(output.shape, generator=generator).to(output)


def _precise(tensors: Sequence[Any]) -> list[Any]:
    """[cotangent,] and an operation's inputs in float64, where there are few enough pairs of tokens."""
    queries, keys = tensors[-INPUTS].shape[-2], tensors[1 - INPUTS].shape[-2]
    if queries * keys > LARGEST_DOUBLE:
        return list(tensors)
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


def _value_range(v: Tensor) -> Tensor:
    """max - min of each column of v over the keys: [batch, kv heads, 1, dv]."""
    return v.double().amax(-2, keepdim=True) - v.double().amin(-2, keepdim=True)


def _largest_value(v: Tensor) -> Tensor:
    """max |v| of each column over the keys: [batch, kv heads, 1, dv]."""
    return v.double().abs().amax(-2, keepdim=True)


def _output_bounds(served: Served, inputs: Sequence[Any], reference: Tensor) -> Tensor:
    """The certificate of each entry of the output on these values, in the output's shape."""
    q, k, v = inputs[:3]
    groups = reference.shape[1] // v.shape[1]
    added = output_rounding(served.eps, served.rounding(q, k, v))
    per_row = _value_range(v) * (eta(served.eps) / 2) + added * _largest_value(v)
    return per_row.repeat_interleave(groups, 1).expand_as(reference)


def _heads(
    served: Served, inputs: Sequence[Any], out: Tensor, reference: Tensor, bounds: Tensor
) -> tuple[HeadErrors, ...]:
    """Each query head by itself; no product of n rows by n keys is needed."""
    q, k = inputs[:2]
    longest = [x.double().norm(dim=-1).amax((0, -1)) for x in (q, k)]
    reach = served.scale * longest[0] * longest[1].repeat_interleave(q.shape[1] // k.shape[1])
    parts = zip(*(x.unbind(1) for x in (out, reference, bounds)), reach.tolist(), strict=True)
    return tuple(HeadErrors(_local(*tensors), abs(limit)) for *tensors, limit in parts)


def _local(value: Tensor, reference: Tensor, bounds: Tensor) -> Local:
    return Local(relative_error(value, reference), _share(bounds, reference))


def _gradient_bounds(
    served: Served, cotangent: Tensor, inputs: Sequence[Any], reference: Sequence[Tensor], added: Rounding
) -> list[float | None]:
    """The certificates of the gradients (PLACES) on these inputs with what rounding adds, as shares of their norms.

    Near logits of their own get the same bound: it is one of the whole row of dS, near and far. None for a gradient
    that is 0 up to its own rounding: for each query it is a sum of products whose sizes add up to at most `products`.
    """
    q, k, v, near_q, near_k = inputs[:5]
    heads = k.shape[1]
    eps, eps_prime = served.eps, served.eps_prime

    def of_groups(per_head: Tensor) -> Tensor:
        """Query heads that share a key head add up, by the triangle inequality."""
        return per_head.unflatten(1, (heads, -1)).sum(2)  # type: ignore[no-any-return]

    value_range = _value_range(v).repeat_interleave(q.shape[1] // heads, 1)
    omega = (cotangent.abs() * value_range).sum(-1)  # at least max_j dO_i.v_j - min_j dO_i.v_j
    largest_value = _largest_value(v).repeat_interleave(q.shape[1] // heads, 1)
    products = (cotangent.abs() * largest_value).sum(-1)  # at least max_j sum_c |dO_ic v_jc|
    given = cotangent.norm(dim=-1).sum(-1)
    upstream = of_groups(given * eta(eps) + value_gradient_rounding(eps, added) * given)
    factor = score_factor(eps, eps_prime)
    rounded = score_gradient_rounding(eps, eps_prime, added) * products
    noise = torch.finfo(reference[0].dtype).eps * (k.shape[-2] + v.shape[-1])
    shares: list[float | None] = []
    pairs = [(q * served.scale, k * served.scale, reference[0], reference[1])]
    if near_q is not None:
        pairs.append((near_q, near_k, reference[3], reference[4]))
    for queries, keys, dq, dk in pairs:
        largest = keys.norm(dim=-1).amax(-1, keepdim=True).repeat_interleave(q.shape[1] // heads, 1)
        of_queries = (omega * factor + rounded) * largest
        lengths = queries.norm(dim=-1)
        of_keys = of_groups((omega * lengths).sum(-1) * factor + (rounded * lengths).sum(-1))
        terms = of_groups((products * lengths).sum(-1))
        shares.append(_share(of_queries, dq) if dq.norm() > noise * (products * largest).norm() else None)
        shares.append(_share(of_keys, dk) if dk.norm() > noise * terms.norm() else None)
    of_values = _share(upstream, reference[2]) if reference[2].norm() > noise * given.norm() else None
    return [*shares[:2], of_values, *shares[2:]]


def _share(bounds: Tensor, reference: Tensor) -> float:
    """The norm of bounds as a share of the norm of what they are bounds of."""
    bound, size = bounds.double().norm().item(), reference.double().norm().item()
    return bound / size if size else (0.0 if bound == 0.0 else math.inf)
