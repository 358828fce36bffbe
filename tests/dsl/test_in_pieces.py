"""A sequence in pieces that run one after the other gives what the whole gives, in the memory of a piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_compiler.runtime import native_sums, piece_attention
from fastgrad_compiler.runtime.in_turn import Given, loss_in_pieces
from fastgrad_compiler.runtime.native import enabled
from tests.dsl.test_distributed import ATTENDING, NEAR, PIECES, TOKENS, source

N = 13


def mean(out: Tensor, upstream: Tensor) -> Tensor:
    return (out * upstream).mean()


def gradients(
    model: torch.nn.Module, given: dict[str, Tensor], loss: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """The loss, and its gradients of weights and float inputs."""
    model.zero_grad()
    for x in given.values():
        x.grad = None
    value = loss()
    value.backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    found |= {key: x.grad for key, x in given.items() if x.grad is not None}
    return {"loss": value.detach(), **found}


def both(
    body: str, tokens: int, dtype: torch.dtype = torch.float64, target: str = "torch"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the whole and pieces of so many tokens give."""
    compiled = fg.compile(source(body), target=target, validate=False)
    generator = torch.Generator().manual_seed(len(body))
    given = {
        "x": torch.randn(2, N, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        "ids": torch.randint(0, 4, (2, N), generator=generator).sort(1).values % 3,
        "keys": torch.rand(2, N, generator=generator) > 0.3,
        "memory": torch.randn(2, 5, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
    }
    upstream = torch.randn(2, N, 4, generator=generator, dtype=torch.float64).to(dtype)
    model = compiled.module(seed=0, dtype=dtype)
    inputs: list[Given] = [(x, 1 if name in TOKENS else None) for name, x in given.items()]
    whole = gradients(model, given, lambda: mean(model(**given), upstream))
    pieces = gradients(model, given, lambda: loss_in_pieces(model, mean, inputs, [(upstream, 1)], tokens))
    return whole, pieces


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", PIECES)
def test_pieces_are_the_whole(name: str) -> None:
    for tokens in (5, 12):
        whole, pieces = both(PIECES[name], tokens)
        assert whole.keys() == pieces.keys()
        for key, expected in whole.items():
            scale = max(expected.abs().max().item(), 1e-3)
            assert (pieces[key] - expected).abs().max().item() < 1e-11 * scale, (tokens, key)


@pytest.mark.parametrize(
    ("name", "dtype", "off"),
    [
        ("all", torch.float64, 1e-11),
        ("grouped heads", torch.float64, 1e-11),
        ("near gates", torch.float32, 1e-4),
    ],
)
def test_sums_by_native_kernels(
    name: str, dtype: torch.dtype, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of earlier keys, what queries read from them, and the gradients of both."""
    calls: list[str] = []
    for which in ("sum_up", "read"):
        function = getattr(native_sums, which)

        def counted(*given: object, which: str = which, function: Any = function) -> Tensor:
            calls.append(which)
            found: Tensor = function(*given)
            return found

        monkeypatch.setattr(piece_attention, f"native_{which}", counted)
    whole, pieces = both(PIECES[name], 5, dtype, "cpp")
    if enabled():
        assert set(calls) == {"sum_up", "read"}
    for key, expected in whole.items():
        scale = max(expected.abs().max().item(), 1e-3)
        assert (pieces[key] - expected).abs().max().item() < off * scale, key


def test_without_gradients() -> None:
    compiled = fg.compile(source(ATTENDING.format(f"causal({NEAR})")), target="torch")
    model = compiled.module(seed=0, dtype=torch.float64)
    x, upstream = torch.randn(2, 2, N, 4, dtype=torch.float64)
    others = (
        torch.zeros(2, N, dtype=torch.int64),
        torch.ones(2, N, dtype=torch.bool),
        torch.zeros(2, 5, 4).double(),
    )
    with torch.no_grad():
        expected = mean(model(x, *others), upstream)
        given: list[Given] = [(x, 1), (others[0], 1), (others[1], 1), (others[2], None)]
        found = loss_in_pieces(model, mean, given, [(upstream, 1)], 4)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_dropout_is_drawn_once() -> None:
    """Each piece draws its own numbers, and the same ones when it is run again."""
    text = "dim b\ndim n\nmodel m(x: float[b, n, 4]) -> float[b, n, 4] {\n"
    text += "    weight w: float[4, 4] = normal(std = 1.0)\n"
    model = fg.compile(text + "    y = shift(x @ w; by = 1)\n    return dropout(y; p = 0.5)\n}\n").module(
        seed=0
    )
    model.double().train()
    x = torch.ones(1, 64, 4, dtype=torch.float64)
    loss_in_pieces(model, lambda out: out.mean(), [(x, 1)], [], 8).backward()
    (gradient,) = (p.grad for p in model.parameters())
    values = []
    for sign in (1e-3, -1e-3):
        torch.manual_seed(1)
        with torch.no_grad():
            next(model.parameters())[0, 0] += sign
            values.append(loss_in_pieces(model, lambda out: out.mean(), [(x, 1)], [], 8).item())
            next(model.parameters())[0, 0] -= sign
    torch.manual_seed(1)
    model.zero_grad()
    loss_in_pieces(model, lambda out: out.mean(), [(x, 1)], [], 8).backward()
    assert gradient is not None
    again = next(model.parameters()).grad
    assert again is not None
    assert again[0, 0].item() == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-6)


def test_refused() -> None:
    compiled = fg.compile(source(PIECES["near"]), target="torch")
    model = compiled.module(seed=0)
    x = torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match="pieces of 0 tokens"):
        loss_in_pieces(model, mean, [(x, 1)], [], 0)
    with pytest.raises(ValueError, match="tokens of one length"):
        loss_in_pieces(model, mean, [(x, 1)], [(torch.zeros(1, 5, 4), 1)], 2)
    both_ways = (
        "dim b\ndim n\nmodel m(x: float[b, n, 4]) -> float[b, n, 4] {\n    return softmax(x @ x.T) @ x\n}\n"
    )
    whole = fg.compile(both_ways, target="torch").module(seed=0)
    with pytest.raises(TypeError, match="no step form"):
        loss_in_pieces(whole, lambda out: out.mean(), [(x, 1)], [], 2)
