"""report.json: valid by its schema, deterministic, and its numbers are those of the compiler and of a measurement."""

from __future__ import annotations

import json
import shutil
from functools import cache
from math import exp, log
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

import fastgrad_dsl as fg
from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.planning.cost import PACE, Shape, Way, flops
from fastgrad_compiler.planning.selectivity import largest_share
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.api.report import ReportRequest, make_report
from fastgrad_dsl.commands.report_table import report_table
from fastgrad_dsl.documents.report import Report
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.report.document import build_report
from fastgrad_dsl.report.entries import head_numbers
from fastgrad_dsl.report.page import render_html
from fastgrad_dsl.report.words import of_budget, percent, size
from tests.dsl.calibrations import calibration_of
from tests.dsl.models import EXAMPLES, INPUTS, NAMES, always_polynomial, small, text
from tests.dsl.schemas import validator

VALIDATOR = validator("report.json")
GPT = EXAMPLES / "bounded.tfg"
SIZES = {"depth": 2, "d_model": 16, "heads": 2, "near": 2, "vocab": 11}
ATTEND = """
    q = {unit}(split_heads(x, 2))
    return merge_heads(softmax(causal(assume_bound(q @ q.T; bound = {bound}))) @ split_heads(x, 2))
"""


@cache
def measured(name: str) -> Report:
    """A small example on its small inputs, with kernels that run at every length, and a calibration."""
    compiled = small(name)
    model = always_polynomial(compiled, compiled.module(dtype=torch.float64))
    return compiled.report(model, INPUTS[name], calibration=calibration_of(compiled.plan_document))


@cache
def asserted(bound: float, budget: str, unit: str = "") -> Compiled:
    more = f"budget {{\n{budget}\n}}\n"
    return fg.compile(text(ATTEND.format(unit=unit, bound=bound), more=more))


def kinds(report: Report) -> list[str]:
    return [warning["kind"] for warning in report["warnings"]]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_reports_are_valid(name: str) -> None:
    for report in (small(name).report(), measured(name)):
        VALIDATOR.validate(json.loads(to_json(report)))


def test_the_schema_refuses_what_is_missing_or_unknown() -> None:
    report = json.loads(to_json(small("bounded").report()))
    for broken in (
        {key: value for key, value in report.items() if key != "headline"},
        {**report, "more": 1},
        {**report, "format": "fastgrad-report-2"},
        {**report, "attentions": [{**report["attentions"][0], "decision": "maybe"}]},
    ):
        assert not VALIDATOR.is_valid(broken)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["bounded", "based"])
def test_files_of_a_compile_are_the_same_twice(name: str) -> None:
    first, second = (fg.compile(small(name).source.text, target="torch").files for _ in range(2))
    assert first == second
    assert json.loads(first["report.json"])["batch"] is None


def test_a_measured_report_is_the_same_twice() -> None:
    compiled = small("bounded")
    reports = [compiled.report(compiled.module(0), INPUTS["bounded"] * 2) for _ in range(2)]
    assert to_json(reports[0]) == to_json(reports[1])


def test_headline_of_what_was_measured() -> None:
    report = measured("bounded")
    for what in ("output", "gradient"):
        use = report["headline"][what]
        assert use["value"] == report["whole"][what]["measured"]
        assert use["share"] == use["value"] / report["budget"][what]
        assert (use["kind"], use["basis"]) == ("measured", "on one batch of 26 tokens")
        assert use["words"].startswith(percent(use["share"]))
    assert report["headline"]["verdict"]["state"] == "kept"
    assert "is kept, measured on one batch of 26 tokens: " in report["headline"]["verdict"]["text"]
    assert (report["batch"]["batches"], report["batch"]["tokens"]) == (1, 26)
    assert all(": kept on one batch of 26 tokens" in line for line in report["summary"][:2])


