"""Rotary and sinusoidal positions far from the beginning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.runtime.functions import rotary, sinusoid
from fastgrad_compiler.runtime.positions import turned, turns

PLACES = (0, 1000, 65_536, 1_000_000, 10_000_000)


def angles(place: int, width: int, base: float) -> Tensor:
    return place * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", PLACES)
def test_rotary_is_as_precise_at_every_place(place: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (first, second), turn = x.chunk(2, -1), angles(place, 16, 10000.0)
    expected = torch.cat(
        (first * turn.cos() - second * turn.sin(), first * turn.sin() + second * turn.cos()), -1
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-8  # 10^7 radians are known to 2e-9 in float64
    for past in (place, torch.tensor(place)):
        found = turned(x.to(dtype), *turns(x.to(dtype), 10000.0, past))
        assert (found.double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("place", PLACES)
def test_sinusoids_are_as_precise_at_every_place(place: int) -> None:
    found = sinusoid(2, 16, torch.zeros((), dtype=torch.float32), past=place)[0].double()
    turn = angles(place, 16, 10000.0)
    assert (found[0::2] - turn.sin()).abs().max() < 1e-6
    assert (found[1::2] - turn.cos()).abs().max() < 1e-6


def test_a_long_text_has_them_too() -> None:
    x = torch.ones(70_000, 2)
    last = rotary(x, 100.0)[-1].double()
    turn = torch.tensor(69_999.0, dtype=torch.float64)
    assert abs(float(last[0] - (turn.cos() - turn.sin()))) < 1e-6
