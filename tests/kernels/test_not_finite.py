"""Exact attention with NaN, infinities and numbers that overflow: which rows and gradients are NaN, on every path.

`tests/kernels/leaks.py` asks what stays as it was. Here every row and every gradient is compared with a rule that
shares nothing with the kernels: a row is NaN if it holds or sees a token that is not finite, or if a visible logit
overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.runtime.exact_attention import exact_attention
from fastgrad_compiler.runtime.functions import softmax_attention
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from tests.grids import wide
from tests.kernels.inputs import COEFFICIENTS, run_kernel
from tests.kernels.inputs import Inputs as KernelInputs

NAN, INF = math.nan, math.inf
SCALE = 0.7
DTYPES = {torch.float32: 3e38, torch.float64: 1e308, torch.bfloat16: 3e38}


@dataclass(frozen=True)
class Call:
    """q, k, v of 2 rows, a gradient, and which pairs are visible, bool [2, n, m]."""

    tensors: tuple[Tensor, ...]
    cotangent: Tensor
    visible: Tensor
    options: dict[str, Any]


Run = Callable[[Call], list[Tensor]]


def gradients(call: Call, out: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, call.tensors, call.cotangent)]


def of_pytorch(call: Call) -> list[Tensor]:
    q, k, v = call.tensors
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1], "scale": SCALE}
    if set(call.options) == {"causal"}:
        options["is_causal"] = True
    elif call.options:
        options["attn_mask"] = call.visible[:, None]
    return gradients(call, softmax_attention(q, k, v, **options))


def of_alibi(call: Call) -> list[Tensor]:
    """With a bias that is -inf where a pair is hidden."""
    q, k, v = call.tensors
    bias = torch.zeros(2, q.shape[1], q.shape[2], k.shape[2], dtype=q.dtype)
    bias = bias.masked_fill(~call.visible[:, None], -INF)
    found = softmax_attention(q, k, v, attn_mask=bias, scale=SCALE, enable_gqa=q.shape[1] != k.shape[1])
    return gradients(call, found)


def of_blocks(call: Call) -> list[Tensor]:
    return gradients(call, exact_attention(*call.tensors, **call.options, scale=SCALE))


def of_short_kernel(call: Call) -> list[Tensor]:
    spec = KernelSpec(3, 3, COEFFICIENTS[2], scale=SCALE, causal="causal" in call.options)
    spec = replace(spec, padding="mask" in call.options, documents="documents" in call.options)
    masks = call.options.get("mask"), call.options.get("documents")
    return run_kernel(spec, KernelInputs(call.tensors, masks[0], call.cotangent, masks[1]), exact_below=1000)


SIGHTS = ["", "causal", "mask", "causal, mask", "documents", "window"]
RUNS: dict[str, Run] = {
    "pytorch": of_pytorch,
    "alibi": of_alibi,
    "exact": of_blocks,
    "short kernel": of_short_kernel,
}
PATHS = [(run, sight) for run in RUNS for sight in SIGHTS if (run, sight) != ("short kernel", "window")]


def make(sight: str, n: int, dtype: torch.dtype, groups: int = 1, m: int | None = None) -> Call:
    """Logits of about 1; the mask hides token 0 and two in the middle, documents change in the middle."""
    generator = torch.Generator().manual_seed(n)
    m = n if m is None else m

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    queries, keys = torch.arange(n)[:, None], torch.arange(m)
    visible = torch.ones(2, n, m, dtype=torch.bool)
    options: dict[str, Any] = {}
    if "causal" in sight:
        options["causal"], visible = True, visible & (keys <= queries)
    if "window" in sight:
        options["window"], visible = 3, visible & ((queries - keys).abs() < 3)
    if "mask" in sight:
        mask = torch.ones(2, m, dtype=torch.bool)
        mask[:, [0, m // 2, min(m // 2 + 1, m - 1)]] = False
        options["mask"], visible = mask, visible & mask[:, None]
    if "documents" in sight:
        ids = (torch.arange(n) >= n // 2).long().expand(2, n)
        options["documents"], visible = ids, visible & (ids[:, :, None] == ids[:, None])
    heads = 2
    tensors = random(2, heads * groups, n, 3), random(2, heads, m, 3), random(2, heads, m, 3)
    return Call(tensors, random(2, heads * groups, n, 3), visible, options)


def attacked(call: Call, name: str, token: int, value: float) -> Call:
    tensors = [x.clone() for x in call.tensors]
    tensors["qkv".index(name)][0, :, token, 1] = value
    return replace(call, tensors=tuple(tensors))


def of(run: str, call: Call) -> list[Tensor]:
    return RUNS[run](replace(call, tensors=tuple(x.detach().requires_grad_() for x in call.tensors)))


def nan_tokens(x: Tensor) -> Tensor:
    """bool [2, tokens]: which hold NaN in a head; all heads must agree."""
    flags = x.isnan().any(-1)
    assert (flags == flags[:, :1]).all()
    return flags[:, 0]


def check_marks(found: list[Tensor], call: Call, rows: Tensor) -> None:
    """rows, bool [2, n], and what they reach are NaN, and nothing else is anything but a number."""
    reached = (call.visible & rows[:, :, None]).any(1)
    for x, flags in zip(found, (rows, rows, reached, reached), strict=True):
        assert torch.equal(nan_tokens(x), flags)
        assert x[~flags[:, None].expand(x.shape[:3])].isfinite().all()


def touched(call: Call, name: str, token: int) -> Tensor:
    """bool [2, n]: rows that hold or see the token of the first sequence."""
    rows = torch.zeros(call.visible.shape[:2], dtype=torch.bool)
    if name == "q":
        rows[0, token] = call.visible[0, token].any()
    else:
        rows[0] = call.visible[0, :, token]
    return rows


@pytest.mark.sampled(12)
@pytest.mark.parametrize("lengths", [(1, 16, 33), pytest.param((2, 7, 15), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("run", "sight"), PATHS)
def test_rows_that_are_no_numbers_and_what_they_reach(
    run: str, sight: str, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    """The finite rest is that of the call without it, bit for bit, in the output; the gradients' NaN are all marked."""
    for n in lengths:
        call = make(sight, n, dtype)
        clean = of(run, call)
        for token in {n // 2, n - 1}:
            for name in "qkv":
                for value in (NAN, INF, -INF):
                    found = of(run, attacked(call, name, token, value))
                    rows = touched(call, name, token)
                    check_marks(found, call, rows)
                    kept = ~rows[:, None].expand(found[0].shape[:3])
                    assert torch.equal(found[0][kept], clean[0][kept]), (n, token, name, value)
                    assert torch.equal(found[1][kept], clean[1][kept]), (n, token, name, value)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("sight", ["", "causal", "mask"])
def test_grouped_heads_and_other_lengths_of_keys(run: str, sight: str) -> None:
    for groups, m in ((2, None), (1, 5), (2, 21)):
        if m is not None and sight == "causal":
            continue
        call = make(sight, 9, torch.float32, groups, m)
        for name, token in (("q", 4), ("k", 3), ("v", 3), ("k", 0)):
            check_marks(of(run, attacked(call, name, token, NAN)), call, touched(call, name, token))


@pytest.mark.sampled(10)
@pytest.mark.parametrize(
    ("dtype", "n"),
    wide(product(DTYPES, (9, 70)), few=[(torch.float32, 70), (torch.float64, 9), (torch.bfloat16, 9)]),
)
@pytest.mark.parametrize(("run", "sight"), [path for path in PATHS if path[1]])
def test_hidden_numbers_that_overflow(run: str, sight: str, dtype: torch.dtype, n: int) -> None:
    """Rows that do not see the token keep every bit, and so do all gradients of a loss of these rows."""
    call = make(sight, n, dtype)
    for token in {n // 2, n - 2}:
        rows = touched(call, "k", token)
        kept = ~rows[:, None].expand(call.cotangent.shape[:3])
        call = replace(call, cotangent=call.cotangent * kept.unsqueeze(-1))
        clean = of(run, call)
        for name in "kv":
            for value in (DTYPES[dtype], -DTYPES[dtype], DTYPES[dtype] * 1e-19):
                found = of(run, attacked(call, name, token, value))
                assert torch.equal(found[0][kept], clean[0][kept]), (token, name, value)
                for x, y in zip(found[1:], clean[1:], strict=True):
                    assert torch.equal(x, y), (token, name, value)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("sight", ["", "causal", "mask", "causal, mask"])
def test_visible_logits_that_overflow(run: str, sight: str, dtype: torch.dtype) -> None:
    """To +inf: the row is NaN, and what it reaches. Only that row: the key is an ordinary one for others."""
    for n in (9, 33):
        call = make(sight, n, dtype)
        q, k, v = (x.clone() for x in call.tensors)
        token = n // 2 + 2
        k[0, :, token], q[0, :, token] = 1.0, DTYPES[dtype]
        check_marks(of(run, replace(call, tensors=(q, k, v))), call, touched(call, "q", token))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("sight", ["", "causal", "mask"])
def test_visible_logits_that_do_not_overflow_are_those_of_the_formula(run: str, sight: str) -> None:
    """A logit of 1e30 takes the whole weight, or none."""
    call = make(sight, 9, torch.float32)
    q, k, v = (x.clone() for x in call.tensors)
    k[0, :, 3] = torch.tensor([1e30, 0.0, 0.0])
    call = replace(call, tensors=(q, k, v))
    found = of(run, call)
    scores = (q.double() @ k.double().mT * SCALE).masked_fill(~call.visible[:, None], -INF)
    expected = scores.softmax(-1).nan_to_num(0.0) @ v.double()
    assert torch.allclose(found[0].double(), expected, atol=1e-5)


@pytest.mark.parametrize(("run", "sight"), PATHS)
def test_upstream_gradients_that_are_no_numbers(run: str, sight: str) -> None:
    for n in (9, 33):
        for value in (NAN, INF):
            call = make(sight, n, torch.float32)
            row = n // 2 + 2
            call.cotangent[0, :, row, 1] = value
            found = of(run, call)
            rows = torch.zeros(2, n, dtype=torch.bool)
            rows[0, row] = True
            assert found[0].isfinite().all()
            check_marks([found[0].masked_fill(rows[:, None, :, None], NAN), *found[1:]], call, rows)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("sight", ["causal", "mask", "documents"])
def test_a_row_without_a_gradient_gives_none(run: str, sight: str) -> None:
    """Whatever it holds or sees; its own gradient is 0."""
    call = make(sight, 33, torch.float32)
    for name, token in (("q", 20), ("k", 20), ("v", 20)):
        rows = touched(call, name, token)
        silent = replace(call, cotangent=call.cotangent.masked_fill(rows[:, None, :, None], 0.0))
        for value in (NAN, INF, 3e38):
            found = of(run, attacked(silent, name, token, value))
            assert all(x.isfinite().all() for x in found[1:])
            assert not found[1][rows[:, None].expand(found[1].shape[:3])].any()


def test_zeros_are_no_lost_rows() -> None:
    """The fused kernel's mark of a row without keys, 0 and 0, is what ordinary zeros give, too."""
    for n in (1, 5):
        x = torch.zeros(1, 1, n, 3)
        assert torch.equal(exact_attention(x, x, x, causal=True), x)


def test_ordinary_calls_have_the_bits_of_pytorch() -> None:
    for sight in ("", "causal", "causal, mask"):
        call = make(sight, 45, torch.float32)
        mask = None if sight in ("", "causal") else call.visible[:, None]
        q, k, v = (x.requires_grad_() for x in call.tensors)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=sight == "causal", scale=SCALE
        )
        expected = [out, *torch.autograd.grad(out, (q, k, v), call.cotangent)]
        found = of("pytorch", call)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
