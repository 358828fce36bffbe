"""plan.json and report.json: what stands there of each attention, and that it is what the compiler computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgrad_dsl as fg
from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.approximation.rounding import Run, Sizes, rounding
from fastgrad_compiler.planning.cost import EQUAL, NATIVE, Cost, Shape, Way, break_even, flops
from fastgrad_compiler.planning.target_cost import GPU
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.api import report as request
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.api.report import ReportRequest, make_report
from fastgrad_dsl.documents.base import Document
from fastgrad_dsl.models import measure_plan
from fastgrad_dsl.models.batches import model_inputs, target_inputs
from tests.dsl.models import EXAMPLES, NAMES, small

SPEC = """dim b
dim n <= 4096

block attend(x: float[b, n, 8]; gain: float) -> float[b, n, 8] {
    weight w: float[8, 8] = xavier()
    q = unit(split_heads(x @ w, 2))
    s = causal(gain * (q @ q.T))
    return merge_heads(softmax(s) @ split_heads(x, 2))
}

model two(x: float[b, n, 8]) -> float[b, n, 8] {
    x = x + attend(x; gain = 0.5) as first
    return x + attend(x; gain = 0.5) as second
}

objective loss(y: float[b, n, 8], target: float[b, n, 8]) = mse(y, target)

budget {
    output <= 0.1
    at "first" relative <= 1e-3
    at "second" exact
}
"""
N = 1500  # tokens: beyond break-even, so that the report measures a polynomial


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return fg.compile(SPEC)


def entries(document: Document) -> list[dict[str, Any]]:
    found = document["attentions"]
    assert isinstance(found, list)
    return found


def test_a_polynomial_attention(compiled: Compiled) -> None:
    entry = entries(compiled.plan_document)[0]
    polynomial = fit("balanced", 3, 0.5)
    assert polynomial.eps <= 1e-3 < fit("balanced", 2, 0.5).eps
    assert entry["path"] == "first"
    assert entry["source"] == "<text>:8:24"
    assert entry["decision"] == "polynomial"
    assert entry["why"].startswith("degree 3 is the least that meets relative <= 0.001")
    assert (entry["family"], entry["degree"], entry["rank"]) == ("balanced", 3, rank(4, 3))
    assert entry["coefficients"] == list(polynomial.coefficients)
    assert (entry["eps"], entry["eps_prime"]) == (polynomial.eps, polynomial.eps_prime)
    assert (entry["bound"], entry["asserted"], entry["near"], entry["causal"]) == (0.5, False, None, True)
    assert any("Cauchy-Schwarz" in step for step in entry["proof"])
    assert 100 < entry["break_even"] < N
    for way, degree in (("exact", None), ("polynomial", 3)):
        cost = flops(Shape(n=4096, m=4096, d=4, dv=4), Way(degree))
        assert entry["flops"][way] == {"forward": cost.forward, "backward": cost.backward}
    assert entry["flops"]["n"] == entry["flops"]["m"] == 4096
    spec = KernelSpec(4, 4, polynomial.coefficients, causal=True)
    added = rounding(spec, Sizes(4096, 4096), 0.5, 0.5, BACKENDS["auto"], Run())
    worst = certificate(polynomial.eps, polynomial.eps_prime, added)
    exact = [worst.output, worst.value_gradient, worst.score_gradient]
    rounded = [worst.output_rounding, worst.value_rounding, worst.score_rounding]
    assert list(entry["certificate"].values()) == [*exact, *rounded]
    assert 0 < worst.output_rounding < worst.output
    assert (entry["precision"], entry["reach"]) == ("float32", 0.5)
    found = entry["rounding"]
    assert (found["n"], found["m"], found["declared"]) == (4096, 4096, True)
    assert (found["weights"], found["slopes"]) == (added.weights, added.slopes)
    assert [(run["device"], run["dtype"]) for run in found["runs"]] == [
        (device, dtype) for device in ("cpu", "gpu") for dtype in ("float32", "bfloat16", "float16")
    ]
    assert found["runs"][0]["output"] == worst.output_rounding < found["runs"][1]["output"]


def test_an_exact_attention(compiled: Compiled) -> None:
    entry = entries(compiled.plan_document)[1]
    assert (entry["path"], entry["decision"], entry["why"]) == (
        "second",
        "exact",
        "the budget leaves it exact",
    )
    assert entry["bound"] == 0.5  # it could have been served
    assert "polynomial" not in entry["flops"]
    numbers = (
        "family",
        "degree",
        "coefficients",
        "rank",
        "eps",
        "eps_prime",
        "break_even",
        "break_even_gpu",
        "certificate",
    )
    for key in (*numbers, "precision", "rounding"):
        assert entry[key] is None, key


def test_the_report_holds_the_plan_and_three_kinds_of_error(compiled: Compiled) -> None:
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(1, N, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    report = compiled.report(compiled.module(dtype=torch.float64), [x, target])
    plan = entries(compiled.plan_document)
    for found, planned in zip(entries(report), plan, strict=True):
        errors = found["errors"]
        assert {key: found[key] for key in planned} == planned
        for what in ("output", "gradient"):
            values = errors[what]
            if planned["decision"] == "exact":
                assert values == {"bound": 0.0, "estimate": 0.0, "measured": 0.0}
            else:
                assert 0 < values["measured"] <= values["bound"]
                assert 0 < values["estimate"] < 0.1
    whole = report["whole"]
    assert 0 < whole["output"]["measured"] < 0.1
    assert 0 < whole["gradient"]["measured"] < 0.1
    assert whole["loss"] != whole["exact_loss"]
    assert whole["loss"] == pytest.approx(whole["exact_loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("target", "of_cpu", "of_gpu"),
    [("torch", EQUAL, EQUAL), ("cpp", NATIVE, EQUAL), ("triton", GPU, GPU), ("auto", NATIVE, GPU)],
)
def test_break_even_is_that_of_the_device(target: str, of_cpu: Cost, of_gpu: Cost) -> None:
    """A model may run on either: the generated call has both lengths where they differ."""
    compiled = fg.compile(SPEC, target=target)
    entry = entries(compiled.plan_document)[0]
    lengths = [break_even(cost, Shape(n=1, m=1, d=4, dv=4), Way(3)) for cost in (of_cpu, of_gpu)]
    assert [entry["break_even"], entry["break_even_gpu"]] == lengths
    on_gpu = f", exact_below_gpu={lengths[1]}" if lengths[0] != lengths[1] else ""
    assert f"exact_below={lengths[0]}{on_gpu})" in compiled.modules["model.py"]


PACKED = """use std
dim b
dim n <= 4096
model packed(tokens: int[b, n], ids: int[b, n]) -> float[b, n, 8] {
    weight table: float[11, 8] = normal()
    x = embedding(table, tokens)
    return merge_heads(softmax(documents(split_heads(x, 2) @ split_heads(x, 2).T, ids)) @ split_heads(x, 2))
}
"""


@pytest.mark.parametrize("name", [*NAMES, "packed"])
def test_inputs_and_targets_are_what_the_program_takes(name: str) -> None:
    compiled = fg.compile(PACKED) if name == "packed" else small(name)
    plan = compiled.plan_document
    assert tuple(map(request.input_of, plan.inputs)) == model_inputs(compiled.program)
    assert tuple(map(request.input_of, plan.targets)) == target_inputs(compiled.program)


def test_a_report_of_a_packed_model_draws_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs of some hundred tokens, and no ids of 0 and 1 at random, of which runs are two tokens long."""
    met: list[torch.Tensor] = []

    def spy(plan: object, model: object, inputs: list[torch.Tensor], *_: object) -> None:
        met.append(inputs[1])

    monkeypatch.setattr(measure_plan, "measure_plan", spy)
    monkeypatch.setattr(request, "build_report", lambda *_, **__: {})
    spec = tmp_path / "packed.tfg"
    spec.write_text(PACKED)
    fg.compile(spec).write(tmp_path / "folder")
    for where in (spec, tmp_path / "folder"):
        asked = ReportRequest(where, {}, None, None, None, {"b": 4, "n": 1024}, 0, measure=True)
        make_report(asked, lambda what: None)
    for ids in met:
        assert bool((ids.diff() >= 0).all())
        assert 1 <= int((ids.diff() != 0).sum()) <= 4 * 16
    assert torch.equal(*met)


@pytest.mark.parametrize("name", ["plan.json", "report.json"])
def test_files_are_strict_json(name: str) -> None:
    text = fg.compile(EXAMPLES / "spelled_out.tfg", params={"depth": 1}).files[name]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(text, parse_constant=refuse)
    assert [entry["path"] for entry in document["attentions"]] == ["layers.0"]


def test_the_source_of_a_library_attention_is_the_line_that_calls_it() -> None:
    compiled = fg.compile(EXAMPLES / "bounded.tfg", params={"depth": 1})
    (entry,) = compiled.plan_document["attentions"]
    assert "examples/bounded.tfg:17:" in entry["source"]
