"""Guards of attention kernels: what they find, what they count, and what each policy makes of a call out of range."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime import guard as guards
from fastgrad_compiler.runtime.guard import BudgetViolation, Guard, limits
from fastgrad_compiler.runtime.logit_range import (
    SAMPLED,
    Pairs,
    Rows,
    choose_sample,
    clamp,
    norm_bound,
    rows_of,
    sampled_range,
)
from fastgrad_compiler.targets import PYTORCH
from tests import dense
from tests.kernels.inputs import COEFFICIENTS, CPP, Inputs, make_inputs, run_dense, run_kernel, worst_error

BASE = KernelSpec(d=3, dv=2, coefficients=COEFFICIENTS[2], scale=-0.7)
SPECS = {
    "plain": BASE,
    "causal": replace(BASE, causal=True),
    "near": replace(BASE, near=2),
    "near of its own": replace(BASE, near=2, near_d=4, causal=True),
    "padding": replace(BASE, padding=True),
    "documents": replace(BASE, documents=True),
    "causal documents": replace(BASE, documents=True, causal=True, padding=True),
    "all": replace(BASE, near=2, near_d=4, causal=True, padding=True, documents=True),
    "forget": replace(BASE, near=2, causal=True, padding=True, forget=True),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
lengths = pytest.mark.parametrize("n", [1, 7, 13])


def scaled(inputs: Inputs, factor: float) -> Inputs:
    """The same with larger queries."""
    q, *rest = inputs.tensors
    return replace(inputs, tensors=((q.detach() * factor).requires_grad_(), *rest))


def far_logits(spec: KernelSpec, inputs: Inputs) -> Tensor:
    """[b, H, n, m]: the logits that the polynomial serves, 0 elsewhere."""
    q, k = inputs.tensors[:2]
    logits = spec.scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    n, m = logits.shape[-2:]
    runs = None
    if inputs.documents is not None:
        runs = (inputs.documents[:, 1:] != inputs.documents[:, :-1]).cumsum(1)
        runs = torch.nn.functional.pad(runs, (1, 0))
    for i, j in product(range(n), range(m)):
        near = spec.near is not None and abs(i // spec.near - j // spec.near) <= 1
        if near or (spec.causal and j > i):
            logits[..., i, j] = 0.0
        if inputs.mask is not None:
            logits[..., i, j] *= inputs.mask[:, j, None]
        if runs is not None:
            logits[..., i, j] *= (runs[:, i] == runs[:, j])[:, None]
    return logits.detach()


def guarded(spec: KernelSpec, inputs: Inputs, guard: Guard, *, native: bool = False) -> list[Tensor]:
    """Output and all gradients of a guarded call."""
    q, k, v = inputs.tensors[:3]
    out = load_kernel(spec, CPP if native else PYTORCH)(
        q, k, v, **inputs.named, mask=inputs.mask, documents=inputs.documents, guard=guard.key
    )
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]


def largest_seen(rows: Rows, pairs: Pairs, turn: int = 0) -> Tensor:
    """[H]: the largest |s| of the sample that a call takes."""
    return sampled_range(rows, pairs, choose_sample(rows, pairs, torch.tensor(turn)))


def counts(guard: Guard) -> tuple[object, ...]:
    status = guard.status()
    return tuple(status[name] for name in ("calls", "proved", "sampled", "violations"))


# ---------------------------------------------------------------- what is found


@lengths
@specs
def test_few_queries_are_sampled_whole(spec: KernelSpec, n: int) -> None:
    inputs = make_inputs(spec, n, groups=2)
    q, k = inputs.tensors[:2]
    rows = rows_of(q.detach(), k.detach(), inputs.mask, inputs.documents)
    pairs = Pairs(spec.scale, spec.causal, spec.near or 0)
    expected = far_logits(spec, inputs).abs().amax((0, 2, 3))
    assert torch.allclose(largest_seen(rows, pairs), expected, rtol=1e-12, atol=1e-14)
    assert (norm_bound(rows, pairs) >= expected - 1e-12).all()


@pytest.mark.sampled(2)
@specs
def test_the_largest_query_of_many_is_in_the_sample(spec: KernelSpec) -> None:
    inputs = make_inputs(spec, 97)
    with torch.no_grad():
        inputs.tensors[0][1, 1, 89] *= 50.0
    q, k = inputs.tensors[:2]
    rows = rows_of(q.detach(), k.detach(), inputs.mask, inputs.documents)
    found = largest_seen(rows, Pairs(spec.scale, spec.causal, spec.near or 0))
    logits = far_logits(spec, inputs).abs()
    assert torch.allclose(found[1], torch.maximum(logits[1, 1, 89].max(), found[1]))
    assert (found <= logits.amax((0, 2, 3)) + 1e-12).all()


def test_work_of_the_sample_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["all"]
    inputs = make_inputs(spec, 97, batch=3, groups=2)
    q, k = inputs.tensors[:2]
    rows = rows_of(q.detach(), k.detach(), inputs.mask, inputs.documents)
    pairs = Pairs(spec.scale, spec.causal, 2)
    whole = largest_seen(rows, pairs)
    monkeypatch.setattr("fastgrad_compiler.runtime.attention_op.WORK_BYTES", 1)
    assert torch.equal(largest_seen(rows, pairs), whole)


def test_a_range_for_each_head() -> None:
    inputs = make_inputs(BASE, 9)
    guard = Guard(bound=(0.71, 1e-3), source="data")
    guarded(BASE, inputs, guard)
    assert counts(guard) == (1, 0, 1, 1)
    guard = Guard(bound=(0.71, 0.71), source="data")
    guarded(BASE, inputs, guard)
    assert counts(guard) == (1, 1, 0, 0)
    heads = guard.status()["heads"]
    assert isinstance(heads, list)
    assert len(heads) == 2


def test_nan_is_beyond_every_range() -> None:
    inputs = make_inputs(BASE, 5)
    with torch.no_grad():
        inputs.tensors[0][0, 0, 0, 0] = torch.nan
    guard = Guard(bound=9.0, source="data")
    guarded(BASE, inputs, guard)
    assert counts(guard) == (1, 0, 1, 1)
    status = guard.status()
    assert all(math.isnan(float(str(status[name]))) for name in ("largest", "at_most", "norms"))


# ---------------------------------------------------------------- in range


@pytest.mark.sampled(24)
@pytest.mark.parametrize("policy", ["warn", "exact", "clamp", "raise"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@specs
def test_in_range_nothing_changes(spec: KernelSpec, policy: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(spec, 13, groups=2).to(dtype)
    guard = Guard(bound=0.75, source="asserted", policy=policy)
    found, expected = guarded(spec, inputs, guard), run_kernel(spec, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counts(guard) == (1, 1, 0, 0)


@specs
def test_sampled_and_in_range(spec: KernelSpec) -> None:
    """Norms do not prove the range, but no logit is beyond it."""
    inputs = make_inputs(spec, 13)
    bound = far_logits(spec, inputs).abs().max().item() * (1 + 1e-9)
    guard = Guard(bound=bound, source="data", policy="raise")
    assert worst_error(guarded(spec, inputs, guard), run_kernel(spec, inputs)) == 0.0
    assert guard.status()["largest"] == pytest.approx(bound)
    assert counts(guard) == (1, 0, 1, 0)


def test_calls_that_are_exact_anyway_are_not_checked() -> None:
    inputs = scaled(make_inputs(BASE, 9), 100.0)
    guard = Guard(bound=0.1, source="data", policy="raise")
    load_kernel(BASE)(*inputs.tensors, exact_below=10, guard=guard.key)
    assert counts(guard) == (0, 0, 0, 0)


# ---------------------------------------------------------------- out of range

FEW = [(name, n) for name in SPECS for n in (1, 7, 13) if SPECS[name].near is None or n > 4]
out_of_range = pytest.mark.parametrize(("name", "n"), FEW)


@out_of_range
def test_exact_is_exact_attention_in_both_passes(name: str, n: int, caplog: pytest.LogCaptureFixture) -> None:
    spec = SPECS[name]
    inputs = scaled(make_inputs(spec, n, groups=2), 9.0)
    if not far_logits(spec, inputs).any():
        pytest.skip("no pair is served by the polynomial")
    guard = Guard(bound=1e-3, source="data", policy="exact", path="layers.0")
    for _ in range(2):
        assert worst_error(guarded(spec, inputs, guard), run_dense(spec, inputs, exact=True)) < 1e-12
    assert counts(guard) == (2, 0, 2, 2)
    assert [record.name for record in caplog.records] == ["fastgrad.budget"]
    assert "layers.0: a logit of size" in caplog.text
    assert "exact attention" in caplog.text
    within = scaled(inputs, 1e-6)
    assert worst_error(guarded(spec, within, guard), run_kernel(spec, within)) == 0.0


def vary(inputs: Inputs) -> None:
    """Make keys of norms that differ, and a query that stays as it is."""
    q, k = inputs.tensors[:2]
    with torch.no_grad():
        k.mul_(torch.linspace(0.5, 1.5, k.shape[2], dtype=torch.float64)[:, None])
        q[:, :, -1] *= 0.1


def clamped(spec: KernelSpec, q: Tensor, inputs: Inputs, bound: float) -> Tensor:
    """Queries scaled by min(1, R / (|scale| K ||q||)), each on its own, K over the keys that it may see."""
    k = inputs.tensors[1].repeat_interleave(q.shape[1] // inputs.tensors[1].shape[1], 1)
    rows = []
    for b, h, i in product(*map(range, q.shape[:3])):
        seen = [
            j
            for j in range(k.shape[2])
            if not (spec.causal and j > i)
            and (inputs.mask is None or inputs.mask[b, j])
            and (
                inputs.documents is None
                or len(set(inputs.documents[b, min(i, j) : max(i, j) + 1].tolist())) == 1
            )
        ]
        factor = q.new_ones(())
        if seen:
            largest = torch.stack([k[b, h, j].norm() for j in seen]).max()
            factor = bound / (abs(spec.scale) * largest * q[b, h, i].norm())
        rows.append(q[b, h, i] * factor.clamp(max=1.0))
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize(("name", "n"), [(name, n) for name in SPECS for n in (1, 6)])
def test_clamp_scales_queries_down(name: str, n: int) -> None:
    """Values and gradients are those of the polynomial on queries that plain differentiable code scaled down."""
    spec, bound = SPECS[name], 0.9
    inputs = scaled(make_inputs(spec, n, groups=2), 3.0)
    vary(inputs)
    guard = Guard(bound=bound, source="data", policy="clamp")
    found = guarded(spec, inputs, guard)
    q = clamped(spec, inputs.tensors[0], inputs, bound)
    _, k, v = inputs.tensors[:3]
    options: dict = {"scale": spec.scale, "causal": spec.causal, "near": spec.near, "mask": inputs.mask}
    options |= inputs.named
    out = dense.polynomial_attention(q, k, v, spec.coefficients, documents=inputs.documents, **options)
    gradients = torch.autograd.grad(out, inputs.tensors, inputs.cotangent, allow_unused=True)
    expected = [
        out, *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs.tensors, strict=True))
    ]  # fmt: skip
    assert worst_error(found, expected) < 1e-12
    assert guard.status()["calls"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@specs
def test_clamped_logits_are_within_the_range(spec: KernelSpec, dtype: torch.dtype) -> None:
    inputs = scaled(make_inputs(spec, 19, groups=2), 30.0).to(dtype)
    q, k = inputs.tensors[:2]
    rows = rows_of(q.detach(), k.detach(), inputs.mask, inputs.documents)
    pairs = Pairs(spec.scale, spec.causal, spec.near or 0)
    queries = clamp(rows, pairs, torch.tensor([0.5], dtype=rows.dtype)).queries()
    assert queries.dtype == dtype
    inside = replace(
        inputs.to(torch.float64), tensors=(queries.double(), *inputs.to(torch.float64).tensors[1:])
    )
    assert far_logits(spec, inside).abs().max() <= 0.5 * (1 + 1e-6)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["plain", "causal", "causal documents"])
def test_gradcheck_of_clamp(name: str) -> None:
    spec = SPECS[name]
    inputs = scaled(make_inputs(spec, 5), 3.0)
    vary(inputs)
    guard = Guard(bound=0.9, source="data", policy="clamp")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masks = {"mask": inputs.mask, "documents": inputs.documents}
        return load_kernel(spec)(q, k, v, **masks, guard=guard.key)

    assert torch.autograd.gradcheck(attend, inputs.tensors)


def test_clamp_hides_what_a_query_may_not_see() -> None:
    """Keys of later tokens, other documents and padding have no say in how far a query is scaled down."""
    spec = SPECS["causal documents"]
    inputs = scaled(make_inputs(spec, 12), 30.0)
    documents = torch.tensor([0] * 5 + [1] * 7).expand(2, 12).contiguous()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 6] = False
    inputs = replace(inputs, documents=documents, mask=mask)
    guard = Guard(bound=0.5, source="data", policy="clamp")
    before = guarded(spec, inputs, guard)[0]
    with torch.no_grad():
        inputs.tensors[1][:, :, [2, 6, 9]] *= 40.0
    after = guarded(spec, inputs, guard)[0]
    same = [0, 1, 5, 6, 7, 8]
    assert torch.equal(before[:, :, same], after[:, :, same])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])


def test_raise_names_attention_range_and_logit() -> None:
    inputs = scaled(make_inputs(BASE, 9), 9.0)
    guard = Guard(bound=0.25, source="weights", policy="raise", path="layers.1.attention")
    with pytest.raises(
        BudgetViolation, match=r"layers\.1\.attention: a logit of size [\d.]+ .* R = 0\.25 \(weights\)"
    ):
        guarded(BASE, inputs, guard)
    assert counts(guard) == (1, 0, 1, 1)


def test_a_range_of_zero_is_one_too(caplog: pytest.LogCaptureFixture) -> None:
    inputs = scaled(make_inputs(BASE, 9), 9.0)
    guarded(BASE, inputs, Guard(bound=0.0, source="asserted", policy="warn", path="layers.0"))
    assert "is beyond R = 0 (asserted)" in caplog.text


def test_warn_says_it_once_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    inputs = scaled(make_inputs(BASE, 9), 9.0)
    guard = Guard(bound=0.25, source="data")
    for _ in range(3):
        assert worst_error(guarded(BASE, inputs, guard), run_kernel(BASE, inputs)) == 0.0
    assert counts(guard) == (3, 0, 3, 3)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    guard.status(reset=True)
    assert counts(guard) == (0, 0, 0, 0)
    guarded(BASE, inputs, guard)
    assert len(caplog.records) == 2


# ---------------------------------------------------------------- devices that are not waited for


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device whose results are read on a later call."""
    monkeypatch.setattr(guards, "_waits", lambda device: False)


