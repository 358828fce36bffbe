"""How much of a row one key can get under a limit of the logits, and the warning where that is next to nothing."""

from __future__ import annotations

import pytest
import torch

from fastgrad_compiler.attention.table import Lengths, attention_table
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.pipeline import run
from fastgrad_compiler.planning.selectivity import averages, far_keys, largest_share, least_bound
from fastgrad_compiler.reference.attention_torch import near_mask
from fastgrad_grammar.source import Source

MODEL = """use std
dim b
dim n{longest}
model m(x: float[b, n, 32]) -> float[b, n, 32] {{
    return std.{attention}(x; heads = 2, causal = true{options})
}}
"""


@pytest.mark.parametrize(("bound", "keys"), [(0.0, 7), (1.0, 2048), (3.0, 64), (2.0, 1)])
def test_no_logits_give_a_key_more(bound: float, keys: int) -> None:
    """By gradient ascent from random logits in [-R, R]."""
    raw = torch.randn(keys, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimiser = torch.optim.Adam([raw], lr=1.0)
    for _ in range(200):
        share = (bound * raw.tanh()).softmax(0)[0]
        optimiser.zero_grad()
        (-share.log()).backward()
        optimiser.step()
    assert largest_share(bound, keys) * (1 - 1e-3) <= share.item() <= largest_share(bound, keys) * (1 + 1e-12)


def test_the_bound_for_a_share() -> None:
    for share in (0.1, 0.5, 0.9):
        assert largest_share(least_bound(share, 2048), 2048) == pytest.approx(share)
    assert least_bound(0.5, 1) == least_bound(0.01, 3) == 0.0


def test_no_far_key_gets_more_whatever_near_ones_are() -> None:
    """Weights of near keys are anything, and those of a polynomial are off by up to eps."""
    for causal, near, eps in ((True, 4, 0.0), (False, 3, 0.2), (True, None, 0.5)):
        n, bound = 24, 1.2
        count = far_keys(n, near, causal=causal)
        most = torch.zeros(())
        for near_size in (0.0, 1e3):
            logits = torch.full((n, n), -bound)
            logits[:, 0] = bound
            weights = logits.exp() * (1 + eps * logits.sign())
            is_near = near_mask(torch.arange(n), n, near) if near else torch.zeros(n, n).bool()
            weights = torch.where(is_near, near_size, weights)
            share = (weights / weights.sum(-1, keepdim=True)).masked_fill(is_near, 0.0)
            most = torch.maximum(most, share[-1 if causal else slice(None)].max())
        assert most.item() == pytest.approx(largest_share(bound, count, eps), rel=1e-6)
    assert (far_keys(24, 4, causal=True), far_keys(24, 8, causal=False), far_keys(7, None, causal=True)) == (
        16,
        0,
        7,
    )
    assert largest_share(0.0, 5, eps=1.0) == 1.0


@pytest.mark.parametrize(
    ("options", "longest", "attention", "expected"),
    [
        (
            ", gain = 1.0",
            " <= 2048",
            "attention",
            "no key gets more than 0.36 % of a query's weight among 2,048",
        ),
        (", gain = 1.0, near = 16", " <= 2048", "attention", "no key beyond its blocks of 16 gets"),
        (", gain = 4.0", " <= 2048", "attention", None),
        (", gain = 1.0", "", "attention", None),
        ("", " <= 2048", "attention", None),
        (", gain = 1.0, window = 8", " <= 2048", "attention", None),
        (", gain = 1.0, forget = true", " <= 2048", "attention", None),
        (", gain = 1.0, near = 1024", " <= 2048", "attention", None),
        (", qk_dim = 4", " <= 2048", "kernel_attention", None),
    ],
)
def test_where_an_attention_averages(
    options: str, longest: str, attention: str, expected: str | None
) -> None:
    text = MODEL.format(options=options, longest=longest, attention=attention)
    program = run(elaborate(Source("m.tfg", text)), until="attention")[-1].program
    (entry,) = attention_table(program)
    found = averages(entry, Lengths(program))
    assert found is None if expected is None else expected in str(found)
