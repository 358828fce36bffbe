"""Attention of the next tokens by C++ kernels, against the dense reference, and by turns with PyTorch's operations."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime.native_attention import NativeAttention
from fastgrad_compiler.runtime.state import State
from fastgrad_compiler.runtime.step_attention import FEW, attention_step
from fastgrad_compiler.runtime.step_tokens import Rule
from tests.kernels.inputs import COEFFICIENTS, CPP, Inputs, make_inputs, run_dense, worst_error
from tests.kernels.test_step import DOUBLE, SPLITS, N, steps

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.medium]

SINGLE = 1e-5
# name: d, dv, degree, and what else the kernel is made for. One library each.
SPECS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "all": (3, 5, 2, {"near": 4, "near_d": 3, "padding": True, "documents": True, "forget": True}),
    "near": (18, 34, 3, {"near": 5}),
    "states": (9, 16, 2, {"documents": True, "forget": True}),
}


def specification(name: str, **more: Any) -> KernelSpec:
    d, dv, degree, options = SPECS[name]
    return KernelSpec(d, dv, COEFFICIENTS[degree], causal=True, scale=0.7, **{**options, **more})


def native_of(spec: KernelSpec) -> NativeAttention:
    """The native operations of a kernel."""
    found: NativeAttention = sys.modules[load_kernel(spec, CPP).__module__].NATIVE
    return found


class Counted:
    """Native operations that count the tokens which they serve, and can be turned off."""

    def __init__(self, native: NativeAttention, turns: Iterator[bool] | None = None) -> None:
        self.native, self.turns, self.served, self.absorbed = native, turns, 0, 0

    def is_plain(self) -> bool:
        return self.native.is_plain()

    def stepper(self, tokens: Any) -> Any:
        return None if self.turns is not None and not next(self.turns) else self.native.stepper(tokens)

    def step(self, operation: Any, inputs: Any, *rest: Any) -> Tensor:
        self.served += inputs.q.shape[2]
        return self.native.step(operation, inputs, *rest)

    def absorb(self, sums: Tensor, k: Tensor, *rest: Any) -> bool:
        done = self.native.absorb(sums, k, *rest)
        self.absorbed += done * k.shape[2]
        return done


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SPECS)
def test_matches_the_dense_reference(name: str, batch: int) -> None:
    spec = specification(name)
    inputs = make_inputs(spec, N, batch=batch, groups=3 - batch % 2)
    wanted = run_dense(spec, inputs)[0]
    for split in SPLITS.values():
        always = Counted(native_of(spec))
        by_turns = Counted(native_of(spec), itertools.cycle((True, False, False)))
        for native in (always, by_turns):
            found = steps(spec, inputs, Rule.of(spec), split, native=native)
            assert worst_error([found], [wanted]) < DOUBLE, split
        assert always.served == sum(count for count in split[1:] if count <= FEW)


@pytest.mark.parametrize("threads", [2, 16])
def test_any_number_of_threads(threads: int) -> None:
    spec = specification("near")
    inputs = make_inputs(spec, 12, batch=3, heads=40)
    before, found = torch.get_num_threads(), []
    for count in (1, threads):
        torch.set_num_threads(count)
        found.append(steps(spec, inputs, Rule.of(spec), [3, 9], native=native_of(spec)))
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("near", torch.float32, SINGLE), pytest.param("all", torch.bfloat16, 3e-2, marks=pytest.mark.slow)],
)
def test_float32_and_bfloat16_are_near_float64(name: str, dtype: torch.dtype, tolerance: float) -> None:
    spec = specification(name)
    inputs = make_inputs(spec, N, batch=3, groups=2)
    wanted = run_dense(spec, inputs)[0]
    for split in ("one by one", "odd", "at once"):
        native = Counted(native_of(spec))
        found = steps(spec, inputs.to(dtype), Rule.of(spec), SPLITS[split], native=native)
        assert found.dtype == dtype
        assert worst_error([found], [wanted]) < tolerance
        assert native.served + native.absorbed > 20


def test_arithmetic_in_float64_of_tokens_in_float32() -> None:
    spec = specification("all", precision="float64")
    inputs = make_inputs(spec, N).to(torch.float32)
    native = Counted(native_of(spec))
    found = steps(spec, inputs, Rule.of(spec), SPLITS["one by one"], native=native)
    wanted = run_dense(spec, inputs.to(torch.float64))[0]
    assert native.served == N - 1
    assert found.dtype == torch.float32
    assert worst_error([found], [wanted.float()]) < 2e-7


@pytest.mark.parametrize("name", ["all", "states"])
def test_gates_of_nothing_and_of_everything(name: str) -> None:
    spec = specification(name)
    inputs = make_inputs(spec, N)
    gates = inputs.tensors[-1].detach().clone()
    gates[:, :, ::3], gates[:, :, 7::10] = 0.0, -1000.0
    given = Inputs((*inputs.tensors[:-1], gates), inputs.mask, inputs.cotangent, inputs.documents)
    wanted = steps(spec, given, Rule.of(spec), SPLITS["odd"])
    for split in SPLITS.values():
        found = steps(spec, given, Rule.of(spec), split, native=native_of(spec))
        assert worst_error([found], [wanted]) < DOUBLE


def test_documents_of_one_token() -> None:
    spec = specification("states")
    inputs = make_inputs(spec, N)
    ids = torch.arange(N).expand(2, -1)
    given = Inputs(inputs.tensors, None, inputs.cotangent, ids)
    found = steps(spec, given, Rule.of(spec), SPLITS["one by one"], native=native_of(spec))
    assert worst_error([found], [inputs.tensors[2]]) < DOUBLE


@pytest.mark.parametrize("name", ["all", "states"])
def test_what_a_token_does_not_see_changes_nothing(name: str) -> None:
    """Values that are not finite, in hidden tokens and in other documents."""
    spec = specification(name)
    inputs = make_inputs(spec, N)
    q, k, v, *others = (x.detach().clone() for x in inputs.tensors)
    documents = (torch.arange(N) >= 20).long().expand(2, -1)
    mask = torch.ones(2, N, dtype=torch.bool)
    hidden = spec.padding
    mask[:, 25] = not hidden
    shown = mask if hidden else None
    clean = Inputs((q.clone(), k.clone(), v.clone(), *others), shown, inputs.cotangent, documents)
    wanted = steps(spec, clean, Rule.of(spec), SPLITS["odd"])
    v[:, :, 5], v[:, :, 40] = torch.nan, torch.inf
    if hidden:
        k[:, :, 25], v[:, :, 25] = torch.inf, torch.nan
    spoilt = Inputs((q, k, v, *others), shown, inputs.cotangent, documents)
    seen = torch.zeros(N, dtype=torch.bool)
    seen[5:20], seen[40:] = True, True
    for split in SPLITS.values():
        found = steps(spec, spoilt, Rule.of(spec), split, native=native_of(spec))
        assert not found[:, :, seen].isfinite().any()
        assert worst_error([found[:, :, ~seen]], [wanted[:, :, ~seen]]) < DOUBLE


def test_keys_of_a_prompt_are_summed_up() -> None:
    spec = specification("all")
    inputs = make_inputs(spec, 600, groups=2)
    native = Counted(native_of(spec))
    whole = load_kernel(spec, CPP)
    found = steps(spec, inputs, Rule.of(spec), [590, 10], native=native, whole=whole)
    assert native.absorbed >= 590 - 8
    assert native.served == 10
    assert worst_error([found], [run_dense(spec, inputs)[0]]) < DOUBLE


@torch.no_grad()
def test_what_native_kernels_cannot_serve() -> None:
    """Gradients, maps, another dtype of what is kept, a guard, and a user who wants none."""
    spec = specification("near")
    inputs = make_inputs(spec, 8)
    native, rule = native_of(spec), Rule.of(spec)
    q, k, v = (x.detach() for x in inputs.tensors)
    state = State("", torch.zeros((), dtype=torch.int64), {})

    def one(token: int, *given: Tensor) -> Counted:
        counted = Counted(native)
        state.enter("", 1)
        parts = [x[:, :, token, None] for x in given]
        attention_step(*parts, state=state.at("a"), rule=rule, native=counted)  # type: ignore[arg-type]
        state.advance(1)
        return counted

    assert one(0, q, k, v).served == 0  # there is no state yet
    assert one(1, q, k, v).served == 1
    assert one(2, q.float(), k.float(), v.float()).served == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGRAD_NATIVE", "0")
        assert one(3, q, k, v).served == 0
    with torch.enable_grad():
        assert one(4, q, k, v).served == 0
    with forward_ad.dual_level():
        assert one(5, q, k, v).served == 0
    assert one(6, q, k, v).served == 1
    assert native.stepper((q, k, v)) is not None
    assert native.stepper((q.to("meta"), k, v)) is None
    torch.vmap(lambda x: x if not native.is_plain() else pytest.fail("it is mapped"))(k)


@torch.no_grad()
def test_a_state_of_another_size_is_refused() -> None:
    spec = specification("near")
    q, k, v = (x.detach() for x in make_inputs(spec, 1).tensors)
    native = native_of(spec)
    state = State("", torch.zeros((), dtype=torch.int64), {})
    state.enter("", 1)
    attention_step(q, k, v, state=state.at("a"), rule=Rule.of(spec))
    state.advance(1)
    state.enter("", 1)
    with pytest.raises(RuntimeError, match="do not fit"):
        attention_step(q[:1], k[:1], v[:1], state=state.at("a"), rule=Rule.of(spec), native=native)