@specs
@pytest.mark.usefixtures("late")
def test_late_counts_are_the_same(spec: KernelSpec) -> None:
    inputs = make_inputs(spec, 13)
    largest = far_logits(spec, inputs).abs().max().item()
    guard = Guard(bound=largest * (1 + 1e-9), source="data", policy="raise")
    for factor in (1e-3, 1.0, 1.0 + 1e-6):
        guarded(spec, scaled(inputs, factor), guard)
    assert counts(guard) == (3, 1, 2, 1)
    assert guard.status()["largest"] == pytest.approx(largest * (1 + 1e-6), rel=1e-12)
    with pytest.raises(BudgetViolation):
        guarded(spec, inputs, guard)
    guarded(spec, inputs, guard)  # it was raised once


@pytest.mark.usefixtures("late")
def test_late_exact_acts_from_the_next_call_on(caplog: pytest.LogCaptureFixture) -> None:
    spec = SPECS["near"]
    inputs, within = scaled(make_inputs(spec, 13), 9.0), make_inputs(spec, 13)
    guard = Guard(bound=1.0, source="data", policy="exact")
    assert worst_error(guarded(spec, inputs, guard), run_kernel(spec, inputs)) == 0.0
    assert not caplog.records
    q, k, v = inputs.tensors
    out = load_kernel(spec)(q, k, v, guard=guard.key)
    exact = run_dense(spec, inputs, exact=True)
    assert worst_error([out], exact[:1]) < 1e-12
    assert len(caplog.records) == 1
    assert worst_error(guarded(spec, within, guard), run_dense(spec, within, exact=True)) < 1e-12
    found = torch.autograd.grad(out, inputs.tensors, inputs.cotangent, retain_graph=True)
    assert worst_error([out, *found], exact) < 1e-12
    guard.status(reset=True)
    found = torch.autograd.grad(out, inputs.tensors, inputs.cotangent)
    assert worst_error([out, *found], exact) < 1e-12  # whatever the guard now says


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.usefixtures("late")
def test_a_verdict_is_kept_where_counts_alone_are_set_back(seen: bool) -> None:
    """Also one that no call has `seen`, and a pass that is run again for a backward pass takes none."""
    inputs, within = scaled(make_inputs(BASE, 13), 9.0), make_inputs(BASE, 13)
    guard, raising = (Guard(bound=1.0, source="data", policy=policy) for policy in ("exact", "raise"))
    guarded(BASE, inputs, guard)
    guarded(BASE, inputs, raising)
    if seen:
        guarded(BASE, within, guard)
    guard.status(reset=True, keep_verdict=True)
    raising.status(reset=True, keep_verdict=True)
    assert counts(guard) == (0, 0, 0, 0)
    exact = run_dense(BASE, within, exact=True)
    for _ in range(2):
        assert worst_error(guarded(BASE, within, guard), exact) < 1e-12
    with pytest.raises(BudgetViolation):
        guarded(BASE, within, raising)
    guarded(BASE, within, raising)  # it was raised once
    guard.status(reset=True)
    assert worst_error(guarded(BASE, within, guard), run_kernel(BASE, within)) == 0.0


