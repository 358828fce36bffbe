"""`fastgrad advise` and `fastgrad compile --calibrate`: prices, files, diagnostics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fastgrad_compiler.attention.table import attention_table
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.pipeline import run
from fastgrad_compiler.planning.advice import advise, cheapest
from fastgrad_dsl.commands.cli import app
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.source import Source

MODEL = """use std
dim b
dim n <= 65536
model m(x: float[b, n, 32]) -> float[b, n, 32] {{
    repeat i in 3 {{ x = x + std.attention(std.rms_norm(x); heads = 2, qk_dim = 8{options}) as layers }}
    return x
}}
budget {{
    output <= {output}
    gradient <= {gradient}
}}
"""


def _text(options: str = ", gain = 1.0", output: float = 0.03, gradient: float = 0.15) -> str:
    return MODEL.format(options=options, output=output, gradient=gradient)


def _file(folder: Path, text: str) -> Path:
    path = folder / "m.tfg"
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def no_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pace of the machine is not measured in a test, which must not depend on time."""
    from fastgrad_dsl.calibration import pace, replan

    monkeypatch.setattr(replan, "machine_pace", pace.default_pace)


MIXED = """use std
dim b
dim n <= 4096
model mixed(x: float[b, n, 32]) -> float[b, n, 32] {
    x = x + std.attention(std.rms_norm(x); heads = 4, qk_dim = 4, causal = true, gain = 1.0) as first
    return x + std.attention(std.rms_norm(x); heads = 4, qk_dim = 4, causal = true) as second
}
budget {
    output <= 0.05
    gradient <= 0.1
}
"""
"""Nothing limits the logits of the second."""


def test_alike_attentions_are_advised_together() -> None:
    program = run(elaborate(Source("<text>", _text())), until="attention")[-1].program
    (advised,) = advise(program)
    assert len(advised.entries) == 3
    assert advised.length == 65_536
    best = cheapest(advised.advice)
    assert best is not None
    assert best.degree is not None
    assert best.time < 0.5
    assert any("qk_dim" in each.change for each in advised.advice)
    assert any("gain = 0.5" in each.change for each in advised.advice)
    for each in advised.advice:
        if each.degree is not None and each.kind == "plan":
            assert each.feasible == (each.output <= 0.01 and each.gradient <= 0.05)


@pytest.mark.parametrize(
    ("options", "word"), [("", "gain"), (", gain = 2.0", "gain"), (", gain = 1.0", "qk_dim")]
)
def test_advice_that_is_followed_is_feasible(options: str, word: str) -> None:
    """The cheapest change of the model, written into the file, gives a plan with its degree."""
    program = run(elaborate(Source("<text>", _text(options))), until="attention")[-1].program
    (advised,) = advise(program)
    near = [each for each in advised.advice if "near" in each.change]
    changes = [each for each in advised.advice if each.feasible and each.change.startswith(word)]
    change = min((each for each in changes if each not in near), key=lambda each: each.time)
    written = change.change.partition(",")[0]
    text = _text(f", {written}") if word == "gain" else _text(options).replace("qk_dim = 8", written)
    planned = run(elaborate(Source("<text>", text)))[-1].program
    nodes = [node for graph in planned.graphs for node in graph.nodes if node.op == "poly_attention"]
    assert nodes
    assert {node["degree"] for node in nodes} == {change.degree}


