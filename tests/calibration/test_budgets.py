"""The promise: on held-out batches the measured error of a planned model is within its budget, whatever the spec."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.documents.calibration import Calibration
from fastgrad_dsl.documents.plan import is_approximated
from fastgrad_dsl.documents.read import parse_document
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.models.batches import model_inputs, random_batch, target_inputs
from fastgrad_dsl.models.measure import whole_errors
from tests.calibration.random_specs import random_spec
from tests.grids import wide

SEEDS, GATED = range(24), range(24, 29)  # the latter with forget gates
FEW = (1, 6, 24)


def _batches(compiled: Compiled, length: int, seeds: Sequence[int]) -> list[tuple[Tensor, ...]]:
    tensors = [*model_inputs(compiled.program), *target_inputs(compiled.program)]
    return [random_batch(tensors, {"b": 2, "n": length}, seed) for seed in seeds]


def _measured(compiled: Compiled, batch: Sequence[Tensor]) -> tuple[float, float]:
    model = compiled.module(seed=0, dtype=torch.float64)
    served = [e for e in compiled.plan_document.attentions if e.decision == "polynomial"]
    count = len(compiled.plan_document["inputs"])
    given = [x.double() if x.is_floating_point() else x for x in batch]
    return whole_errors(
        model, given[:count], given[count:], compiled.loss, [is_approximated(entry) for entry in served]
    )


@cache
def _planned(seed: int, trust: str) -> Compiled:
    """The random spec of a seed, calibrated on two batches and verified on a third."""
    spec = random_spec(seed, trust, forget=seed in GATED)
    compiled = fg.compile(spec.text, target="torch")
    batches = _batches(compiled, spec.length, (1, 2, 3))
    return compiled.calibrate(compiled.module(seed=0), batches, measured_pace=False)


@pytest.mark.medium
@pytest.mark.parametrize("trust", ["certified", "calibrated"])
@pytest.mark.parametrize("seed", wide((*SEEDS, *GATED), few=FEW))
def test_measured_errors_stay_within_the_budget(seed: int, trust: str) -> None:
    """Measured on two batches that neither calibration nor verification has seen."""
    spec, planned = random_spec(seed, trust, forget=seed in GATED), _planned(seed, trust)
    for batch in _batches(planned, spec.length, (101, 102)):
        output, gradient = _measured(planned, batch)
        assert output <= spec.output
        assert gradient <= spec.gradient
    assert planned.calibration is not None
    parse_document(to_json(planned.calibration).encode(), Calibration, "calibration.json")
    for entry in planned.plan_document["attentions"]:
        if trust == "certified":
            assert entry["range_source"] in (None, "program", "weights")


@pytest.mark.medium
@pytest.mark.parametrize("seeds", wide((FEW, SEEDS, GATED), few=[FEW]), ids=str)
def test_the_random_specs_are_worth_the_trouble(seeds: Sequence[int]) -> None:
    """Most of them are served by polynomials: a plan that leaves all exact keeps any budget."""
    served = {
        trust: sum(
            any(is_approximated(entry) for entry in _planned(seed, trust).plan_document.attentions)
            for seed in seeds
        )
        for trust in ("certified", "calibrated")
    }
    assert served["calibrated"] >= len(seeds) // 2
    assert served["certified"] >= len(seeds) // 4
    gated = [_planned(seed, "calibrated").plan_document.attentions for seed in seeds if seed in GATED]
    assert all("forget" in entry.roles for entries in gated for entry in entries)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("n", "dtype"),
    wide(
        product((1, 7), (torch.float32, torch.float64, torch.bfloat16)),
        few=[(1, torch.bfloat16), (7, torch.float32)],
    ),
)
def test_any_dtype_and_length(dtype: torch.dtype, n: int) -> None:
    """Models of other dtypes are calibrated in float32 or float64; one token is a sequence."""
    spec = random_spec(1, "calibrated").text
    compiled = fg.compile(spec, target="torch")
    model = compiled.module(seed=0, dtype=dtype)
    batches = [
        [x.to(dtype) if x.is_floating_point() else x for x in b] for b in _batches(compiled, n, (1, 2, 3))
    ]
    planned = compiled.calibrate(model, batches, measured_pace=False)
    adopted = planned.adopt(model)
    count = len(compiled.plan_document["inputs"])
    out = adopted(*batches[0][:count])
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert adopted.state_dict().keys() == model.state_dict().keys()


@pytest.mark.medium
def test_a_near_field_without_far_pairs_says_nothing() -> None:
    """A sequence within the model's near field has no pair that a polynomial would serve."""
    spec = """use std
dim b
dim n <= 65536
model m(x: float[b, n, 16]) -> float[b, n, 16] {
    return x + std.attention(std.rms_norm(x); heads = 2, qk_dim = 4, gain = 1.0, near = 16, causal = true)
}
budget {
    output <= 0.1
}
"""
    compiled = fg.compile(spec, target="torch")
    short = compiled.calibrate(None, _batches(compiled, 20, (1, 2)), measured_pace=False)
    assert [entry.node["decision"] for entry in short.plan] == ["exact"]
    assert "calibrate on longer, typical sequences" in str(short.plan[0].node["why"])
    longer = compiled.calibrate(None, _batches(compiled, 64, (1, 2)), measured_pace=False)
    assert longer.plan[0].node.op == "poly_attention"