@pytest.mark.usefixtures("late")
def test_a_verdict_between_the_passes() -> None:
    """A verdict that comes after a forward pass has no say in its backward pass."""
    inputs = scaled(make_inputs(BASE, 13), 9.0)
    guard = Guard(bound=1.0, source="data", policy="exact")
    q, k, v = inputs.tensors
    first, second = (load_kernel(BASE)(q, k, v, guard=guard.key) for _ in range(2))
    for out, expected in ((first, run_kernel(BASE, inputs)), (second, run_dense(BASE, inputs, exact=True))):
        found = torch.autograd.grad(out, inputs.tensors, inputs.cotangent)
        assert worst_error([out, *found], expected) < 1e-12


@pytest.mark.usefixtures("late")
def test_late_clamp_is_the_same() -> None:
    inputs = scaled(make_inputs(BASE, 13), 9.0)
    guard, other = (Guard(bound=1.0, source="data", policy="clamp") for _ in range(2))
    late = guarded(BASE, inputs, guard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "_waits", lambda device: True)
        assert worst_error(late, guarded(BASE, inputs, other)) == 0.0
    assert counts(guard) == counts(other) == (1, 0, 1, 1)


class _NoWaiting(TorchDispatchMode):
    """Fails where a value goes to the host, or a shape depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")
        assert not any(str(func).startswith(f"aten.{name}.") for name in waits), (
            f"{func} waits for the device"
        )
        return func(*args, **(kwargs or {}))


@specs
def test_nothing_waits_for_a_device(spec: KernelSpec) -> None:
    inputs = scaled(make_inputs(spec, 40, groups=2), 9.0)
    q, k = (x.detach() for x in inputs.tensors[:2])
    guard = Guard(bound=0.5, source="data", policy="clamp")
    pairs = Pairs(spec.scale, spec.causal, spec.near or 0)
    rows = rows_of(q, k, inputs.mask, inputs.documents)
    limit = limits(guard.spec.bounds, rows)
    with pytest.MonkeyPatch.context() as patch, _NoWaiting():
        patch.setattr(guards, "_waits", lambda device: False)
        assert guard.allows(rows, pairs)
        made = clamp(rows, pairs, limit)
        made.pull(made.queries(), k)
    assert counts(guard) == (1, 0, 1, 1)
    with pytest.raises(AssertionError, match="waits"), _NoWaiting():
        guard.allows(rows, pairs)


@pytest.mark.usefixtures("late")
def test_a_recorded_graph_counts_and_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_capturing", lambda device: True)
    inputs = scaled(make_inputs(BASE, 9), 9.0)
    guard = Guard(bound=0.5, source="data", policy="raise")
    for _ in range(3):
        guarded(BASE, inputs, guard)
    assert counts(guard) == (3, 0, 3, 3)
    kept = guard._counts_on(inputs.tensors[0])
    guard.status(reset=True)
    assert guard._counts_on(inputs.tensors[0]) is kept  # where a graph counts


# ---------------------------------------------------------------- the object


def test_copies_count_for_themselves() -> None:
    inputs = make_inputs(BASE, 5)
    guard = Guard("y", bound=(0.1, 0.2), source="data", policy="exact", path="layers.0.y")
    guarded(BASE, inputs, guard)
    for other in (copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))):
        assert other.spec.id != guard.spec.id
        assert counts(other) == (0, 0, 0, 0)
        assert replace(other.spec, id=guard.spec.id) == guard.spec


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="one of warn, exact, clamp, raise, not 'stop'"):
        Guard(bound=1.0, source="data", policy="stop")


def test_first_call_in_inference_mode() -> None:
    inputs = make_inputs(BASE, 5)
    guard = Guard(bound=1.0, source="data")
    with torch.inference_mode():
        load_kernel(BASE)(*inputs.tensors, guard=guard.key)
    guarded(BASE, inputs, guard)
    assert counts(guard) == (2, 2, 0, 0)


class Layer(torch.nn.Module):
    """A guarded kernel."""

    def __init__(self, policy: str) -> None:
        super().__init__()
        self.attend = load_kernel(BASE)
        self.guard = Guard(bound=0.3, source="data", policy=policy)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v, guard=self.guard.key)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("policy", ["exact", "clamp"])
def test_compile_without_graph_breaks(policy: str) -> None:
    layer = Layer(policy)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 20):
        inputs = make_inputs(BASE, n)
        out = run(*inputs.tensors)
        found = [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]
        assert (
            worst_error(found, guarded(BASE, inputs, Guard(bound=0.3, source="data", policy=policy))) == 0.0
        )
    assert counts(layer.guard) == (2, 0, 2, 2)


def test_export_keeps_the_guard() -> None:
    layer, inputs = Layer("exact"), [x.detach() for x in make_inputs(BASE, SAMPLED + 4).tensors]
    exported = torch.export.export(layer, tuple(inputs)).module()
    layer.guard.status(reset=True)
    assert torch.equal(exported(*inputs), layer(*inputs))
    assert counts(layer.guard) == (2, 0, 2, 2)


@pytest.mark.medium
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("policy", ["exact", "clamp"])
@pytest.mark.parametrize("name", [pytest.param("causal", marks=pytest.mark.slow), "near of its own"])
def test_native_kernels_are_guarded_too(name: str, policy: str) -> None:
    spec = SPECS[name]
    inputs = scaled(make_inputs(spec, 21, groups=2), 9.0)
    found, expected = (
        guarded(spec, inputs, Guard(bound=0.5, source="data", policy=policy), native=native)
        for native in (True, False)
    )
    assert worst_error(found, expected) < 1e-12
