"""Attention with learned maps of the standard library, against its formula on all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg

HEAD = "use std\ndim b\ndim n <= 256\n"
SIGNATURE = "q: float[b, 4, n, 6], k: float[b, 2, n, 6], v: float[b, 2, n, 5]"


def module(call: str, signature: str = SIGNATURE) -> torch.nn.Module:
    text = f"{HEAD}model m({signature}) -> float[b, n, 20] {{\n    return {call} as y\n}}\n"
    compiled = fg.compile(text, target="torch")
    assert [entry.decision for entry in compiled.plan_document.attentions] == ["polynomial"]
    model = compiled.module(seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.7)
    return model


def dense(model: torch.nn.Module, given: list[Tensor], shown: Tensor, near: int | None) -> Tensor:
    """The formula of docs/standard-library.md."""
    q, k, v = given
    w = {name.removeprefix("y."): value for name, value in model.named_parameters()}
    n, e = q.shape[-2:]
    far_q, far_k = q @ w["map_q"] + w["bias_q"], k @ w["map_k"] + w["bias_k"]
    s = far_q @ far_k.repeat_interleave(2, 1).mT / far_q.shape[-1] ** 0.5
    weights = 1 + s + s**2 / 2
    if near is not None:
        block = torch.arange(n) // near
        close = (block[:, None] - block).abs() <= 1
        local = q @ (k + w["shift"]).repeat_interleave(2, 1).mT / e**0.5
        weights = torch.where(close, local.exp(), weights)
    weights = weights * shown
    y = weights @ v.repeat_interleave(2, 1) / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return y.transpose(1, 2).flatten(2)


def qkv(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((4, 6), (2, 6), (2, 5))
    return [
        torch.randn(2, heads, n, width, generator=generator, dtype=torch.float64).requires_grad_()
        for heads, width in sizes
    ]


@pytest.mark.parametrize("near", [None, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_results_and_gradients(near: int | None, causal: bool) -> None:
    asked = "" if near is None else f", near = {near}"
    model = module(f"std.attend(q, k, v; causal = {str(causal).lower()}, far_dim = 3{asked})")
    given = qkv(17)
    shown = torch.ones(17, 17).tril().bool() if causal else torch.ones(17, 17).bool()
    found, wanted = model(*given), dense(model, given, shown, near)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    leaves = [*given, *model.parameters()]
    direction = torch.randn(found.shape, dtype=torch.float64)
    for mine, theirs in zip(
        *(torch.autograd.grad(y, leaves, direction) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_padding() -> None:
    model = module(
        "std.attend_padded(q, k, v, mask; far_dim = 3, near = 2)", f"{SIGNATURE}, mask: bool[b, n]"
    )
    given = qkv(11)
    mask = torch.arange(11) < torch.tensor([[11], [4]])
    found = model(*given, mask)
    torch.testing.assert_close(found, dense(model, given, mask[:, None, None], 2), rtol=1e-9, atol=1e-9)


def test_the_shift_turns_neighbours_up_against_all_others() -> None:
    model = module("std.attend(q, k, v; far_dim = 3, near = 2)")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(0.0 if "shift" not in name else 2.0)
    q, k, v = qkv(12)
    ones = torch.ones_like(q)
    near = torch.zeros(12, 12, dtype=torch.bool)
    block = torch.arange(12) // 2
    near = (block[:, None] - block).abs() <= 1
    marked = (torch.arange(12) < 4).double()[None, None, :, None].expand_as(v)  # what is near to token 0
    with torch.no_grad():
        share = model(ones, torch.zeros_like(k), marked)[0, 0, 0]
    local = float(near[0].sum()) * torch.exp(torch.tensor(2.0 * 6 / 6**0.5, dtype=torch.float64))
    torch.testing.assert_close(share, local / (local + 8))
