"""Whole models through the whole compiler: every stage computes what it should, and so do the derived gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrad_compiler import pipeline
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.flatten import flatten
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.reference.interpret import run, run_gradient
from fastgrad_grammar.read import read_source
from tests.initial_weights import initial_weights

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES: dict[str, dict[str, object]] = {
    "bounded": {"depth": 2, "d_model": 16, "heads": 2, "near": 2, "vocab": 11},
    "gpt": {"depth": 2, "d_model": 16, "heads": 2, "near": 2, "vocab": 11},
    "llama": {"depth": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "near": 2, "hidden": 24, "vocab": 11},
    "bert": {"depth": 2, "d_model": 16, "heads": 4, "vocab": 11},
    "vit": {"depth": 2, "d_model": 16, "heads": 4, "height": 12, "width": 16},
    "encoder_decoder": {"depth": 2, "d_model": 16, "heads": 4, "near": 2, "vocab": 11},
    "spelled_out": {"depth": 2, "d_model": 16, "heads": 2, "vocab": 11},
    "based": {"depth": 2, "d_model": 16, "heads": 2, "qk_dim": 4, "window": 3, "vocab": 11},
}


def tokens(n: int) -> Tensor:
    return torch.randint(11, (2, n), generator=torch.Generator().manual_seed(n))


PADDING = torch.arange(9) < torch.tensor([9, 4])[:, None]
INPUTS: dict[str, list[Tensor]] = {
    **{name: [tokens(13)] for name in ("bounded", "gpt", "llama", "spelled_out", "based")},
    "bert": [tokens(9), PADDING],
    "vit": [torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)],
    "encoder_decoder": [tokens(9), PADDING, tokens(13)],
}


def interpreted(program: Program, name: str, weights: dict[str, Tensor]) -> Tensor:
    result = run(program, INPUTS[name], weights)
    assert isinstance(result, Tensor)
    return result


def small(name: str) -> tuple[dict[str, Program], dict[str, Tensor]]:
    """The stages of an example at a small size, and weights."""
    program = elaborate(read_source(EXAMPLES / f"{name}.tfg"), params=SIZES[name])
    stages = {stage.name: stage.program for stage in pipeline.run(program)}
    return stages, initial_weights(program, 0, torch.float64)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SIZES)
def test_every_stage_computes_the_model(name: str) -> None:
    stages, weights = small(name)
    exact = interpreted(stages["elaborate"], name, weights)
    for stage in ("shapes", "bounds", "attention", "plan", "backward"):
        torch.testing.assert_close(interpreted(stages[stage], name, weights), exact, rtol=1e-11, atol=1e-12)
    budget = stages["elaborate"].budget
    approximated = interpreted(stages["lowrank"], name, weights)
    if name in ("based", "gpt"):  # nothing is approximated
        assert budget is None
        torch.testing.assert_close(approximated, exact, rtol=1e-11, atol=1e-12)
        return
    assert budget is not None
    assert budget.output is not None
    assert relative(approximated, exact) <= budget.output
    polynomial = any(node.op == "poly_attention" for node in flatten(stages["lowrank"]).nodes)
    assert polynomial == (relative(approximated, exact) > 1e-12)
    assert polynomial == (name != "vit")  # 12 patches: exact attention is cheaper


@pytest.mark.parametrize("name", SIZES)
def test_flat_programs_compute_the_same(name: str) -> None:
    stages, weights = small(name)
    flat = stages["lowrank"].with_graphs([flatten(stages["lowrank"])])
    torch.testing.assert_close(
        interpreted(flat, name, weights),
        interpreted(stages["lowrank"], name, weights),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.sampled(4)
@pytest.mark.parametrize("stage", ["backward", "lowrank"])
@pytest.mark.parametrize("name", SIZES)
def test_derived_gradients_are_those_of_autograd(name: str, stage: str) -> None:
    stages, weights = small(name)
    for w in weights.values():
        w.requires_grad_()
    result = interpreted(stages[stage], name, weights)
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = dict(zip(weights, torch.autograd.grad(result, list(weights.values()), cotangent), strict=True))
    with torch.no_grad():
        _, found = run_gradient(stages[stage], INPUTS[name], weights, [cotangent])
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        torch.testing.assert_close(found[path], gradient, rtol=1e-9, atol=1e-10, msg=path)