def test_headline_by_what_is_known() -> None:
    compiled = small("bounded")
    calibration = calibration_of(compiled.plan_document)
    planned = calibration["planned"]
    for given, kind, value in (
        (None, "estimate", None),
        (replace(calibration, verification=None), "estimate", planned["output"]),
        (calibration, "measured", calibration["verification"]["output"]),
    ):
        use = compiled.report(calibration=given)["headline"]["output"]
        assert use["kind"] == kind
        if value is not None:
            assert use["value"] == value
    terms = ("output_of_value_range", "output_rounding_of_largest_value")
    added = sum(sum(e["certificate"][t] for t in terms) for e in compiled.plan_document["attentions"])
    assert compiled.report()["headline"]["output"]["value"] == added
    same = compiled.report(
        calibration=replace(calibration, data="given batches, one batch: the plan is verified on the same")
    )
    said = same["headline"]["verdict"]["text"]
    assert "measured by the calibration, on 2 batches of 4,096 tokens in all that it planned on" in said
    said = compiled.report(calibration=calibration)["headline"]["verdict"]["text"]
    assert "measured by the calibration, on 2 batches of 4,096 tokens in all that it held out" in said
    assert calibration.verification is not None
    missed = replace(calibration, verification=replace(calibration.verification, gradient=9.0))
    report = compiled.report(calibration=missed)
    assert report["headline"]["verdict"]["state"] == "missed"
    again = "to meet the budget, calibrate again, on more data and with the weights that are used"
    assert report["warnings"][0] == {"kind": "budget", "text": again, "attentions": []}
    verdict = fg.compile(text("return softmax(x @ x.T) @ x")).report()["headline"]["verdict"]
    assert verdict == {"state": "exact", "text": "Nothing is approximated: every attention is exact."}
    said = "No approximation error at all: every attention runs as the file defines it."
    assert small("based").report()["headline"]["verdict"] == {"state": "exact", "text": said}
    assert f'<p class="verdict exact">{said}</p>' in render_html(small("based").report())


def test_prediction_at_the_longest_length() -> None:
    report = fg.compile(GPT, target="cpp").report()
    prediction = report["headline"]["prediction"]
    assert (prediction["n"], prediction["undeclared"], prediction["attentions"]) == (65536, [], 6)
    n, pace = 65536, PACE["cpp"]
    shape = Shape(n=n, m=n, d=16, dv=32)
    exact = flops(shape).total * (1 + pace.keys / n)
    polynomial = flops(shape, Way(2, 64)).total / pace.speed
    assert prediction["speed_up"]["total"] == pytest.approx(exact / polynomial)
    heads = 6 * 8
    assert prediction["memory"]["scores"] == 4 * heads * n * n
    assert prediction["memory"]["exact"] == 4 * heads * n * (2 * 2 * (16 + 32) + 1)
    assert prediction["memory"]["compiled"] == 4 * heads * (n * 2 * 2 * (16 + 32) + 2 * 153 * 33)


def test_a_measured_pace_of_the_calibration_is_used() -> None:
    compiled = small("bounded")
    calibration = calibration_of(compiled.plan_document)
    for scale in (1.0, 2.0):
        pace = replace(calibration.pace, speed=scale, keys=0)
        prediction = compiled.report(calibration=replace(calibration, pace=pace))["headline"]["prediction"]
        assert prediction["pace"] == {"target": "torch", "kind": "measured", "speed": scale, "keys": 0}
        if scale == 1.0:
            first = prediction["speed_up"]["total"]
    assert prediction["speed_up"]["total"] == pytest.approx(2 * first)


def test_an_undeclared_length_is_said() -> None:
    report = asserted(0.5, 'at "*" degree = 2').report()
    assert report["headline"]["prediction"]["undeclared"] == ["n"]
    assert report["headline"]["prediction"]["n"] == 65536
    assert any("no longest n" in note for note in report["notes"])


def test_errors_of_tensors_and_heads() -> None:
    for entry in measured("llama")["attentions"]:
        if entry["decision"] == "exact":
            assert entry["errors"]["dq"] == {"bound": 0.0, "estimate": 0.0, "measured": 0.0}
            assert entry["per_head"] is None
            continue
        errors = entry["errors"]
        for what in ("output", "dq", "dk", "dv"):
            assert 0 < errors[what]["measured"] <= errors[what]["bound"], what
        gradients = [errors[what]["measured"] for what in ("dq", "dk", "dv")]
        assert errors["gradient"]["measured"] == max(gradients)
        assert len(entry["per_head"]) == entry["query_heads"] == 4
        for head in entry["per_head"]:
            assert 0 < head["output"]["measured"] <= head["output"]["bound"]
            assert (
                0 < head["reach"] <= entry["bound"] * (1 + 1e-9)
            )  # unit rows: their norms are the whole range
            assert head["least"] < head["largest"]
            assert 0 <= head["outside"] < 0.01


