"""Sampling against its definition, in numpy and one token at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgrad_dsl.generation.sampling import Sampler, Sampling, probabilities
from fastgrad_grammar.diagnostics import TfgError


def defined(logits: np.ndarray, seen: set[int], sampling: Sampling) -> np.ndarray:
    """The distribution of one row, from the definition of each setting."""
    logits = logits.astype(np.float64)
    for token in seen:
        value, penalty = logits[token], sampling.repetition_penalty
        logits[token] = value / penalty if value > 0 else value * penalty
    count = len(logits)
    if sampling.temperature == 0:
        return np.eye(count)[min(range(count), key=lambda token: (-logits[token], token))]
    with np.errstate(over="ignore"):
        logits = (logits - logits.max()) / sampling.temperature
    kept = set(range(count))
    if sampling.top_k is not None:
        kth = sorted(logits, reverse=True)[min(sampling.top_k, count) - 1]
        kept = {token for token in kept if logits[token] >= kth}
    found = normalised(logits, kept)
    if sampling.top_p < 1:
        likely = sorted(kept, key=lambda token: (-found[token], token))
        sizes = range(1, len(likely) + 1)
        size = next((n for n in sizes if sum(found[likely[:n]]) >= sampling.top_p), len(likely))
        kept = set(likely[:size])
    kept = {token for token in kept if found[token] >= sampling.min_p * found.max()}
    return normalised(logits, kept)


def normalised(logits: np.ndarray, kept: set[int]) -> np.ndarray:
    weights = np.array([math.exp(value) if token in kept else 0.0 for token, value in enumerate(logits)])
    return weights / weights.sum()


def rows(kind: str) -> Tensor:
    """Logits [3, 9]."""
    drawn = torch.randn(3, 9, generator=torch.Generator().manual_seed(5)) * 3
    if kind == "equal":
        return torch.full((3, 9), -2.0)
    if kind == "ties":
        return drawn.round()
    if kind == "hidden":
        return drawn.masked_fill(drawn < 0, -math.inf)
    if kind == "large":
        return drawn * 1e37
    return drawn


SETTINGS = [
    Sampling(*values)
    for values in itertools.product(
        (0, 1e-300, 0.7, 5.0), (None, 1, 3, 9, 100), (0.0, 0.35, 1.0), (0.0, 0.2, 1.0), (0.5, 1.0, 1.7)
    )
]  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["random", "equal", "ties", "hidden", "large"])
def test_probabilities_are_those_of_the_definition(kind: str) -> None:
    logits = rows(kind)
    seen = torch.arange(9) % 3 == torch.arange(3)[:, None]
    for sampling in SETTINGS:
        found = probabilities(logits, seen, sampling).numpy()
        for row in range(3):
            wanted = defined(logits[row].numpy(), set(seen[row].nonzero().flatten().tolist()), sampling)
            np.testing.assert_allclose(found[row], wanted, rtol=1e-9, atol=1e-15, err_msg=str(sampling))


def test_settings_that_change_nothing_are_those_of_the_model() -> None:
    logits, seen = rows("random"), torch.ones(3, 9, dtype=torch.bool)
    plain = probabilities(logits, seen, Sampling())
    torch.testing.assert_close(plain, logits.double().softmax(-1))
    for same in (Sampling(top_k=9), Sampling(top_k=10**9), Sampling(top_p=1.0), Sampling(min_p=0.0)):
        assert torch.equal(probabilities(logits, seen, same), plain)


def test_a_low_temperature_shares_between_the_most_likely_and_zero_takes_the_first() -> None:
    logits, seen = torch.tensor([[0.0, 2.0, 1.0, 2.0]]), torch.zeros(1, 4, dtype=torch.bool)
    cold = probabilities(logits, seen, Sampling(temperature=1e-6))
    assert cold.tolist() == [[0, 0.5, 0, 0.5]]
    assert probabilities(logits, seen, Sampling(temperature=0)).tolist() == [[0, 1, 0, 0]]


def test_the_penalty_is_for_tokens_that_were_seen() -> None:
    """As in transformers: a positive logit is divided, a negative one multiplied."""
    logits, seen = torch.tensor([[4.0, -1.0, 4.0, -1.0]]), torch.tensor([[True, True, False, False]])
    found = probabilities(logits, seen, Sampling(repetition_penalty=2.0))
    torch.testing.assert_close(found, torch.tensor([[2.0, -2.0, 4.0, -1.0]]).double().softmax(-1))


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e300])
def test_extreme_penalties_keep_the_numbers_finite(penalty: float) -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0, -math.inf]], dtype=torch.float64)
    for seen in (torch.ones(1, 4, dtype=torch.bool), torch.tensor([[True, False, True, True]])):
        found = probabilities(logits, seen, Sampling(repetition_penalty=penalty))
        assert found.isfinite().all()
        assert found[0, 3] == 0


@pytest.mark.parametrize("wrong", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_are_not_finite_are_a_diagnostic(wrong: list[float]) -> None:
    for sampling in (Sampling(), Sampling(temperature=0)):
        with pytest.raises(TfgError, match=r"\[FG427\] the model gives logits of the next token"):
            probabilities(torch.tensor([[1.0, 2.0], wrong]), torch.zeros(2, 2, dtype=torch.bool), sampling)


def draws(sampling: Sampling, logits: Tensor, count: int) -> Tensor:
    """`count` draws of each row, [count, rows]."""
    sampler, seen = Sampler(sampling, len(logits)), torch.zeros(logits.shape, dtype=torch.bool)
    return torch.stack([sampler.draw(logits, seen) for _ in range(count)])


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0, -math.inf]])
    found = draws(Sampling(seed=1), logits, 4000).flatten().bincount(minlength=5) / 4000
    wanted = logits[0].softmax(-1)
    spread = (wanted * (1 - wanted) / 4000).sqrt()
    assert (found[[2, 4]] == 0).all()
    assert ((found - wanted).abs() <= 4 * spread).all()


def test_row_i_draws_as_the_seed_plus_i_alone() -> None:
    logits = rows("random")[:1]
    together = draws(Sampling(seed=40), logits.repeat(3, 1), 20)
    for row in range(3):
        assert torch.equal(together[:, row], draws(Sampling(seed=40 + row), logits, 20)[:, 0])
    assert not torch.equal(together[:, 0], together[:, 1])
    last = Sampling(seed=(1 << 63) - 1)
    assert torch.equal(draws(last, logits.repeat(2, 1), 20)[:, 1], draws(Sampling(seed=0), logits, 20)[:, 0])


def test_half_precision_logits_are_drawn_from() -> None:
    found = draws(Sampling(temperature=0), rows("random").bfloat16(), 1)
    assert torch.equal(found[0], rows("random").bfloat16().float().argmax(-1))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-1.0, math.nan, math.inf)),
        ("top_k", (0, -3)),
        ("top_p", (-0.1, 1.1, math.nan)),
        ("min_p", (-0.1, 1.1, math.nan)),
        ("repetition_penalty", (0.0, -1.0, math.inf, math.nan)),
        ("seed", (-1, 1 << 63)),
    ],
)
def test_settings_out_of_range(name: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} {value}: expected "):
            Sampling(**{name: value})  # type: ignore[arg-type]
