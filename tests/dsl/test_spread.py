"""How widely rows of weights spread: against dense weights, in the compiled model and in the exact one."""

from __future__ import annotations

from math import isnan, log

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.codegen.kernel import KernelSpec
from fastgrad_compiler.runtime import attention_op, exact_blocks
from fastgrad_compiler.runtime.attention_op import Inputs
from fastgrad_dsl.models.spread import spread_of
from tests.dense import hidden_pairs, polynomial_attention, softmax_attention
from tests.dsl.models import always_polynomial, text

N, COEFFICIENTS = 37, fit("balanced", 2, 1.5).coefficients
CASES: dict[str, dict[str, object]] = {
    "all": {},
    "causal": {"causal": True},
    "near": {"causal": True, "near": 4},
    "near and far": {"near": 3, "near_d": 2},
    "padding": {"padding": True},
    "documents": {"documents": True, "near": 5},
    "forget": {"causal": True, "forget": True, "near": 4, "padding": True},
}


def _inputs(spec: KernelSpec) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(2, 4, N, 3), normal(2, 2, N, 3), normal(2, 2, N, 3)
    near_q, near_k = (normal(2, h, N, 2) for h in (4, 2)) if spec.near_d else (None, None)
    log_gate = -normal(2, 2, N).abs() if spec.forget else None
    mask = (torch.arange(N) % 5 != 2) & (torch.arange(N) < torch.tensor([[N], [9]])) if spec.padding else None
    documents = torch.arange(N).expand(2, N) // torch.tensor([[11], [20]]) if spec.documents else None
    return Inputs(q, k, v, near_q, near_k, log_gate, mask, documents)


def _expected(inputs: Inputs, spec: KernelSpec, *, exact: bool) -> tuple[float, float, float]:
    """Mean entropy, mean e^entropy and mean number of visible keys, of rows that see one; values are unit vectors."""
    each = torch.eye(N, dtype=torch.float64).expand(2, 2, N, N)
    options = {name: getattr(spec, name) for name in ("scale", "causal", "near")}
    options |= {name: getattr(inputs, name) for name in ("near_q", "near_k", "mask", "documents", "log_gate")}
    if exact:
        weights = softmax_attention(inputs.q, inputs.k, each, **options)
    else:
        weights = polynomial_attention(inputs.q, inputs.k, each, spec.coefficients, **options)
    hidden = hidden_pairs(N, N, spec.causal, None, inputs.mask, inputs.documents).expand(weights.shape)
    seen = ~hidden.all(-1)
    entropy = -torch.where(weights > 0, weights * weights.log(), 0.0).sum(-1)[seen]
    return entropy.mean().item(), entropy.exp().mean().item(), (~hidden).double().sum(-1)[seen].mean().item()


@pytest.mark.parametrize("exact", [False, True], ids=["polynomial", "exact"])
@pytest.mark.parametrize("case", CASES)
def test_the_spread_is_that_of_dense_weights(case: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, so that there are several."""
    for module in (attention_op, exact_blocks):
        monkeypatch.setattr(module, "WORK_BYTES", 1)
    spec = KernelSpec(d=3, dv=3, coefficients=COEFFICIENTS, scale=0.3, **CASES[case])  # type: ignore[arg-type]
    inputs = _inputs(spec)
    found = spread_of(inputs, spec, exact=exact)
    assert found is not None
    assert (found.entropy, found.keys, found.visible) == pytest.approx(_expected(inputs, spec, exact=exact))


def test_equal_weights_use_all_keys() -> None:
    spec = KernelSpec(d=3, dv=3, coefficients=COEFFICIENTS, causal=True, scale=0.0)
    found = spread_of(_inputs(spec), spec, exact=True)
    assert found is not None
    assert found.keys == pytest.approx(found.visible) == (N + 1) / 2
    assert found.entropy == pytest.approx(sum(map(log, range(1, N + 1))) / N)


def test_negative_weights_have_no_entropy_and_no_key_no_row() -> None:
    spec = KernelSpec(d=3, dv=3, coefficients=(1.0, 1.0), scale=2.0)
    found = spread_of(_inputs(spec), spec, exact=False)
    assert found is not None
    assert isnan(found.entropy)
    assert found.visible == N
    padded = KernelSpec(d=3, dv=3, coefficients=(1.0, 1.0), padding=True)
    inputs = _inputs(padded)
    assert spread_of(inputs._replace(mask=torch.zeros(2, N).bool()), padded, exact=False) is None


ATTEND = """
    q = split_heads(x, 2)
    return merge_heads(softmax(assume_bound(q @ q.T; bound = 1.0)) @ q)
"""


@pytest.mark.parametrize("policy", ["warn", "clamp", "exact"])
@pytest.mark.parametrize("size", [0.2, 3.0])
def test_weights_are_those_that_run(policy: str, size: float) -> None:
    """What a guard does to a call counts, and so does the break-even length."""
    more = f'budget {{\n    on_violation = {policy}\n    at "*" degree = 2\n}}'
    compiled = fg.compile(text(ATTEND, more=more), target="torch")
    x = size * torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(1))
    model = compiled.module()
    short, entry = (
        compiled.report(each, [x]).attentions[0] for each in (model, always_polynomial(compiled, model))
    )
    assert short.spread is not None
    assert entry.spread is not None
    assert short.spread.planned == short.spread.exact == entry.spread.exact
    if policy == "exact" and size > 1:
        assert entry.spread.planned == entry.spread.exact
        return
    k = x.unflatten(-1, (2, 2)).transpose(1, 2)
    norms = k.norm(dim=-1, keepdim=True)
    q = k * (1 / (norms * norms.amax(2, keepdim=True))).clamp(max=1.0) if policy == "clamp" else k
    assert entry.coefficients is not None
    scores = q @ k.mT
    weights = torch.stack([c * scores**power for power, c in enumerate(entry.coefficients)]).sum(0)
    shares = weights / weights.sum(-1, keepdim=True)
    entropy = -(shares * shares.log()).sum(-1)
    assert entry.spread.planned is not None
    assert entry.spread.planned.nats == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert entry.spread.planned.keys == pytest.approx(entropy.exp().mean().item(), rel=1e-5)


def test_the_models_own_weights_are_its_own_at_every_length() -> None:
    """In short calls too, which meet all pairs one by one."""
    spec = text(
        "q = split_heads(x, 2)\n    return merge_heads(normalize_rows(polynomial(q @ q.T; (0.0, 0.0, 1.0))) @ q)"
    )
    compiled = fg.compile(spec, target="torch")
    model, x = compiled.module(), torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(1))
    assert (compiled.report().attentions[0].break_even or 0) > 5
    short, long = (
        compiled.report(each, [x]).attentions[0].spread
        for each in (model, always_polynomial(compiled, model))
    )
    k = x.unflatten(-1, (2, 2)).transpose(1, 2)
    shares = (k @ k.mT).square()
    shares = shares / shares.sum(-1, keepdim=True)
    for found in (short, long):
        assert found is not None
        assert found.planned is not None
        assert found.planned == found.exact
        assert found.planned.nats == pytest.approx(torch.special.entr(shares).sum(-1).mean().item(), rel=1e-5)
