"""Attention of the next tokens against the dense reference of the whole text, however the text is split into calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime import step_attention, step_sums
from fastgrad_compiler.runtime.state import State
from fastgrad_compiler.runtime.step import depthwise_step, shift_step
from fastgrad_compiler.runtime.step_attention import attention_step, memory_step
from fastgrad_compiler.runtime.step_tokens import Rule
from tests import dense
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs, run_dense, worst_error

DOUBLE = 1e-12
N = 45
SPLITS = {
    "one by one": [1] * N,
    "at once": [N],
    "odd": [7, 1, 13, 1, 1, 20, 2],
    "long first": [40, 1, 1, 3],
}
FIELDS = [(None, None), (4, None), (3, 3), (64, 2), (1, None)]  # near, near_d
MASKS = [(False, False), (True, False), (False, True), (True, True)]  # padding, documents


def fresh() -> State:
    """A state before the first token."""
    return State("", torch.zeros((), dtype=torch.int64), {})


@torch.no_grad()
def in_steps(
    call: Callable[[Any, State], Tensor], split: list[int], *inputs: tuple[Tensor | None, int]
) -> Tensor:
    """The results of calls on parts of inputs, each with the axis of its tokens, along the second axis from the end."""
    state, first, found = fresh(), 0, []
    for count in split:
        parts = [None if x is None else x.detach().narrow(axis, first, count) for x, axis in inputs]
        state.enter("", count)
        found.append(call(parts, state))
        state.advance(count)
        first += count
    return torch.cat(found, -2)


def steps(spec: KernelSpec, inputs: Inputs, rule: Rule, split: list[int], **more: Any) -> Tensor:
    """The attention of an input in calls."""

    def call(parts: list[Any], state: State) -> Tensor:
        *rows, gate, mask, documents = parts
        given: dict[str, Any] = {"log_gate": gate, "mask": mask, "documents": documents}
        q, k, v, near_q, near_k = rows
        return attention_step(
            q, k, v, near_q, near_k, **given, state=state.at("attention"), rule=rule, **more
        )

    axes = (-2, -2, -2, -2, -2, -1, -1, -1)
    return in_steps(call, split, *zip(inputs.arguments, axes, strict=True))


def polynomial_rule(spec: KernelSpec) -> Rule:
    return Rule(spec.scale, coefficients=spec.coefficients, near=spec.near or 0, precision=spec.precision)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize(("padding", "documents"), MASKS)
@pytest.mark.parametrize(("near", "near_d"), FIELDS)
def test_polynomial(
    near: int | None, near_d: int | None, padding: bool, documents: bool, forget: bool
) -> None:
    spec = KernelSpec(
        3, 4, COEFFICIENTS[2], causal=True, scale=0.7, near=near, near_d=near_d, padding=padding,
        documents=documents, forget=forget,
    )  # fmt: skip
    inputs = make_inputs(spec, N, groups=2)
    wanted = run_dense(spec, inputs)[0]
    for split in SPLITS.values():
        assert worst_error([steps(spec, inputs, polynomial_rule(spec), split)], [wanted]) < DOUBLE


@pytest.mark.parametrize("degree", [1, 3, 6])
def test_degrees(degree: int) -> None:
    spec = KernelSpec(2, 3, COEFFICIENTS[degree], causal=True, near=2)
    inputs = make_inputs(spec, N)
    found = steps(spec, inputs, polynomial_rule(spec), SPLITS["odd"])
    assert worst_error([found], [run_dense(spec, inputs)[0]]) < DOUBLE


@pytest.mark.sampled(10)
@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize(("padding", "documents"), MASKS)
@pytest.mark.parametrize("window", [None, 1, 2, 9, 100])
def test_softmax(window: int | None, padding: bool, documents: bool, forget: bool) -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal=True, padding=padding, documents=documents, forget=forget)
    inputs = make_inputs(spec, N, groups=3)
    options = {"scale": 1.3, "causal": True, "mask": inputs.mask, "documents": inputs.documents}
    q, k, v = inputs.tensors[:3]
    wanted = dense.softmax_attention(q, k, v, window=window, **options, **inputs.named)  # type: ignore[arg-type]
    for split in SPLITS.values():
        found = steps(spec, inputs, Rule(1.3, window=window or 0), split)
        assert worst_error([found], [wanted]) < DOUBLE


def test_softmax_with_its_own_near_logits_and_with_slopes() -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal=True, scale=0.7, near=4, near_d=3)
    inputs = make_inputs(spec, N)
    wanted = run_dense(spec, inputs, exact=True)[0]
    q, k, v = (x.detach() for x in inputs.tensors[:3])
    places = torch.arange(N)
    slopes = torch.exp2(-4.0 * torch.arange(1, 3).double()).view(2, 1, 1)
    scores = 0.7 * q @ k.mT - slopes * (places[:, None] - places)
    sloped = scores.masked_fill(places > places[:, None], -torch.inf).softmax(-1) @ v
    plain = Inputs((q, k, v), None, inputs.cotangent)
    for split in SPLITS.values():
        assert worst_error([steps(spec, inputs, Rule(0.7, near=4), split)], [wanted]) < DOUBLE
        assert worst_error([steps(spec, plain, Rule(0.7, alibi=True), split)], [sloped]) < DOUBLE


def test_a_long_first_call_is_served_as_a_whole_and_leaves_the_same_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal=True, near=4, documents=True, padding=True, forget=True)
    inputs = make_inputs(spec, N)
    wanted = run_dense(spec, inputs)[0]
    served: list[int] = []

    def whole(*given: Any, **named: Any) -> Tensor:
        served.append(given[0].shape[2])
        return load_kernel(spec)(*given, **named)

    monkeypatch.setattr(step_sums, "WORK_BYTES", 1)  # keys are summed up one by one
    found = steps(spec, inputs, polynomial_rule(spec), SPLITS["long first"], whole=whole)
    assert served == [40]
    assert worst_error([found], [wanted]) < DOUBLE


def test_keys_of_another_sequence_are_summed_up_once() -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[2], scale=0.7, padding=True)
    inputs = make_inputs(spec, 5, 31, groups=2)
    q, k, v = (x.detach() for x in inputs.tensors)
    state, rule, found = fresh(), polynomial_rule(spec), []
    state.starting = True
    for token in range(5):
        keys = (k, v) if token == 0 else (torch.full_like(k, torch.nan), v)
        found.append(
            memory_step(q[:, :, token, None], *keys, mask=inputs.mask, state=state.at("a"), rule=rule)
        )
        state.starting = False
    assert worst_error([torch.cat(found, 2)], [run_dense(spec, inputs)[0]]) < DOUBLE


@pytest.mark.parametrize("near", [None, 4])
def test_what_a_token_does_not_see_changes_nothing(near: int | None) -> None:
    """Values that are not finite, in later tokens of a call, hidden ones, and other documents."""
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal=True, near=near, documents=True, padding=True)
    inputs = make_inputs(spec, N)
    q, k, v = (x.detach().clone() for x in inputs.tensors)
    documents = (torch.arange(N) >= 20).long().expand(2, -1)
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[:, 25] = False
    clean = Inputs((q, k, v), mask, inputs.cotangent, documents)
    wanted = steps(spec, clean, polynomial_rule(spec), SPLITS["odd"])
    k, v = k.clone(), v.clone()
    v[:, :, 5], k[:, :, 25], v[:, :, 25], v[:, :, 40] = torch.nan, torch.inf, torch.nan, torch.inf
    spoilt = Inputs((q, k, v), mask, inputs.cotangent, documents)
    for split in SPLITS.values():
        found = steps(spec, spoilt, polynomial_rule(spec), split)
        seen = torch.zeros(N, dtype=torch.bool)
        seen[5:20], seen[40:] = True, True
        assert not found[:, :, seen].isfinite().any()
        assert worst_error([found[:, :, ~seen]], [wanted[:, :, ~seen]]) < DOUBLE


def test_float32_and_bfloat16_are_near_float64() -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[4], causal=True, near=4, forget=True)
    inputs = make_inputs(spec, N)
    wanted = run_dense(spec, inputs)[0]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        found = steps(spec, inputs.to(dtype), polynomial_rule(spec), SPLITS["odd"])
        assert found.dtype == dtype
        assert worst_error([found], [wanted]) < tolerance


def test_gates_that_forget_everything() -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal=True, near=4, forget=True)
    inputs = make_inputs(spec, N)
    *rows, gates = (x.detach() for x in inputs.tensors)
    gates = gates.clone()
    gates[:, :, 30] = -torch.inf
    found = steps(spec, Inputs((*rows, gates), None, inputs.cotangent), polynomial_rule(spec), SPLITS["odd"])
    assert worst_error([found[:, :, 30, None]], [rows[2][:, :, 30, None]]) < DOUBLE  # its own value
    assert found.isfinite().all()


@pytest.mark.parametrize("strength", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("near", [None, 4])
def test_strong_gates_and_hidden_queries(near: int | None, strength: float) -> None:
    """A hidden query has the shares of its visible keys, however far back and forgotten all of them are."""
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal=True, near=near, padding=True, forget=True)
    inputs = make_inputs(spec, N).to(torch.float32)
    *rows, gates = (x.detach() for x in inputs.tensors)
    given = Inputs((*rows, strength * gates), inputs.mask, inputs.cotangent)
    masks = {"mask": given.mask, "log_gate": given.tensors[-1]}
    wanted = load_kernel(spec)(*given.tensors[:3], **masks)
    for split in SPLITS.values():
        assert worst_error([steps(spec, given, polynomial_rule(spec), split)], [wanted]) < 1e-5


def test_a_cache_grows_and_a_ring_does_not() -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal=True, near=4)
    inputs = make_inputs(spec, 200, batch=1)
    sizes: dict[str, set[int]] = {"exact": set(), "polynomial": set()}
    for name, rule in (("exact", Rule()), ("polynomial", polynomial_rule(spec))):

        def call(parts: list[Any], state: State, rule: Rule = rule, name: str = name) -> Tensor:
            out = attention_step(*parts, state=state.at("a"), rule=rule)
            sizes[name].add(state.nbytes)
            return out

        in_steps(call, [1] * 200, *((x, -2) for x in inputs.tensors))
    assert len(sizes["polynomial"]) == 1
    assert len(sizes["exact"]) == 3  # 64, 128, 256 tokens


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_shift_and_depthwise(width: int, documents: bool) -> None:
    from fastgrad_compiler.runtime.convolution import depthwise, shift

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, N, 3, dtype=torch.float64, generator=generator)
    w = torch.randn(width, 3, dtype=torch.float64, generator=generator)
    ids = (torch.rand(2, N, generator=generator) < 0.2).cumsum(1) if documents else None
    for split in SPLITS.values():
        moved = in_steps(lambda p, s: shift_step(*p, by=width, state=s.at("s")), split, (x, -2), (ids, -1))
        assert torch.equal(moved, shift(x, ids, by=width))
        mixed = in_steps(
            lambda p, s: depthwise_step(p[0], w, p[1], state=s.at("d")), split, (x, -2), (ids, -1)
        )
        assert worst_error([mixed], [depthwise(x, w, ids)]) < DOUBLE


def test_nothing_depends_on_how_many_tokens_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal=True)
    inputs = make_inputs(spec, N)
    found = []
    for tile in (1, 3, 128):
        monkeypatch.setattr(step_attention, "TILE", tile)
        found.append(steps(spec, inputs, polynomial_rule(spec), [N]))
    assert worst_error([found[0]], [found[1]]) < DOUBLE
    assert worst_error([found[2]], [found[1]]) < DOUBLE
