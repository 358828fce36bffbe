"""What a plan for training may do to gradients (docs/training.md, "The budget")."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastgrad_dsl as fg
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.calibration.pace import default_pace
from fastgrad_dsl.commands.terminal import progress
from fastgrad_dsl.models.text_data import load_text
from fastgrad_dsl.training.loop import Options
from fastgrad_dsl.training.plan import SCORES, TextPlanner
from fastgrad_dsl.training.stopping import Stop

SPEC = """use std
dim b
dim n <= 65536
model tiny(tokens: int[b, n]) -> float[b, n, 256] {
    weight table: float[256, 16] = normal(std = 0.5)
    x = embedding(table, tokens)
    x = x + std.attention(
        std.rms_norm(x); heads = 2, qk_dim = 4, causal = true, gain = 1.0, near = 16, rope = 10000.0
    ) as mixer
    return std.rms_norm(x) @ table.T
}
objective loss(logits: float[b, n, 256], targets: int[b, n]) = cross_entropy(logits, targets)
budget {
    output <= 0.1
    gradient <= 0.25
}
"""


def _planned(folder: Path, spec: str, scores: float | None = SCORES) -> Compiled:
    text = folder / "text.txt"
    text.write_bytes(bytes(place * place % 251 for place in range(4096)))
    compiled = fg.compile(spec, target="torch", validate=False)
    planner = TextPlanner(load_text(text, 128), Options(tokens=128), Stop(), progress, default_pace("torch"))
    planner.scores = scores
    return planner(compiled, compiled.module(seed=0))


def _degree(planned: Compiled) -> object:
    (entry,) = planned.plan
    return entry.node.get("degree")


def test_a_plan_for_training_is_tighter_than_the_budget_where_near_pairs_hide_an_error(
    tmp_path: Path,
) -> None:
    """The budget alone allows degree 1, whose gradients of queries and keys are off by a quarter."""
    assert _degree(_planned(tmp_path, SPEC, None)) == 1
    assert _degree(_planned(tmp_path, SPEC)) == 2


def test_a_plan_for_training_keeps_what_a_rule_pins(tmp_path: Path) -> None:
    spec = SPEC.replace("gradient <= 0.25", 'gradient <= 0.25\n    at "*" degree = 1')
    assert _degree(_planned(tmp_path, spec)) == 1


def test_a_plan_for_training_is_exact_where_no_polynomial_is_good_enough(tmp_path: Path) -> None:
    planned = _planned(tmp_path, SPEC, 0.0)
    assert _degree(planned) is None
    assert planned.calibration is not None
    (attention,) = planned.calibration.attentions
    reason = "no polynomial that can be afforded has gradients of queries and keys within 0"
    assert attention.obstacle == reason


@pytest.mark.parametrize("family", ["taylor", "minimax"])
def test_a_plan_for_training_is_not_refused_for_a_rule(tmp_path: Path, family: str) -> None:
    """A rule that asks for a polynomial leaves no exact attention."""
    spec = SPEC.replace("gradient <= 0.25", f'gradient <= 0.25\n    at "*" family = "{family}"')
    assert _degree(_planned(tmp_path, spec, 0.0)) in (1, 2)
