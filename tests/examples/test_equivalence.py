"""Exact models from examples/ and the library equal PyTorch's own and plain ones, weight for weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastgrad_dsl as fg
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.reference.interpret import run
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source
from tests.examples.plain import bert, encoder, gpt
from tests.initial_weights import initial_weights

EXAMPLES = Path(__file__).parents[2] / "examples"
Spec = tuple[str | Path, tuple[tuple[str, object], ...]]  # a file or a text, and its params
Forward = Callable[[Spec, Mapping[str, Tensor], list[Tensor]], Tensor]


def elaborated(spec: Spec) -> Program:
    """The program of a spec."""
    given, params = spec
    source = read_source(given) if isinstance(given, Path) else Source("<text>", given)
    return elaborate(source, params=dict(params))


def interpreted(spec: Spec, weights: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """The model by the interpreter."""
    result = run(elaborated(spec), inputs, weights)
    assert isinstance(result, Tensor)
    return result


@cache
def compiled(spec: Spec) -> Compiled:
    """The spec, compiled once."""
    given, params = spec
    return fg.compile(given, params=dict(params))


def with_weights(spec: Spec, weights: Mapping[str, Tensor]) -> nn.Module:
    """The generated module with these weights."""
    model = compiled(spec).module(dtype=next(iter(weights.values())).dtype)
    model.load_state_dict(dict(weights))
    return model


def module(spec: Spec, weights: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """The generated module, which is exact at lengths this far below break-even."""
    result: Tensor = with_weights(spec, weights)(*inputs)
    return result


def reference(spec: Spec, weights: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """The generated exact module."""
    result: Tensor = compiled(spec).reference(with_weights(spec, weights))(*inputs)
    return result


@pytest.fixture(params=[interpreted, module, reference], ids=lambda way: way.__name__)
def forward(request: pytest.FixtureRequest) -> Forward:
    """The ways to run a model exactly."""
    way: Forward = request.param
    return way


def moved(spec: Spec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights with nothing left at 0 or 1, so that a bias or a norm that is ignored shows."""
    generator = torch.Generator().manual_seed(1)
    return {
        path: w + 0.1 * torch.randn(w.shape, generator=generator).to(dtype)
        for path, w in initial_weights(elaborated(spec), 0, dtype).items()
    }


PRECISION = [
    pytest.param(torch.float32, 1e-5, id="float32"),
    pytest.param(torch.float64, 1e-12, id="float64"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_bert_is_a_transformer_encoder(forward: Forward, dtype: torch.dtype, tolerance: float) -> None:
    sizes = {"depth": 2, "d_model": 32, "heads": 4, "context": 16, "vocab": 13, "gain": None}
    spec: Spec = (EXAMPLES / "bert.tfg", tuple(sizes.items()))
    weights, tokens = (
        moved(spec, dtype),
        torch.randint(13, (3, 11), generator=torch.Generator().manual_seed(2)),
    )
    mask = torch.arange(11) < torch.tensor([11, 4, 1])[:, None]
    expected = bert(weights, tokens, mask, 2, 4)
    found = forward(spec, weights, [tokens, mask])
    torch.testing.assert_close(found[mask], expected[mask], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("n", [1, 3, 21])
def test_gpt_is_a_plain_gpt(forward: Forward, dtype: torch.dtype, tolerance: float, n: int) -> None:
    sizes = {"depth": 2, "d_model": 32, "heads": 4, "near": 4, "vocab": 13}
    spec: Spec = (EXAMPLES / "bounded.tfg", tuple(sizes.items()))
    weights, tokens = (
        moved(spec, dtype),
        torch.randint(13, (2, n), generator=torch.Generator().manual_seed(2)),
    )
    expected = gpt(weights, tokens, depth=2, heads=4, near=4)
    torch.testing.assert_close(forward(spec, weights, [tokens]), expected, rtol=tolerance, atol=tolerance)


GPT_2 = """
use std
dim b
dim n <= 16
model gpt2(tokens: int[b, n]) -> float[b, n, 13] {
    return std.gpt(tokens; vocab = 13, context = 16, width = 32, depth = 2, heads = 4)
}
"""


def test_the_librarys_gpt_is_a_causal_pre_norm_encoder(forward: Forward) -> None:
    spec: Spec = (GPT_2, ())
    weights, tokens = moved(spec, torch.float64), torch.arange(9)[None]
    given = {path.removeprefix("gpt."): w for path, w in weights.items()}
    x = given["table"][tokens] + given["places"][:9]
    mask = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)
    x = encoder(given, 2, 4, norm_first=True)(x, mask=mask)
    expected = functional.layer_norm(x, (32,), given["norm.w"], given["norm.b"]) @ given["table"].T
    torch.testing.assert_close(forward(spec, weights, [tokens]), expected, rtol=1e-12, atol=1e-12)
