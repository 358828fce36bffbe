"""The promise: on held-out batches the measured error of a planned model is within its budget, whatever the spec."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_dsl.batches import model_inputs, random_batch, target_inputs
from fastgrad_dsl.compiled import Compiled
from fastgrad_dsl.measure import whole_errors
from fastgrad_dsl.plan_document import is_approximated
from tests.calibration.random_specs import random_spec

SEEDS = range(24)
BROKEN: dict[int, str] = {}


def _batches(compiled: Compiled, length: int, seeds: Sequence[int]) -> list[tuple[Tensor, ...]]:
    tensors = [*model_inputs(compiled.program), *target_inputs(compiled.program)]
    return [random_batch(tensors, {"b": 2, "n": length}, seed) for seed in seeds]


def _measured(compiled: Compiled, batch: Sequence[Tensor]) -> tuple[float, float]:
    model = compiled.module(seed=0, dtype=torch.float64)
    served = [e for e in compiled.plan_document["attentions"] if e["decision"] == "polynomial"]
    count = len(compiled.plan_document["inputs"])
    given = [x.double() if x.is_floating_point() else x for x in batch]
    return whole_errors(
        model, given[:count], given[count:], compiled.loss, [is_approximated(entry) for entry in served]
    )


@pytest.mark.parametrize("trust", ["certified", "calibrated"])
@pytest.mark.parametrize("seed", SEEDS)
def test_measured_errors_stay_within_the_budget(seed: int, trust: str) -> None:
    """Calibrated on two batches, verified on a third, and measured here on two that nothing has seen."""
    spec = random_spec(seed, trust)
    compiled = fg.compile(spec.text, target="torch")
    planned = compiled.calibrate(
        compiled.module(seed=0), _batches(compiled, spec.length, (1, 2, 3)), measured_pace=False
    )
    for batch in _batches(compiled, spec.length, (101, 102)):
        output, gradient = _measured(planned, batch)
        assert output <= spec.output
        assert gradient <= spec.gradient
    for entry in planned.plan_document["attentions"]:
        if trust == "certified":
            assert entry["range_source"] in (None, "program", "weights")


def test_the_random_specs_are_worth_the_trouble() -> None:
    """Most of them are served by polynomials: a plan that leaves all exact keeps any budget."""
    served = {"certified": 0, "calibrated": 0}
    for trust in served:
        for seed in SEEDS:
            spec = random_spec(seed, trust)
            compiled = fg.compile(spec.text, target="torch")
            planned = compiled.calibrate(None, _batches(compiled, spec.length, (1, 2)), measured_pace=False)
            served[trust] += any(is_approximated(entry) for entry in planned.plan_document["attentions"])
    assert served["calibrated"] >= len(SEEDS) // 2
    assert served["certified"] >= len(SEEDS) // 4
