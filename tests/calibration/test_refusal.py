"""Budgets that their rules keep from being met are refused, and each remedy, applied, does work."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch

import fastgrad_dsl as fg
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.documents.read import parse_document
from fastgrad_dsl.models.batches import model_inputs, random_batch
from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from tests.dsl.schemas import KINDS
from tests.grids import wide

SPEC = """use std
dim b
dim n <= 16384
model m(x: float[b, n, 16]) -> float[b, n, 16] {{
    repeat i in 2 {{
        x = x + std.attention(std.rms_norm(x); heads = 2, qk_dim = 4, gain = 2.0) as layers
    }}
    return x
}}
budget {{
    {budget}
}}
"""
TIGHT = 'output <= 1e-3\n    gradient <= 5e-3\n    at "layers.*" degree = 2'


def _planned(budget: str) -> Compiled:
    compiled = fg.compile(SPEC.format(budget=budget), target="torch")
    batches = [random_batch(model_inputs(compiled.program), {"b": 1, "n": 48}, seed) for seed in (1, 2, 3)]
    return compiled.calibrate(compiled.module(seed=0), batches, measured_pace=False)


@cache
def _refused(budget: str) -> Diagnostic:
    with pytest.raises(TfgError) as caught:
        _planned(budget)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


def _with_limits(budget: str, text: str) -> str:
    """The budget with the limits that a remedy proposes."""
    for name, limit in re.findall(r"(output|gradient) <= ([0-9.e-]+)", text):
        budget = re.sub(rf"{name} <= \S+", f"{name} <= {limit}", budget)
    return budget


@pytest.mark.medium
@pytest.mark.parametrize("trust", wide(("calibrated", "certified"), few=["calibrated"]))
def test_every_remedy_works(trust: str) -> None:
    budget = f"{TIGHT}\n    trust = {trust}"
    diagnostic = _refused(budget)
    assert diagnostic.code == "FG312"
    assert diagnostic.span is not None
    assert "degree = 2" in diagnostic.span.text
    higher, without, exact, larger = diagnostic.help
    degree = re.search(r"degree = (\d+)", higher)
    assert degree is not None
    applied = [
        budget.replace("degree = 2", degree[0]),
        budget.replace('at "layers.*" degree = 2', ""),
        "\n    ".join([budget, *re.findall(r'at "[^"]+" exact', exact)]),
        _with_limits(budget, larger),
    ]
    assert "without the rule" in without
    for each in applied:
        planned = _planned(each)
        assert planned.calibration is not None
        assert planned.calibration["verification"]["output"] <= 1.0
    kept = _planned(applied[0]).plan[0].node
    assert kept["degree"] == int(degree[1])


@pytest.mark.medium
def test_a_lower_degree_than_the_remedy_is_refused() -> None:
    """The remedy names the least degree that works."""
    tight = f"{TIGHT}\n    trust = calibrated"
    degree = re.search(r"degree = (\d+)", _refused(tight).help[0])
    assert degree is not None
    lower = int(degree[1]) - 1
    assert lower > 2
    assert _refused(tight.replace("degree = 2", f"degree = {lower}")).code == "FG312"


def test_without_rules_what_cannot_be_afforded_stays_exact() -> None:
    planned = _planned("output <= 1e-14\n    gradient <= 1e-14")
    assert [entry.node["decision"] for entry in planned.plan] == ["exact", "exact"]


def test_without_limits_nothing_is_approximated() -> None:
    planned = _planned("near = 8")
    assert [entry.node["decision"] for entry in planned.plan] == ["exact", "exact"]


def test_logits_of_zero_are_said() -> None:
    compiled = fg.compile(SPEC.format(budget="output <= 0.1"), target="torch")
    (decision, _) = compiled.calibrate(
        compiled.module(), [(torch.zeros(1, 48, 16),)] * 2, measured_pace=False
    ).plan
    assert "its logits on the data are 0" in str(decision.node["why"])


def test_a_relative_cap_holds() -> None:
    planned = _planned('output <= 0.5\n    gradient <= 0.5\n    at "layers.0" relative <= 1e-3')
    caps = [entry.node.get("eps") for entry in planned.plan]
    assert float(str(caps[0])) <= 1e-3 < float(str(caps[1]))


@pytest.mark.medium
def test_the_ranges_of_untrained_and_trained_weights_differ() -> None:
    """Without a gain R is measured, and grows with the weights that it is measured at."""
    text = SPEC.format(budget="output <= 0.05\n    gradient <= 0.2").replace(", gain = 2.0", "")
    compiled = fg.compile(text, target="torch")
    model = compiled.module(seed=0)
    batches = [random_batch(model_inputs(compiled.program), {"b": 1, "n": 48}, seed) for seed in (1, 2, 3)]
    before = compiled.calibrate(model, batches, measured_pace=False).calibration
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wq", "wk")):
                parameter.mul_(1.3)
    after = compiled.calibrate(model, batches, measured_pace=False).calibration
    assert before is not None
    assert after is not None
    first = before["attentions"][0]["heads"][0]["largest"]
    assert after["attentions"][0]["heads"][0]["largest"] == pytest.approx(1.69 * first, rel=1e-4)


@pytest.mark.medium
def test_calibrated_plans_are_deterministic() -> None:
    first, second = (
        _planned("output <= 0.02\n    gradient <= 0.1"),
        _planned("output <= 0.02\n    gradient <= 0.1"),
    )
    assert first.files == second.files
    for kind in ("plan.json", "calibration.json", "report.json"):
        parse_document(first.files[kind].encode(), KINDS[kind], kind)
    assert replace(first, calibration=None).files.keys() == first.files.keys() - {"calibration.json"}
