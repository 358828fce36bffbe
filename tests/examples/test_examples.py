"""Every example is compiled, run and trained for a few steps, through its kernels and exactly."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import fastgrad_dsl as fg
from fastgrad_dsl.batches import model_inputs, random_batch, target_inputs
from fastgrad_dsl.compiled import Compiled
from tests.dsl.models import EXAMPLES, NAMES, SIZES, always_polynomial

# 144 patches: enough for a polynomial to be cheaper
PARAMS = {**SIZES, "vit": {**SIZES["vit"], "height": 24, "width": 24, "patch": 2}}
LENGTHS = {"b": 2, "m": 9, "n": 13}  # in blocks of near = 2 tokens: most pairs are far
STEPS = 4


@cache
def compiled(name: str) -> Compiled:
    return fg.compile(EXAMPLES / f"{name}.tfg", params=PARAMS[name])


def batch(name: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and targets; the masks among them hide the end of a row."""
    program = compiled(name).program
    inputs, targets = model_inputs(program), target_inputs(program)
    return random_batch(inputs, LENGTHS, seed=2), random_batch(targets, LENGTHS, seed=3)


def train(model: nn.Module, name: str) -> list[float]:
    """Losses on one batch before each step."""
    inputs, targets = batch(name)
    loss = compiled(name).loss
    assert loss is not None
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        value = loss(model(*inputs), *targets)
        value.backward()
        for path, parameter in model.named_parameters():
            assert parameter.grad is not None, path
            assert parameter.grad.isfinite().all(), path
            assert parameter.grad.any(), path
        optimiser.step()
        losses.append(value.item())
    return losses


def test_all_examples_are_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.tfg")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_trains_through_its_kernels(name: str) -> None:
    model = always_polynomial(compiled(name), compiled(name).module(seed=1))
    inputs, _ = batch(name)
    with torch.no_grad():
        error = (model(*inputs) - compiled(name).reference(model)(*inputs)).norm()
    assert error > 0, "a kernel ran"
    losses = train(model, name)
    assert all(later < sooner for sooner, later in pairwise(losses)), losses


@pytest.mark.parametrize("name", NAMES)
def test_trains_exactly_with_the_same_weights(name: str) -> None:
    model = compiled(name).module(seed=1)
    before = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    losses = train(compiled(name).reference(model), name)
    assert all(later < sooner for sooner, later in pairwise(losses)), losses
    for path, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[path]), f"{path} is not shared"