def test_what_one_key_can_get() -> None:
    """At the longest lengths, beyond the near field; nothing is said where weights depend on more than the logits."""
    report = small("bounded").report()
    for entry in report.attentions:
        assert entry.largest_share == largest_share(1.0, 65536 - 2 * 2, entry.eps or 0.0)
        assert entry.spread is None
    unlimited = [*small("based").report().attentions, *asserted(0.5, "", "").report().attentions]
    assert [entry.largest_share is None for entry in unlimited] == [True] * 4 + [False]
    for option in ("forget = true", "window = 8"):
        spec = "use std\n" + text(f"return std.attention(x; heads = 2, causal = true, gain = 1.0, {option})")
        assert fg.compile(spec).report().attentions[0].largest_share is None


@pytest.mark.medium
def test_rows_spread_their_weight_as_measured() -> None:
    """Of what a polynomial serves, the model's own too; the table and the page show it."""
    for name in ("bounded", "gpt", "based"):
        report = measured(name)
        columns, rows, legend = report_table(report, wide=True)
        at = [column.heading for column in columns].index("keys\nseen")
        for entry, row in zip(report.attentions, rows, strict=True):
            if entry.decision == "exact":
                assert entry.spread is None
                assert row[at : at + 3] == ["-"] * 3
                continue
            assert entry.spread is not None
            assert entry.spread.planned is not None
            assert entry.spread.exact is not None
            assert entry.spread.visible == 7.0  # of 13 tokens, causal
            assert 0 < entry.spread.planned.nats < log(7)
            assert entry.spread.planned.keys <= 7.0
            assert entry.spread.planned.keys == pytest.approx(entry.spread.exact.keys, rel=0.02)
            assert row[at] == "7"
            assert row[at + 1] == f"{entry.spread.planned.keys:.3g}"
            assert row[at + 2] == f"{entry.spread.exact.keys:.3g}"
            assert f'<td data-label="keys used (measured)">{row[at + 1]}</td>' in render_html(report)
        assert any(line.startswith("keys used: ") for line in legend)
    assert "Weights of a row" not in render_html(fg.compile(text("return softmax(x @ x.T) @ x")).report())
    assert not any(
        line.startswith("keys used: ") for line in report_table(small("gpt").report(), wide=True)[2]
    )


def test_curves_are_the_polynomials() -> None:
    (curve,) = measured("bounded")["curves"]
    polynomial = fit("balanced", 2, 1.0)
    assert curve["attentions"] == [entry["path"] for entry in measured("bounded")["attentions"]]
    assert curve["s"][0] == -1.0
    assert curve["s"][-1] == 1.0
    for s, value in zip(curve["s"], curve["p"], strict=True):
        expected = sum(c * s**power for power, c in enumerate(polynomial.coefficients)) / exp(s) - 1
        assert value == pytest.approx(expected, abs=1e-6)
        assert abs(value) <= polynomial.eps * (1 + 1e-5)
    assert max(map(abs, curve["p"])) == pytest.approx(polynomial.eps, rel=1e-2)
    assert max(map(abs, curve["p_prime"])) == pytest.approx(polynomial.eps_prime, rel=1e-2)


def test_costs_cross_at_the_break_even() -> None:
    (cost,) = fg.compile(GPT, params={"near": 512}, target="torch").report()["costs"]
    even = cost["break_even"]
    assert 128 < even < cost["longest"]
    for n, exact, polynomial in zip(
        cost["lengths"], cost["exact"]["total"], cost["polynomial"]["total"], strict=True
    ):
        if n not in range(even - 1, even + 2):
            assert (polynomial < exact) == (n > even), n
    assert cost["exact"]["total"][cost["lengths"].index(cost["longest"])] == 1.0


