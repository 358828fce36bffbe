"""Every example is compiled, run and trained for a few steps, through its kernels and exactly."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import fastgrad_dsl as fg
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.models.batches import model_inputs, random_batch, target_inputs
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


@pytest.mark.medium
@pytest.mark.parametrize("name", NAMES)
def test_trains_through_its_kernels(name: str) -> None:
    model = always_polynomial(compiled(name), compiled(name).module(seed=1))
    inputs, _ = batch(name)
    with torch.no_grad():
        error = (model(*inputs) - compiled(name).reference(model)(*inputs)).norm()
    assert (error == 0) == (name in OWN), "a kernel ran, and another than the reference's"
    losses = train(model, name)
    assert all(later < sooner for sooner, later in pairwise(losses)), losses


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_trains_exactly_with_the_same_weights(name: str) -> None:
    model = compiled(name).module(seed=1)
    before = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    losses = train(compiled(name).reference(model), name)
    assert all(later < sooner for sooner, later in pairwise(losses)), losses
    for path, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[path]), f"{path} is not shared"


OWN = ("based", "gpt")  # their polynomials are the models' own
GPT = ("poly_attention", "n", "n", 16, 2, 64, True)  # operation, queries, keys, width, degree, near, causal
EXPECTED: dict[str, dict[str, tuple[object, ...]]] = {
    "bounded": {"layers.*": GPT},
    "gpt": {"layers.*": GPT},
    "llama": {
        "layers.0.*": ("attention", "n", "n", 8, None, 128, True),
        "layers.[1-7].*": ("poly_attention", "n", "n", 8, 4, 128, True),
    },
    "bert": {"layers.*": ("poly_attention", "n", "n", 8, 4, None, False)},
    "vit": {"layers.*": ("poly_attention", "4096", "4096", 8, 4, None, False)},
    "encoder_decoder": {
        "encoder.*": ("poly_attention", "m", "m", 8, 4, None, False),
        "decoder.?.attention.*": ("poly_attention", "n", "n", 8, 4, 64, True),
        "decoder.?.cross_attention.*": ("poly_attention", "n", "m", 8, 4, None, False),
    },
    "spelled_out": {"layers.?": ("poly_attention", "n", "n", 8, 4, None, True)},
    "based": {
        "far.?": ("poly_attention", "n", "n", 16, 2, None, True),
        "near.?.*": ("attention", "n", "n", 32, None, None, True),
    },
}


@pytest.mark.medium
@pytest.mark.parametrize("name", NAMES)
def test_at_its_own_size_each_attention_is_what_the_file_says(name: str) -> None:
    plan = fg.compile(EXAMPLES / f"{name}.tfg").plan
    used = set()
    for entry in plan:
        (pattern,) = (p for p in EXPECTED[name] if fnmatchcase(entry.path, p))
        used.add(pattern)
        node = entry.node
        found = (node.op, str(entry.queries), str(entry.keys), entry.d)
        assert (*found, node.get("degree"), node["near"], node["causal"]) == EXPECTED[name][pattern], (
            entry.path
        )
        assert node["bound"] == {"spelled_out": 1.5, "based": None, "gpt": None}.get(name, 1.0)
        assert not node.get("asserted", False)
        own_near = {"near_q", "near_k"} <= set(node["roles"])  # type: ignore[arg-type]
        assert own_near == (node["near"] is not None), "near logits are free, or have positions of their own"
    assert used == set(EXPECTED[name])
    uses_library = "use std" in (EXAMPLES / f"{name}.tfg").read_text(encoding="utf-8")
    assert uses_library == (name != "spelled_out")
