"""Attention and its masks in the C++ kernel of a whole step, against PyTorch's operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_compiler.codegen.cpp.step_kernel import emit_step
from fastgrad_compiler.runtime.step_kernel import LONGEST_CACHE
from tests.dsl.models import disturbed
from tests.native.compilers import NEEDS_COMPILER
from tests.native.steps import counted, differ, steps

pytestmark = [NEEDS_COMPILER, pytest.mark.usefixtures("alone"), pytest.mark.medium]

POWERS = "polynomial(s; (1.0, 1.0, 0.5))"
WEIGHTS = {
    "causal": "softmax(causal(s))",
    "slopes": "softmax(causal(alibi(s)))",
    "gates": "softmax(causal(forget(s, gates)))",
    "near": "softmax(causal(near_far(own, s; 3)))",
    "slopes in documents": "softmax(documents(causal(alibi(s)), ids))",
    "padding": "softmax(padding(causal(s), mask))",
    "documents": "softmax(documents(causal(forget(near_far(own, s; 5), gates)), ids))",
    "both": "softmax(padding(documents(causal(s), ids), mask))",
    "itself": "softmax(window(causal(s); 1))",
    "two": "softmax(window(causal(s); 2))",
    "window": "softmax(window(causal(s); 7))",
    "a wide window": "softmax(window(causal(s); 40))",
    "window with slopes": "softmax(window(causal(alibi(s)); 5))",
    "near in a window": "softmax(window(causal(near_far(own, s; 3)); 8))",
    "window with gates": "softmax(window(causal(forget(s, gates)); 5))",
    "window in documents": "softmax(padding(documents(window(causal(s); 6), ids), mask))",
    "polynomial in documents": f"normalize_rows(documents(causal({POWERS}), ids))",
    "padded polynomial": f"normalize_rows(padding(causal({POWERS}), mask))",
    "near in documents": f"normalize_rows(documents(causal(decay(near_far(exp(own), {POWERS}; 3), gates)), ids))",
    "near, padded": f"normalize_rows(padding(documents(causal(near_far(exp(own), {POWERS}; 2)), ids), mask))",
}
BLOCK = """
block a{number}(x: float[b, n, w], mask: bool[b, n], ids: int[b, n]; e: int, c: int) -> float[b, n, 4 * c] {{
    weight wq: float[w, 4 * e] = xavier()
    weight wk: float[w, 2 * e] = xavier()
    weight wv: float[w, 2 * c] = xavier()
    weight wo: float[w, 4 * e] = xavier()
    weight wl: float[w, 2 * e] = xavier()
    weight wg: float[w, 2] = xavier()
    q = split_heads(x @ wq, 4)
    k = repeat_heads(split_heads(x @ wk, 2), 2)
    v = repeat_heads(split_heads(x @ wv, 2), 2)
    gates = squeeze(repeat_heads(unsqueeze(log_sigmoid(2.0 * (x @ wg)).T, -1), 2), -1)
    own = 0.7 * (split_heads(x @ wo, 4) @ repeat_heads(split_heads(x @ wl, 2), 2).T)
    s = 1.5 * (q @ k.T)
    return merge_heads({weights} @ v)
}}
"""
N = 70  # a cache of 64 tokens is full


def spec(*names: str, e: int = 5, c: int = 7) -> str:
    """A model whose results are those of an attention each."""
    blocks = [BLOCK.format(number=i, weights=WEIGHTS[name]) for i, name in enumerate(names)]
    calls = [f"a{i}(x, mask, ids; e = {e}, c = {c})" for i, _ in enumerate(names)]
    result = ", ".join([f"float[b, n, {4 * c}]"] * len(names))
    model = "model m(x: float[b, n, 24], mask: bool[b, n], ids: int[b, n])"
    return f"dim b\ndim n\n{''.join(blocks)}\n{model} -> ({result}) {{\n    return ({', '.join(calls)})\n}}\n"


@cache
def model(*names: str, e: int = 5, c: int = 7, dtype: torch.dtype = torch.float64) -> Any:
    return disturbed(fg.compile(spec(*names, e=e, c=c), target="cpp").module(dtype=dtype)).eval()


def inputs(batch: int, dtype: torch.dtype = torch.float64, n: int = N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, n, 24, generator=generator).to(dtype)
    mask = torch.rand(batch, n, generator=generator) < 0.8
    mask[0, :3] = False  # a token that sees nothing
    ids = (torch.rand(batch, n, generator=generator) < 0.1).cumsum(1) * 3
    return [x, mask, ids]


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.05}
WIDE = {"e": 37, "c": 50}


SOME = ("documents", "window with gates", "padded polynomial", "near in documents")


@pytest.mark.parametrize(
    ("names", "sizes", "dtype"),
    [
        pytest.param(WEIGHTS, {}, torch.float64, id="all"),
        pytest.param(SOME, WIDE, torch.float32, id="some in float32"),
        pytest.param(SOME, WIDE, torch.bfloat16, id="some in bfloat16"),
        pytest.param(WEIGHTS, WIDE, torch.float32, id="all in float32", marks=pytest.mark.slow),
        pytest.param(WEIGHTS, WIDE, torch.bfloat16, id="all in bfloat16", marks=pytest.mark.slow),
    ],
)
def test_attention_by_the_kernel_is_that_of_pytorch(
    names: Iterable[str], sizes: dict[str, int], dtype: torch.dtype
) -> None:
    """From the first token, after a prompt, by turns, and after several tokens in between; the states too."""
    module, tolerance = model(*names, **sizes, dtype=dtype), TOLERANCE[dtype]
    before = torch.get_num_threads()
    for batch, threads in ((1, 1), (3, 3)):
        given = inputs(batch, dtype)
        wanted, state = steps(module, given, [1] * N)
        torch.set_num_threads(threads)
        for split, turns, count in (
            ([1] * N, None, N - 1),  # the cache grows in PyTorch's operations
            ([7, 1, 1, 12, *[1] * (N - 21)], None, N - 20),
            ([1] * N, itertools.cycle([True, False]), N // 2),
        ):
            with counted(module, turns) as served:
                found, kept = steps(module, given, split)
            assert sum(served) == count
            assert differ(found, wanted) < tolerance
            assert kept.tensors.keys() == state.tensors.keys()
            for path, tensor in kept.tensors.items():
                # native kernels add a block of the ring to the sums, PyTorch's operations a token;
                # and gates of slots that are free mean nothing
                if not path.endswith(("sums", "summed.shared")):
                    each = (..., slice(N)) if path.endswith("log_gate") else ...
                    assert differ([tensor[each]], [state.tensors[path][each]]) < tolerance, path
        torch.set_num_threads(before)


def test_states_branch_and_are_taken_apart() -> None:
    module, given = model(*WEIGHTS), inputs(3)
    whole, _ = steps(module, given, [1] * N)
    _, state = steps(module, given, [60])
    one, two = state.clone(), state[1:2]
    with counted(module) as served:
        rest, _ = steps(module, given, [1] * (N - 60), state)
        again, _ = steps(module, given, [1] * (N - 60), one)
        alone, _ = steps(module, [x[1:2] for x in given], [1] * (N - 60), two)
    assert served.count(False) == 3  # the caches grow
    assert all(map(torch.equal, rest, again))
    assert differ(rest, [x[:, 60:] for x in whole]) < 1e-13
    assert differ(alone, [x[1:2, 60:] for x in whole]) < 1e-13


@pytest.mark.parametrize("capacity", [N - 1, N])
def test_room_that_is_asked_for(capacity: int) -> None:
    """The last token that has room is served by the kernel, and the next one is not."""
    module, given = model(*WEIGHTS), inputs(2)
    wanted, _ = steps(module, given, [1] * N)
    with counted(module) as served:
        found, _ = steps(module, given, [1] * N, module.start(2, capacity=capacity))
    assert served[1:] == [True] * capacity + [False] * (N - capacity)
    assert differ(found, wanted) < 1e-13


def test_long_caches_are_left_to_pytorch() -> None:
    module, given = model(*WEIGHTS), [x[:, :1] for x in inputs(2)]
    state = module.start(2, capacity=LONGEST_CACHE + 2)
    with torch.no_grad(), counted(module):
        kernel: Any = type(module).KERNEL
        for position, serves in ((LONGEST_CACHE - 1, True), (LONGEST_CACHE, False)):
            state.position.fill_(position)
            state.enter(module.STEP, 1, batch=2)
            assert (kernel(module, state, 1, *given) is not None) == serves
            state.entered = False


def _shorter(path: str) -> Any:
    return lambda state: state.tensors.update({path: state.tensors[path][..., :-1, :].contiguous()})


@pytest.mark.parametrize(
    "change",
    [
        _shorter("a0.attention.k"),  # of the first cache, whose room is that of all
        _shorter("a0.attention.v"),
        _shorter("a2.attention.k"),
        _shorter("a10.attention.k"),  # a ring
        lambda state: state.tensors.update(
            {"a2.attention.log_gate": state.tensors["a2.attention.log_gate"].float()}
        ),
        lambda state: state.tensors.update({"a5.attention.seen": state.tensors["a5.attention.seen"].byte()}),
        lambda state: state.tensors.update({"a0.attention.k": state.tensors["a0.attention.k"].mT}),
        lambda state: state.tensors.update({"a0.attention.k": torch.zeros(2, 2, 0, 5, dtype=torch.float64)}),
        lambda state: state.position.fill_(64),
        lambda state: state.position.fill_(2**62),
        lambda state: state.tensors.pop("a6.attention.run"),
    ],
)
def test_states_that_are_not_served(change: Any) -> None:
    """Whatever a state holds, the kernel touches no memory that is not there."""
    module, given = model(*WEIGHTS), [x[:, :1] for x in inputs(2)]
    state = module.start(2)
    with torch.no_grad(), counted(module):
        kernel: Any = type(module).KERNEL
        state.enter(module.STEP, 1, batch=2)
        assert kernel(module, state, 1, *given) is not None
        state.entered = False
        change(state)
        state.enter(module.STEP, 1, batch=2)
        assert kernel(module, state, 1, *given) is None


def test_gates_of_hidden_tokens_are_left_to_pytorch() -> None:
    text = spec("gates").replace("causal(forget(s, gates))", "padding(causal(forget(s, gates)), mask)")
    assert emit_step(fg.compile(text, target="cpp").program, False, ()) is None
