"""Exact models from examples/ and the library equal PyTorch's own and plain ones, weight for weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastgrad_compiler.elaborate import elaborate
from fastgrad_compiler.graph import Program
from fastgrad_compiler.interpret import initial_weights, run
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source
from tests.examples.plain import bert, encoder, gpt

EXAMPLES = Path(__file__).parents[2] / "examples"
Forward = Callable[[Program, Mapping[str, Tensor], list[Tensor]], Tensor]


def interpreted(program: Program, weights: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """The program by the interpreter."""
    result = run(program, inputs, weights)
    assert isinstance(result, Tensor)
    return result


@pytest.fixture(params=[interpreted])
def forward(request: pytest.FixtureRequest) -> Forward:
    """The ways to run a program exactly."""
    way: Forward = request.param
    return way


def moved(program: Program, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights with nothing left at 0 or 1, so that a bias or a norm that is ignored shows."""
    generator = torch.Generator().manual_seed(1)
    return {
        path: w + 0.1 * torch.randn(w.shape, generator=generator).to(dtype)
        for path, w in initial_weights(program, 0, dtype).items()
    }


PRECISION = [
    pytest.param(torch.float32, 1e-5, id="float32"),
    pytest.param(torch.float64, 1e-12, id="float64"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_bert_is_a_transformer_encoder(forward: Forward, dtype: torch.dtype, tolerance: float) -> None:
    sizes = {"depth": 2, "d_model": 32, "heads": 4, "context": 16, "vocab": 13, "gain": None}
    program = elaborate(read_source(EXAMPLES / "bert.tfg"), params=sizes)
    weights, tokens = (
        moved(program, dtype),
        torch.randint(13, (3, 11), generator=torch.Generator().manual_seed(2)),
    )
    mask = torch.arange(11) < torch.tensor([11, 4, 1])[:, None]
    expected = bert(weights, tokens, mask, 2, 4)
    found = forward(program, weights, [tokens, mask])
    torch.testing.assert_close(found[mask], expected[mask], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("n", [1, 3, 21])
def test_gpt_is_a_plain_gpt(forward: Forward, dtype: torch.dtype, tolerance: float, n: int) -> None:
    sizes = {"depth": 2, "d_model": 32, "heads": 4, "near": 4, "vocab": 13}
    program = elaborate(read_source(EXAMPLES / "gpt.tfg"), params=sizes)
    weights, tokens = (
        moved(program, dtype),
        torch.randint(13, (2, n), generator=torch.Generator().manual_seed(2)),
    )
    expected = gpt(weights, tokens, depth=2, heads=4, near=4)
    torch.testing.assert_close(forward(program, weights, [tokens]), expected, rtol=tolerance, atol=tolerance)


GPT_2 = """
use std
dim b
dim n <= 16
model gpt2(tokens: int[b, n]) -> float[b, n, 13] {
    return std.gpt(tokens; vocab = 13, context = 16, width = 32, depth = 2, heads = 4)
}
"""


def test_the_librarys_gpt_is_a_causal_pre_norm_encoder(forward: Forward) -> None:
    program = elaborate(Source("<text>", GPT_2))
    weights, tokens = moved(program, torch.float64), torch.arange(9)[None]
    given = {path.removeprefix("gpt."): w for path, w in weights.items()}
    x = given["table"][tokens] + given["places"][:9]
    mask = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)
    x = encoder(given, 2, 4, norm_first=True)(x, mask=mask)
    expected = functional.layer_norm(x, (32,), given["norm.w"], given["norm.b"]) @ given["table"].T
    torch.testing.assert_close(forward(program, weights, [tokens]), expected, rtol=1e-12, atol=1e-12)
