"""Stretches of rotary positions: the formulas of their papers, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

import fastgrad_dsl as fg
from fastgrad_compiler.frontend.stretches import llama3, yarn


def test_llama3_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    width, base, factor, context = 64, 500_000.0, 8.0, 8192
    found = llama3(width, base, factor, context, 1.0, 4.0)
    for pair, stretch in enumerate(found):
        speed = base ** (-2 * pair / width)
        length = 2 * math.pi / speed  # of a turn, in tokens
        if length < context / 4.0:
            assert stretch == 1.0
        elif length > context / 1.0:
            assert stretch == factor
        else:
            smooth = (context / length - 1.0) / (4.0 - 1.0)
            wanted = (1 - smooth) * speed / factor + smooth * speed
            assert speed / stretch == pytest.approx(wanted, rel=1e-12)
    assert found[0] == 1.0
    assert found[-1] == factor
    assert any(1.0 < stretch < factor for stretch in found)


@pytest.mark.parametrize("whole", [True, False])
def test_yarn_interpolates_between_two_pairs(whole: bool) -> None:
    width, base, factor, context = 64, 10_000.0, 4.0, 4096
    found = yarn(width, base, factor, context, 32.0, 1.0, whole)
    turns = [context * base ** (-2 * pair / width) / (2 * math.pi) for pair in range(width // 2)]
    assert all(stretch == 1.0 for stretch, many in zip(found, turns, strict=True) if many > 40)
    assert all(
        stretch == pytest.approx(factor) for stretch, many in zip(found, turns, strict=True) if many < 0.7
    )
    ramp = (1 / np.array(found) - 1) / (1 / factor - 1)
    steps = np.diff(ramp)[(ramp[:-1] > 0) & (ramp[1:] < 1)]
    assert steps.std() < 1e-12
    inside = len(steps)
    assert inside > 5


SPEC = """
dim b
dim n
model m(x: float[b, n, 8]) -> float[b, n, 8] {{
    return rotary(x; base = 100.0, stretch = {})
}}
"""


def test_a_stretch_divides_the_angles() -> None:
    import torch

    x = torch.randn(2, 9, 8, dtype=torch.float64)
    by_hand = fg.compile(SPEC.format("(1.0, 2.0, 3.0, 0.5)")).module(dtype=torch.float64)(x)
    angles = np.arange(9)[:, None] * 100.0 ** (-np.arange(4) / 4) / [1.0, 2.0, 3.0, 0.5]
    turned = (x[..., :4].numpy() + 1j * x[..., 4:].numpy()) * np.exp(1j * angles)
    assert np.allclose(by_hand.numpy(), np.concatenate((turned.real, turned.imag), -1), atol=1e-12)
    one = fg.compile(SPEC.format("(2.0,)")).module(dtype=torch.float64)(x)
    four = fg.compile(SPEC.format("(2.0, 2.0, 2.0, 2.0)")).module(dtype=torch.float64)(x)
    assert torch.equal(one, four)
    none = fg.compile(SPEC.format("none")).module(dtype=torch.float64)(x)
    assert torch.equal(none, fg.compile(SPEC.format("(1.0,)")).module(dtype=torch.float64)(x))


@pytest.mark.parametrize(
    ("stretch", "code"),
    [
        ("(1.0, 2.0)", "FG218"),
        ("(0.0,)", "FG218"),
        ("(1.0, -2.0, 1.0, 1.0)", "FG218"),
        ("2.0", "FG217"),
        ("rope_llama3(8, 100.0, 2.0, 64, low = 4.0)", "FG218"),
        ("rope_llama3(7, 100.0, 2.0, 64)", "FG208"),
        ("rope_llama3(6, 100.0, 2.0, 64)", "FG218"),
        ("rope_yarn(8, 1.0, 2.0, 64)", "FG218"),
        ("rope_yarn(8, 100.0, 2.0, 64, fast = 1.0, slow = 2.0)", "FG218"),
        ("rope_llama3(1024, exp(-740.0), 2.0, 64)", "FG219"),
    ],
)
def test_a_stretch_that_does_not_fit_is_refused(stretch: str, code: str) -> None:
    with pytest.raises(fg.TfgError, match=code):
        fg.compile(SPEC.format(stretch))
