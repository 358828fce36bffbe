"""Keys of guards: unique, complete, and enough for a process that has no such guard; and what a graph keeps of one."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgrad_compiler.codegen.kernel import KernelSpec, kernel_name, load_kernel
from fastgrad_compiler.runtime import guard as guards
from fastgrad_compiler.runtime.guard import BudgetViolation, Guard, limits
from fastgrad_compiler.runtime.guard_key import POLICIES, PREFIX, GuardKey, new_id, read_key
from fastgrad_compiler.runtime.logit_range import Pairs, clamp, rows_of
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs, run_dense, run_kernel, worst_error

SPEC = KernelSpec(d=3, dv=2, coefficients=COEFFICIENTS[2], scale=-0.7, causal=True)


def inputs_of(n: int = 13, factor: float = 9.0) -> Inputs:
    """Logits far beyond 0.5."""
    made = make_inputs(SPEC, n)
    q, *rest = made.tensors
    return replace(made, tensors=((q.detach() * factor).requires_grad_(), *rest))


def seen_by_few(seed: int) -> float:
    """A bound that two logits are beyond, of queries and keys that are as long as others."""
    q, k, _ = make_inputs(SPEC, 80, seed=seed).tensors
    found = (SPEC.scale * q @ k.mT).tril().abs().detach().flatten().topk(4).values
    return found[1:3].mean().item()


class Layer(nn.Module):
    """A guarded kernel."""

    def __init__(self, policy: str, bound: float = 0.5) -> None:
        super().__init__()
        self.attend = load_kernel(SPEC)
        self.guard = Guard(bound=bound, source="data", policy=policy, path="layers.0")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v, guard=self.guard.key)


def outcome(run: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    out = run(*inputs.tensors)
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]


# ---------------------------------------------------------------- what a graph keeps


@pytest.mark.medium
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("policy", ["warn", "exact", "clamp"])
def test_a_gradient_needs_no_guard(policy: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass is that of the forward pass, also where the model, its guard or the verdict is gone."""
    monkeypatch.setattr(guards, "_waits", lambda device: not late)
    inputs, layer = inputs_of(), Layer(policy)
    layer(*inputs.tensors)  # from now on a verdict is there that came late
    expected = outcome(layer, inputs)
    alone = run_dense(SPEC, inputs, exact=True) if policy == "exact" else run_kernel(SPEC, inputs)
    assert (worst_error(expected, alone) < 1e-12) == (policy != "clamp")
    for forget in ("reset", "delete"):
        out = layer(*inputs.tensors)
        if forget == "reset":
            layer.guard.status(reset=True)
            layer(*inputs.tensors)
        else:
            del layer
            gc.collect()
        found = torch.autograd.grad(out, inputs.tensors, inputs.cotangent)
        assert all(torch.equal(a, b) for a, b in zip((out, *found), expected, strict=True))


def test_a_pass_is_its_own_calls_whatever_the_order() -> None:
    """Calls in range and beyond it, differentiated in another order than they were made in."""
    layer = Layer("exact")
    calls = [inputs_of(n, factor) for n, factor in ((13, 9.0), (9, 1e-3), (11, 9.0), (20, 1e-3))]
    outs = [layer(*inputs.tensors) for inputs in calls]
    for place in (1, 0, 3, 2):
        inputs = calls[place]
        found = torch.autograd.grad(outs[place], inputs.tensors, inputs.cotangent)
        expected = run_kernel(SPEC, inputs) if place % 2 else run_dense(SPEC, inputs, exact=True)
        assert worst_error([outs[place], *found], expected) < 1e-12


@pytest.mark.sampled(2)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", ["warn", "exact", "clamp"])
def test_a_pass_that_is_run_again_is_the_same_function(policy: str, reentrant: bool) -> None:
    """Activation checkpointing, where some samples see that R is exceeded, and others do not."""
    verdicts = set()
    for seed in range(16):
        inputs, bound = make_inputs(SPEC, 80, seed=seed), seen_by_few(seed)
        layer = Layer(policy, bound)
        out = checkpoint(layer, *inputs.tensors, use_reentrant=reentrant)
        out.backward(inputs.cotangent)
        found = [out, *(x.grad for x in inputs.tensors)]
        assert all(
            torch.equal(a, b) for a, b in zip(found, outcome(Layer(policy, bound), inputs), strict=True)
        )
        verdicts.add(layer.guard.status()["violations"])
    assert {0, 2} <= verdicts