def test_the_chosen_candidate_is_the_plan() -> None:
    for report in (small("llama").report(), measured("llama")):
        for entry in report["attentions"]:
            points = report["candidates"][entry["candidates"]]["points"]
            (chosen,) = [point for point in points if point["chosen"]]
            assert (chosen["family"], chosen["degree"]) == (entry["family"], entry["degree"])


def test_the_waterfall_adds_up() -> None:
    report = measured("bounded")
    for what in ("output", "gradient"):
        waterfall = report["waterfall"][what]
        ends = [0.0]
        for step, entry in zip(waterfall["steps"], report["attentions"], strict=True):
            assert step["value"] == entry["errors"][what]["estimate"]
            assert (step["start"], step["end"]) == (ends[-1], ends[-1] + step["value"])
            ends.append(step["end"])
        assert waterfall["total"] == ends[-1] == pytest.approx(report["whole"][what]["estimate"])
        assert waterfall["measured"] == report["whole"][what]["measured"]


def test_a_calibration_gives_estimates() -> None:
    compiled = small("bounded")
    calibration = calibration_of(compiled.plan_document)
    report = compiled.report(calibration=calibration)
    chosen = [next(c for c in a["candidates"] if c["chosen"]) for a in calibration["attentions"]]
    for what in ("output", "gradient"):
        parts = [candidate[what] for candidate in chosen]
        assert [entry["errors"][what]["estimate"] for entry in report["attentions"]] == parts
        assert [step["value"] for step in report["waterfall"][what]["steps"]] == parts
        assert report["whole"][what]["estimate"] == calibration["planned"][what]
    assert report["candidates"][0]["error_kind"] == "estimate"
    certified = compiled.report(calibration=replace(calibration, trust="certified"))
    assert certified["candidates"][0]["error_kind"] == "bound"
    by_machine = report["headline"]["prediction"]["calibrated"]
    assert (by_machine["n"], by_machine["speed_up"]) == (2048, 10.0)


def test_heads_that_are_served_apart_keep_their_numbers() -> None:
    """A plan may serve groups of an attention's heads by attentions of their own."""
    compiled = small("bounded")
    plan = compiled.plan_document
    calibration = calibration_of(plan)
    first, _ = calibration["attentions"]
    paths = [f"{first['full_path']}_heads_{run}" for run in ("0", "1")]
    apart = [replace(e, path=path, query_heads=1) for e, path in zip(plan.attentions, paths, strict=True)]
    report = build_report(replace(plan, attentions=tuple(apart)), calibration=calibration)
    VALIDATOR.validate(json.loads(to_json(report)))
    for number, entry in enumerate(report["attentions"]):
        (row,) = entry["per_head"]
        assert (row["head"], row["largest"]) == (number, first["heads"][number]["largest"])
    page = render_html(report)
    assert [f"{path}, head {number}" in page for number, path in enumerate(paths)] == [True, True]
    numbers = head_numbers("a.b_heads_0_to_2_5", 4)
    assert numbers == (0, 1, 2, 5)
    assert head_numbers("many_heads_3", 2) == (0, 1)


def test_spec_derivations_and_code() -> None:
    report = small("bounded").report()
    assert report["spec"]["lines"] == GPT.read_text().splitlines()
    (remark,) = report["spec"]["remarks"]
    assert "std.attention(" in report["spec"]["lines"][remark["line"] - 1]
    assert "balanced degree 2" in remark["text"]
    (derivation,) = report["derivations"]
    lines = "\n".join(derivation["lines"])
    for part in (
        "causal",
        "Cauchy-Schwarz",
        "R = 1: |s_ij| <= R, proved from the program",
        "eps' = ",
        "rank r = ",
    ):
        assert part in lines
    assert report["code"] == {
        name: small("bounded").modules[name] for name in report["attentions"][0]["code"]
    }
    assert list(report["code"])


