"""Which blocks the compiler finds to have heads or a hidden width that can be in parts."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastgrad_dsl as fg
from fastgrad_compiler.analysis.widths import Parts, divisible_blocks

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TEMPLATE = """use std
dim b
dim n
block one(x: float[b, n, d]) -> float[b, n, d] {{
    weight up: float[d, 6] = xavier()
    weight down: float[6, d] = xavier()
    weight bias: float[6] = zeros()
    weight last: float[d] = zeros()
    {body}
}}
model m(x: float[b, n, 8]) -> float[b, n, 8] {{
    return one(x) as one
}}
"""


def blocks(body: str) -> dict[str, Parts]:
    return divisible_blocks(fg.compile(TEMPLATE.format(body=body), target="torch", validate=False).program)


DIVISIBLE = {
    "return silu(x @ up) @ down": {"up": 1, "down": 0},
    "return gelu(x @ up + bias) @ down + last": {"up": 1, "bias": 0, "down": 0},
    "return (2.0 * tanh(x @ up) * (x @ up2)) @ down": {"up": 1, "up2": 1, "down": 0},
    "x = x - mean(x; axis = -1, keepdim = true)\n    return relu(std.layer_norm(x) @ up) @ down": {
        "up": 1,
        "down": 0,
    },
    "h = split_heads(x @ up, 3)\n    return merge_heads(softmax(h @ h.T) @ h) @ down": {"up": 1, "down": 0},
}
WHOLE = {
    "sums over the width": "h = x @ up\n    return softmax(h) @ down",
    "leaves the block": "h = x @ up\n    return std.rms_norm(h) @ down",
    "weights used twice": "return silu(x @ up) @ down @ up @ down",
    "a mean": "h = x @ up\n    return (h - mean(h; axis = -1, keepdim = true)) @ down",
    "no rows": "return x + last",
    "what DTensors do not have, after": "return dropout(silu(x @ up) @ down; p = 0.1)",
    "what DTensors do not have, before": "return silu((x + sinusoid(n, d)) @ up) @ down",
    "tokens of other ranks": "return silu(shift(x) @ up) @ down",
}


@pytest.mark.parametrize("body", DIVISIBLE)
def test_blocks_that_are_divided(body: str) -> None:
    if "up2" in body:
        body = f"weight up2: float[d, 6] = xavier()\n    {body}"
    (parts,) = blocks(body).values()
    assert parts.dims == DIVISIBLE[body.removeprefix("weight up2: float[d, 6] = xavier()\n    ")]
    assert parts.units == (3 if "split_heads" in body else 6)


@pytest.mark.parametrize("why", WHOLE)
def test_blocks_that_stay_whole(why: str) -> None:
    assert blocks(WHOLE[why]) == {}


@pytest.mark.parametrize(
    ("name", "path", "units"),
    [
        ("gpt", "layers.5.mixer.attention", 8),
        ("gpt", "layers.0.swiglu", 1024),
        ("bert", "layers.0.attention", 32),
        ("llama", "layers.0.attention", 4),
        ("spelled_out", "layers.0", 4),
    ],
)
def test_blocks_of_examples(name: str, path: str, units: int) -> None:
    program = fg.compile(EXAMPLES / f"{name}.tfg", target="torch", validate=False).program
    assert divisible_blocks(program)[path].units == units