def test_a_verdict_that_comes_while_passes_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the next forward pass."""
    monkeypatch.setattr(guards, "_waits", lambda device: False)
    inputs, layer = inputs_of(), Layer("exact")
    found = outcome(lambda *x: checkpoint(layer, *x, use_reentrant=False), inputs)
    assert worst_error(found, run_kernel(SPEC, inputs)) < 1e-12
    found = outcome(lambda *x: checkpoint(layer, *x, use_reentrant=False), inputs)
    assert worst_error(found, run_dense(SPEC, inputs, exact=True)) < 1e-12


def test_equal_inputs_are_served_alike() -> None:
    """With `exact` a call depends on its inputs, not on the calls before."""
    for seed in range(16):
        inputs, layer = make_inputs(SPEC, 80, seed=seed), Layer("exact", seen_by_few(seed))
        first = layer(*inputs.tensors)
        for _ in range(3):
            assert torch.equal(layer(*inputs.tensors), first)


IN_RANGE_OR_NOT = [*((policy, 1e-3) for policy in POLICIES), ("warn", 9.0), ("exact", 9.0), ("clamp", 9.0)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("policy", "factor"), IN_RANGE_OR_NOT)
def test_opcheck(policy: str, factor: float) -> None:
    inputs, key = inputs_of(20, factor), Guard(bound=0.5, source="data", policy=policy).key
    operation = getattr(torch.ops.fastgrad, kernel_name(SPEC)).default
    torch.library.opcheck(operation, (*inputs.tensors, None, None, None, None, None, 0, key))


def test_a_padded_key_has_no_say() -> None:
    """NaN, infinity and 1e30 in a key that is hidden: no violation, and clamp's gradients are finite."""
    spec = replace(SPEC, padding=True, causal=False)
    inputs = make_inputs(spec, 20)
    assert inputs.mask is not None
    inputs.mask[:] = torch.arange(20) < 17
    q, k, _ = inputs.tensors
    mask = inputs.mask
    for value in (torch.nan, torch.inf, 1e30):
        with torch.no_grad():
            k[:, :, 18] = value
        for policy in ("raise", "clamp"):
            guard = Guard(bound=9.0 if policy == "raise" else 0.1, source="data", policy=policy)
            rows = rows_of(q.detach(), k.detach(), mask, None)
            pairs = Pairs(spec.scale, False, 0)
            assert guard.allows(rows, pairs)
            made = clamp(rows, pairs, limits(guard.spec.bounds, rows))
            dq, dk = made.pull(torch.ones_like(q), torch.ones_like(k))
            assert bool(dq.isfinite().all() & dk.isfinite().all() & made.queries().isfinite().all())


def test_another_document_has_no_say_in_a_clamp() -> None:
    spec = replace(SPEC, documents=True)
    inputs = make_inputs(spec, 20)
    documents = (torch.arange(20) // 10).expand(2, 20).contiguous()
    q, k = (x.detach() for x in inputs.tensors[:2])
    for causal in (True, False):
        pairs, bound = Pairs(spec.scale, causal, 0), torch.tensor([0.1], dtype=q.dtype)
        before = clamp(rows_of(q, k, None, documents), pairs, bound).queries()
        for value in (torch.nan, torch.inf, 1e200):
            for token, same in ((15, slice(0, 10)), (5, slice(10, 20))):
                other = k.clone()
                other[:, :, token] = value
                after = clamp(rows_of(q, other, None, documents), pairs, bound).queries()
                assert torch.equal(before[:, :, same], after[:, :, same])


# ---------------------------------------------------------------- keys


def test_a_key_says_what_a_guard_is() -> None:
    guard = Guard("y", bound=(0.1, 1 / 3), source="weights", policy="raise", path='a."b".y')
    assert read_key(guard.key) == guard.spec
    before = guard.spec.id
    guard.name("layers.3.y")
    assert read_key(guard.key).path == "layers.3.y"
    assert guard.spec.id == before
    others = [Guard(bound=1.0, source="data"), copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))]
    assert len({guard.spec.id, *(other.spec.id for other in others)}) == 4


