"""Measured errors against a dense computation of the same things."""

from __future__ import annotations

from contextlib import nullcontext
from math import inf, nan

import pytest
import torch
from torch import Tensor, nn

from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_dsl.models.measure import Served, measure_errors, relative_error
from fastgrad_grammar.diagnostics import TfgError
from tests.dense import polynomial_attention, softmax_attention

POLYNOMIALS = (fit("balanced", 2, 1.0), fit("balanced", 4, 1.0))
SPECS = tuple(KernelSpec(d=4, dv=6, coefficients=p.coefficients, causal=True, scale=0.5) for p in POLYNOMIALS)
SERVED = tuple(Served(f"layers.{i}", p.eps, p.eps_prime, 0.5) for i, p in enumerate(POLYNOMIALS))


class Layer(nn.Module):
    """Unit queries and keys times a weight, so that |0.5 q.k| <= 1."""

    def __init__(self, spec: KernelSpec, dense: str | None = None) -> None:
        super().__init__()
        self.spec, self.dense = spec, dense
        generator = torch.Generator().manual_seed(int(1000 * spec.coefficients[0]))
        self.w = nn.Parameter(torch.randn(3, 6, 4, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (nn.functional.normalize(x @ w, dim=-1) * 2**0.5 for w in self.w[:2])
        v = x + 0 * self.w[2].sum()
        if self.dense is None:
            return load_kernel(self.spec)(q, k, v)
        if self.dense == "exact":
            return softmax_attention(q, k, v, scale=0.5, causal=True)
        return polynomial_attention(q, k, v, self.spec.coefficients, scale=0.5, causal=True)


def stack(*dense: str | None) -> nn.Module:
    return nn.Sequential(*(Layer(spec, kind) for spec, kind in zip(SPECS, dense, strict=True)))


INPUT = torch.randn(2, 3, 33, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGET = torch.randn(2, 3, 33, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def objective(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def outcome(model: nn.Module) -> tuple[Tensor, Tensor]:
    output = model(INPUT)
    gradients = torch.autograd.grad(objective(output, TARGET), list(model.parameters()))
    return output.detach(), torch.cat([g.flatten() for g in gradients])


def test_errors_are_those_of_a_dense_computation() -> None:
    errors = measure_errors(stack(None, None), [INPUT], [TARGET], objective, SERVED)
    output, gradient = outcome(stack("polynomial", "polynomial"))
    exact_output, exact_gradient = outcome(stack("exact", "exact"))
    assert errors.output == pytest.approx(relative_error(output, exact_output), rel=1e-6)
    assert errors.gradient == pytest.approx(relative_error(gradient, exact_gradient), rel=1e-6)
    assert errors.exact_loss == pytest.approx(objective(exact_output, TARGET).item(), rel=1e-9)
    for index, mixed in enumerate([("exact", "polynomial"), ("polynomial", "exact")]):
        moved_output, moved_gradient = outcome(stack(*mixed))
        assert errors.attentions[index].output_effect == pytest.approx(
            relative_error(moved_output, output), rel=1e-6
        )
        assert errors.attentions[index].gradient_effect == pytest.approx(
            relative_error(moved_gradient, gradient), rel=1e-6
        )


def test_local_errors_are_of_one_attention_on_its_own_inputs() -> None:
    errors = measure_errors(stack(None, None), [INPUT], [TARGET], objective, SERVED)
    first = Layer(SPECS[0], "polynomial")(INPUT)
    second = [Layer(SPECS[1], kind)(first) for kind in ("polynomial", "exact")]
    assert errors.attentions[1].local["output"].measured == pytest.approx(relative_error(*second), rel=1e-6)
    assert errors.attentions[0].path == "layers.0"


def test_measured_errors_respect_the_bounds() -> None:
    errors = measure_errors(stack(None, None), [INPUT], [TARGET], objective, SERVED)
    for attention in errors.attentions:
        for found in (attention.local["output"], attention.gradient):
            assert 0 < found.measured <= found.bound


class Given(nn.Module):
    """One attention whose queries, keys and values are weights, so that their gradients are those of the model."""

    def __init__(self, dense: str | None = None) -> None:
        super().__init__()
        self.layer = Layer(SPECS[0], dense)
        generator = torch.Generator().manual_seed(3)

        def rows(heads: int, width: int) -> nn.Parameter:
            drawn = torch.randn(1, heads, 17, width, generator=generator, dtype=torch.float64)
            return nn.Parameter(nn.functional.normalize(drawn, dim=-1) * 2**0.5)

        self.q, self.k, self.v = rows(4, 4), rows(2, 4), rows(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.dense is None:
            return load_kernel(SPECS[0])(self.q, self.k, self.v) + 0 * x.sum()
        k, v = (tensor.repeat_interleave(2, 1) for tensor in (self.k, self.v))
        return softmax_attention(self.q, k, v, scale=0.5, causal=True)


def test_each_tensor_and_each_head_has_its_own_error() -> None:
    cotangent = torch.randn(1, 4, 17, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = measure_errors(
        Given(), [INPUT], [cotangent], lambda out, g: (out * g).sum(), SERVED[:1]
    ).attentions[0]
    results = []
    for dense in (None, "exact"):
        model = Given(dense)
        output = model(INPUT)
        results.append(
            (output, *torch.autograd.grad((output * cotangent).sum(), [model.q, model.k, model.v]))
        )
    for name, value, exact in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        assert found.local[name].measured == pytest.approx(relative_error(value, exact), rel=1e-6), name
        assert 0 < found.local[name].measured <= found.local[name].bound
    for index, head in enumerate(found.heads):
        value, exact = (result[0][:, index] for result in results)
        assert head.output.measured == pytest.approx(relative_error(value, exact), rel=1e-6)
        assert head.output.measured <= head.output.bound
        assert head.reach == pytest.approx(1.0)
    assert len(found.heads) == 4


def test_a_bound_that_claims_too_much_is_seen() -> None:
    claims = [Served(s.path, s.eps / 1000, s.eps_prime / 1000, s.scale) for s in SERVED]
    errors = measure_errors(stack(None, None), [INPUT], [TARGET], objective, claims)
    pairs = [(a.local["output"], a.gradient) for a in errors.attentions]
    assert any(all(each.measured > each.bound for each in pair) for pair in pairs)


class Unweighted(nn.Module):
    """Attention of its input to itself; a second result is of integers."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = nn.functional.normalize(x[..., :4], dim=-1) * 2**0.5
        return load_kernel(SPECS[0])(q, q, x), x.argmax(-1)


def test_model_without_weights() -> None:
    errors = measure_errors(Unweighted(), [INPUT], [], None, SERVED[:1])
    assert errors.weight_gradients == {}
    found = errors.attentions[0].gradient
    assert 0 < found.measured <= found.bound
    assert measure_errors(nn.Identity(), [torch.arange(3)], [], None, []).output == 0


def test_without_an_objective_gradients_are_of_a_projection() -> None:
    errors = measure_errors(stack(None, None), [INPUT], [], None, SERVED)
    assert errors.loss is None
    assert 0 < errors.gradient < 1


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen", "one frozen weight"])
def test_gradients_are_measured_whatever_the_callers_mode(mode: str) -> None:
    """Else zeros are compared with zeros, and the budget is "kept"."""
    expected = measure_errors(stack(None, None), [INPUT], [TARGET], objective, SERVED)
    model = stack(None, None)
    for index, weight in enumerate(model.parameters()):
        weight.requires_grad_(not (mode == "frozen" or (mode == "one frozen weight" and index == 0)))
    needs = [weight.requires_grad for weight in model.parameters()]
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, nullcontext)():
        found = measure_errors(model, [INPUT], [TARGET], objective, SERVED)
    assert found == expected
    assert 0 < found.gradient < 0.2
    assert [weight.requires_grad for weight in model.parameters()] == needs
    assert all(weight.grad is None for weight in model.parameters())


def test_what_is_not_finite_has_no_error() -> None:
    """A polynomial far beyond R overflows where softmax does not: no number may be said of it, and not 0."""
    model = stack(None, None)
    with pytest.raises(TfgError, match=r"FG427.*exact model"):
        measure_errors(model, [INPUT * nan], [TARGET], objective, SERVED)
    wild = KernelSpec(d=4, dv=6, coefficients=(1.0, 1.0, 0.5, 1e308), causal=True, scale=0.5)
    served = Served("layers.0", 0.1, 0.1, 0.5)
    with pytest.raises(TfgError, match=r"FG427.*compiled model"):
        measure_errors(nn.Sequential(Layer(wild)), [INPUT], [TARGET], objective, [served])
    finite = torch.ones(3)
    assert relative_error(finite * nan, finite) == relative_error(finite, finite * nan) == inf
    assert relative_error(finite * 0, finite * 0) == 0