def test_a_report_shows_all_files_of_a_kernel(tmp_path: Path) -> None:
    """What runs on a GPU too, of a spec and of a folder."""
    compiled = fg.compile(GPT, params=SIZES, target="auto")
    compiled.write(tmp_path / "folder")
    of_folder = make_report(
        ReportRequest(tmp_path / "folder", {}, None, None, None, {}, 0, measure=False), lambda what: None
    )
    kernel = compiled.plan_document["attentions"][0]["kernel"]
    for report in (compiled.report(), of_folder):
        assert list(report["code"]) == [f"{kernel}.cpp", f"{kernel}.py", f"{kernel}_triton.py"]
        assert report["attentions"][0]["code"] == list(report["code"])


@pytest.mark.medium
def test_warnings_say_what_a_number_rests_on() -> None:
    wide = asserted(3.0, 'at "*" degree = 4').report()
    assert "asserted" in kinds(wide)
    assert wide["attentions"][0]["range_source"] == "asserted"
    assert any("a guard watches it, on_violation = warn" in warning["text"] for warning in wide["warnings"])
    assert kinds(fg.compile(text("return softmax(x @ x.T) @ x")).report()) == ["unbounded"]
    random = make_report(ReportRequest(GPT, SIZES, None, None, None, {"n": 16}, 0, True), lambda what: None)
    assert {"weights", "data", "length"} <= set(kinds(random))
    assert random["reproduce"]["commands"][1].startswith(
        "fastgrad report build --dim b=1 --dim n=16 --seed 0"
    )


def test_logits_beyond_an_asserted_range_are_seen() -> None:
    compiled = asserted(0.5, 'at "*" degree = 2')
    model = always_polynomial(compiled, compiled.module(dtype=torch.float64))
    x = 3 * torch.randn(1, 40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    report = compiled.report(model, [x])
    assert {"range", "asserted"} <= set(kinds(report))
    assert max(head["reach"] for head in report["attentions"][0]["per_head"]) > 0.5


def test_a_folder_gives_its_calibration(tmp_path: Path) -> None:
    compiled = fg.compile(GPT, params=SIZES, out=tmp_path)
    calibration = calibration_of(compiled.plan_document)
    request = ReportRequest(tmp_path, {}, None, None, None, {}, 0, False)
    assert make_report(request, lambda what: None) == compiled.report()
    (tmp_path / "calibration.json").write_text(to_json(calibration))
    report = make_report(request, lambda what: None)
    assert report.calibration == calibration
    assert report == compiled.report(calibration=calibration)
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(fg.TfgError, match=r"FG430.*calibration\.json: not JSON: .* at line 1, column 2"):
        make_report(request, lambda what: None)
    shutil.rmtree(tmp_path)


def test_commands_that_reproduce_a_calibration() -> None:
    compiled = fg.compile(GPT, params=SIZES)
    calibration = calibration_of(compiled.plan_document)
    assert (
        compiled.report(calibration=calibration)["reproduce"]["commands"] is None
    )  # weights were given as a module
    for data, weights, expected in (
        (
            "text of a b.txt",
            "weights of w.safetensors",
            "--calibrate 'a b.txt' --dim b=1 --dim n=2048 --weights w.saf",
        ),
        (
            "random inputs",
            "initial weights, seed 0",
            "--calibrate random --dim b=1 --dim n=2048 --seed 0 -o build",
        ),
    ):
        known = replace(calibration, data=data, weights=weights)
        (command, again) = compiled.report(calibration=known)["reproduce"]["commands"]
        assert "--set depth=2 " in command
        assert expected in command
        assert again == "fastgrad report build --no-measure --html build/report.html"
    assert (
        small("bounded").report(small("bounded").module(), INPUTS["bounded"])["reproduce"]["commands"] is None
    )


def test_numbers_in_words() -> None:
    assert [percent(share) for share in (0.0042, 0.5, 2.5, 34.0, 2718.3)] == [
        "0.42 %",
        "50 %",
        "250 %",
        "34 times",
        "2,718 times",
    ]
    assert [of_budget(share) for share in (0.5, 34.0)] == [
        "50 % of the budget used",
        "34 times the budget used",
    ]
    assert [size(count) for count in (512, 2048, 3 * 2**30, 2**40)] == [
        "512 bytes",
        "2 KiB",
        "3 GiB",
        "1 TiB",
    ]