@pytest.mark.parametrize("rule", ["", '    at "second*" exact\n'])
def test_the_cheapest_degree_is_that_of_the_plan(rule: str) -> None:
    """An attention that stays exact takes no share of the budget, in the advice neither."""
    text = MIXED.replace("    gradient", f"{rule}    gradient")
    stages = run(elaborate(Source("<text>", text)), until="plan", validate=False)
    first, second = (entry.node for entry in attention_table(stages[-1].program))
    assert (first["decision"], second["decision"]) == ("polynomial", "exact")
    before = next(stage.program for stage in stages if stage.name == "attention")
    best = [cheapest(each.advice) for each in advise(before)]
    assert [each.degree for each in best if each is not None] == [first["degree"], None]


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "advice.json"
    result = CliRunner().invoke(app, ["advise", str(_file(tmp_path, _text())), "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "cheapest" in result.stdout
    document = json.loads(out.read_text())
    assert document["attentions"][0]["cheapest"].startswith("degree = ")
    assert document["attentions"][0]["warning"].startswith("it averages: with |s| <= 1 no key")


def test_the_command_with_measured_candidates(tmp_path: Path) -> None:
    path = _file(tmp_path, _text())
    result = CliRunner().invoke(app, ["advise", str(path), "--calibrate", "random", "--dim", "n=64"])
    assert result.exit_code == 0, result.output
    assert "measured on random inputs (b = 1, n = 64)" in result.stdout
    assert "chosen" in result.stdout


@pytest.mark.medium
@pytest.mark.parametrize("options", ["", ", gain = 2.0"])
def test_advice_for_a_budget_that_is_refused(options: str, tmp_path: Path) -> None:
    """Where a rule keeps the budget from being met, candidates of other degrees are measured all the same."""
    path = _file(tmp_path, _text(options, 1e-4, 1e-3).rstrip("}\n") + '\n    at "*" degree = 2\n}\n')
    command = ["--calibrate", "random", "--dim", "n=64", "--target", "torch"]
    refused = CliRunner().invoke(app, ["compile", str(path), "-o", str(tmp_path / "out"), *command])
    assert isinstance(refused.exception, TfgError)
    out = tmp_path / "advice.json"
    result = CliRunner().invoke(app, ["advise", str(path), "--json", str(out), *command])
    assert result.exit_code == 0, result.output
    candidates = json.loads(out.read_text())["attentions"][0]["candidates"]
    assert {candidate["degree"] for candidate in candidates} - {None, 2}


@pytest.mark.medium
def test_compile_calibrates_on_stored_batches(tmp_path: Path) -> None:
    path, stored = _file(tmp_path, _text("")), tmp_path / "batches.safetensors"
    save_file({f"x.{place}": torch.randn(2, 33, 32) for place in range(3)}, stored)
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["compile", str(path), "-o", str(out), "--calibrate", str(stored), "--target", "torch"]
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"\(measured on one batch of [\d,]+ tokens that it held out\)", result.stdout)
    document = json.loads((out / "calibration.json").read_text())
    assert document["data"] == f"batches of {stored}"
    assert document["dims"] == {"b": 2, "n": 33}
    assert document["verification"]["output"] <= 0.03
    report = json.loads((out / "report.json").read_text())
    assert report["calibration"]["planned"] == document["planned"]


def test_a_file_that_asks_to_be_calibrated_is(tmp_path: Path) -> None:
    path = _file(tmp_path, _text("").replace("}}\n", "").rstrip("}\n") + "\n    trust = calibrated\n}\n")
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["compile", str(path), "-o", str(out), "--dim", "n=64", "--target", "torch"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads((out / "calibration.json").read_text())["data"] == "random inputs"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"y": torch.zeros(2, 5, 32)}, "has no tensor x"),
        ({"x": torch.zeros(2, 5)}, "x is float[2, 5], not float[b, n, 32]"),
        ({"x": torch.zeros(2, 5, 32, dtype=torch.int64)}, "x is int[2, 5, 32], not float[b, n, 32]"),
    ],
)
def test_wrong_batches(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    stored = tmp_path / "batches.safetensors"
    save_file(tensors, stored)
    result = CliRunner().invoke(
        app, ["compile", str(_file(tmp_path, _text())), "-o", str(tmp_path / "o"), "--calibrate", str(stored)]
    )
    assert isinstance(result.exception, TfgError)
    (diagnostic,) = result.exception.diagnostics
    assert diagnostic.code == "FG423"
    assert message in diagnostic.message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["missing.safetensors", "empty.safetensors", "missing.txt", "empty.txt"])
def test_unreadable_data(name: str, tmp_path: Path) -> None:
    if name.startswith("empty"):
        (tmp_path / name).touch()
    text = (
        _text()
        if name.endswith("safetensors")
        else (Path(__file__).parents[2] / "examples" / "bounded.tfg").read_text()
    )
    path = _file(tmp_path, text)
    result = CliRunner().invoke(
        app, ["compile", str(path), "-o", str(tmp_path / "o"), "--calibrate", str(tmp_path / name)]
    )
    assert isinstance(result.exception, TfgError)
    assert result.exception.diagnostics[0].code in ("FG411", "FG412", "FG423")


def test_text_for_a_model_that_takes_none(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 1000)
    result = CliRunner().invoke(
        app, ["compile", str(_file(tmp_path, _text())), "-o", str(tmp_path / "o"), "--calibrate", str(text)]
    )
    assert isinstance(result.exception, TfgError)
    assert result.exception.diagnostics[0].code == "FG415"