GOOD = json.loads(str(GuardKey(new_id(), 1.0, "data", "raise")).removeprefix(PREFIX))
BAD = {
    "a counter": "attention#0",
    "no JSON": PREFIX + "{",
    "no object": PREFIX + "[1, 2]",
    "a field too many": PREFIX + json.dumps({**GOOD, "more": 1}),
    "no policy": PREFIX + json.dumps({k: v for k, v in GOOD.items() if k != "policy"}),
    "an unknown policy": PREFIX + json.dumps({**GOOD, "policy": "stop"}),
    "no bound": PREFIX + json.dumps({k: v for k, v in GOOD.items() if k != "bound"}),
    "a text as bound": PREFIX + json.dumps({**GOOD, "bound": "1"}),
    "no range": PREFIX + json.dumps({**GOOD, "bound": float("nan")}),
    "no heads": PREFIX + json.dumps({**GOOD, "bound": []}),
    "no id": PREFIX + json.dumps({**GOOD, "id": "7"}),
    "a number as path": PREFIX + json.dumps({**GOOD, "path": 7}),
    "another version": str(GuardKey(**GOOD)).replace("guard-1", "guard-2"),
}


@pytest.mark.parametrize("key", BAD.values(), ids=BAD)
def test_what_is_no_key_is_an_error(key: str) -> None:
    with pytest.raises(ValueError, match="is not the key of a guard"):
        load_kernel(SPEC)(*inputs_of().tensors, guard=key)


def test_ranges_are_of_the_attentions_heads() -> None:
    key = Guard(bound=(1.0, 1.0, 1.0), source="data").key
    with pytest.raises(ValueError, match="3 ranges, and its attention 2 heads"):
        load_kernel(SPEC)(*inputs_of().tensors, guard=key)


@pytest.mark.medium
def test_a_key_without_its_guard_still_guards(caplog: pytest.LogCaptureFixture) -> None:
    inputs = inputs_of()
    keys = {policy: Guard(bound=0.5, source="data", policy=policy, path="a.b").key for policy in POLICIES}
    gc.collect()
    for _ in range(2):
        with pytest.raises(BudgetViolation, match=r"^a\.b: a logit of size"):
            load_kernel(SPEC)(*inputs.tensors, guard=keys["raise"])
        for policy in ("warn", "exact", "clamp"):
            found = outcome(lambda *x, key=keys[policy]: load_kernel(SPEC)(*x, guard=key), inputs)
            assert all(torch.equal(a, b) for a, b in zip(found, outcome(Layer(policy), inputs), strict=True))
    assert sum(record.getMessage().startswith("a.b") for record in caplog.records) == 3  # each says it once


LOAD = """
import io, sys
import torch
from fastgrad_compiler.codegen.kernel import load_kernel
from tests.kernels.test_guard_keys import SPEC, Layer, inputs_of
from fastgrad_compiler.runtime.guard import BudgetViolation

others = [Layer("clamp", 1e-3) for _ in range(9)]  # models of this process, made first
programs = torch.load(sys.argv[1])
inputs = programs["inputs"]
for policy in ("warn", "exact", "clamp"):
    loaded = torch.export.load(io.BytesIO(programs[policy])).module()
    assert torch.equal(loaded(*inputs), programs["outputs"][policy]), policy
loaded = torch.export.load(io.BytesIO(programs["raise"])).module()
for _ in range(2):
    try:
        loaded(*inputs)
    except BudgetViolation as error:
        assert str(error).startswith("layers.0: a logit of size"), error
    else:
        raise AssertionError("raise is lost")
assert all(layer.guard.status()["calls"] == 0 for layer in others)
"""


@pytest.mark.medium
def test_an_exported_program_brings_its_guard_along(tmp_path: Path) -> None:
    """In a process where other models were made first; and in this one, when the model is gone."""
    inputs = tuple(x.detach() for x in inputs_of(20).tensors)
    programs: dict[str, object] = {"inputs": inputs, "outputs": {}}
    for policy in POLICIES:
        layer, kept = Layer(policy), io.BytesIO()
        torch.export.save(torch.export.export(layer, inputs), kept)
        programs[policy] = kept.getvalue()
        if policy != "raise":
            programs["outputs"][policy] = layer(*inputs)  # type: ignore[index]
    torch.save(programs, tmp_path / "programs.pt")
    del layer
    gc.collect()
    found = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "programs.pt"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    loaded = torch.export.load(io.BytesIO(programs["raise"])).module()  # type: ignore[arg-type]
    with pytest.raises(BudgetViolation):
        loaded(*inputs)
