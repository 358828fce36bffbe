"""docs/theory.md is what its JSON says, and the running bound in it is a bound."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from benchmarks import running_bound, theory_page
from benchmarks.running_bound import Shape
from benchmarks.settings import ROOT
from benchmarks.theory import GAIN, HEADS, Grid, points
from fastgrad_compiler.approximation.polynomial import fit

WIDTH, TOKENS = 8, 9


def test_the_page_and_the_plot_are_what_the_json_says() -> None:
    document = json.loads((ROOT / theory_page.JSON).read_text(encoding="utf-8"))
    for name, text in theory_page.render(document).items():
        assert (ROOT / name).read_text(encoding="utf-8") == text


def test_the_json_holds_every_point_of_the_grid() -> None:
    document = json.loads((ROOT / theory_page.JSON).read_text(encoding="utf-8"))
    found = [(row["degree"], row["depth"], row["n"]) for row in document["points"]]
    assert found == points(Grid())


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "attention.wq": (WIDTH, 8), "attention.wk": (WIDTH, 8),
        "attention.wv": (WIDTH, 12), "attention.wo": (12, WIDTH),
        "swiglu.gate": (WIDTH, 10), "swiglu.up": (WIDTH, 10), "swiglu.down": (10, WIDTH),
    }  # fmt: skip
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def softmax_or_polynomial(
    y: Tensor, own: dict[str, Tensor], coefficients: tuple[float, ...] | None
) -> Tensor:
    """The attention of the layer, written out."""
    q, k, v = ((y @ own[f"attention.w{name}"]).unflatten(-1, (HEADS, -1)).transpose(0, 1) for name in "qkv")
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    s = GAIN * q @ k.mT
    a = (
        s.exp()
        if coefficients is None
        else sum((c * s**power for power, c in enumerate(coefficients)), torch.zeros(()))
    )
    a = a.tril()
    return (a / a.sum(-1, keepdim=True) @ v).transpose(0, 1).flatten(1) @ own["attention.wo"]


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_no_perturbed_row_leaves_its_ball(size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    own = weights(seed)
    polynomial = fit("balanced", 2, GAIN)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    error = size * torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    gain = torch.rand(WIDTH, generator=generator, dtype=torch.float64)
    y, of_norm = running_bound._normalised(x, error, gain)
    change, of_attention = running_bound._attention(x, error, own, Shape(HEADS, GAIN), polynomial.eps)
    gated, of_swiglu = running_bound._swiglu(x, error, own)
    torch.testing.assert_close(change, softmax_or_polynomial(x, own, None))
    for _ in range(20):
        direction = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
        moved = x + error[:, None] * torch.nn.functional.normalize(direction, dim=-1)
        normalised, _ = running_bound._normalised(moved, error, gain)
        assert bool(((normalised - y).norm(dim=-1) <= of_norm).all())
        attended = softmax_or_polynomial(moved, own, polynomial.coefficients)
        assert bool(((attended - change).norm(dim=-1) <= of_attention).all())
        assert bool(((running_bound._swiglu(moved, error, own)[0] - gated).norm(dim=-1) <= of_swiglu).all())
