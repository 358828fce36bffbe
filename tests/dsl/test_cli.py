"""The command line: what it prints, what it writes, and with which status it ends."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import fastgrad_dsl as fg
from fastgrad_compiler import pipeline
from fastgrad_compiler.ir.graph import Program
from fastgrad_dsl.commands.cli import main

ROOT = Path(__file__).parent.parent.parent
SPEC = """
use std

dim b
dim n <= 512

model tiny(tokens: int[b, n]) -> float[b, n, 256] {
    weight table: float[256, 16] = normal(std = 0.02)
    x = embedding(table, tokens)
    repeat i in 2 {
        x = x + std.attention(x; heads = 2, qk_dim = 4, causal = true, gain = 1.0) as layers
    }
    return x @ table.T
}

objective loss(logits: float[b, n, 256], targets: int[b, n]) = cross_entropy(logits, targets)

budget {
    at "*" degree = 2
}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fastgrad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in a folder that holds tiny.tfg and text.txt; gives status, stdout and stderr."""
    (tmp_path / "tiny.tfg").write_text(SPEC)
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 40)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgrad", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return int(ended.value.code or 0), output.out, output.err

    return run


def test_a_compile_is_validated_unless_told_not_to(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pass that gets the scale wrong is a bug of the compiler's; `check`, which makes no model, does not run it."""
    step = next(step for step in pipeline.PASSES if step.name == "attention")

    def faulty(program: Program) -> Program:
        done = step.run(program)
        graphs = []
        for graph in done.graphs:
            nodes = (n.with_attributes(scale=2.0) if n.op == "attention" else n for n in graph.nodes)
            graphs.append(replace(graph, nodes=tuple(nodes)))
        return done.with_graphs(graphs)

    passes = tuple(pipeline.Pass("attention", faulty) if p is step else p for p in pipeline.PASSES)
    monkeypatch.setattr(pipeline, "PASSES", passes)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fastgrad", "compile", "tiny.tfg", "-o", "out"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    told = r"\.CompilerBug: after attention: std\.attend\.\S+ .*reproduces it\nfastgrad: this is a bug"
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert fastgrad("check", "tiny.tfg")[0] == 0
    assert fastgrad("compile", "tiny.tfg", "-o", "out", "--no-validate")[0] == 0


def test_check_says_what_each_attention_will_be(fastgrad: Run) -> None:
    status, out, err = fastgrad("check", "tiny.tfg")
    assert (status, err) == (0, "")
    assert "layers.0.attend .. layers.1.attend (2)  balanced degree 2" in out


def test_report_of_a_model_without_inputs(fastgrad: Run) -> None:
    Path("table.tfg").write_text(
        "model m() -> float[2] {\n    weight w: float[2] = ones()\n    return w\n}\n"
    )
    status, out, _ = fastgrad("report", "table.tfg")
    assert status == 0
    assert "on random inputs, initial weights" in out


OWN = "x = x + std.kernel_attention(x; heads = 2, qk_dim = 4, causal = true)"


@pytest.mark.parametrize(
    ("more", "is_own"), [("", True), ("x = x + std.attention(x; heads = 2, gain = 1.0)", False)]
)
def test_no_approximation_error_is_the_first_thing_said(fastgrad: Run, more: str, is_own: bool) -> None:
    """Where all polynomials are the model's own; not where one stands in for exp, or there is none."""
    budget = 'budget {\n    at "*" degree = 2\n}' if more else ""
    text = "use std\ndim b\ndim n <= 4096\nmodel own(x: float[b, n, 8]) -> float[b, n, 8] {{\n{}\n{}\nreturn x\n}}\n{}"
    Path("own.tfg").write_text(text.format(OWN, more, budget.replace("*", "attention*")))
    first = "no approximation error at all: every attention runs as the file defines it"
    for command in (("check", "own.tfg"), ("report", "own.tfg", "--no-measure")):
        status, out, _ = fastgrad(*command)
        assert status == 0, out
        assert (first in out.splitlines()[0].replace("No", "no")) == is_own, out
        assert (first in out.replace("No", "no")) == is_own


def test_check_shows_a_near_field(fastgrad: Run) -> None:
    spec = Path("tiny.tfg")
    spec.write_text(SPEC.replace('at "*" degree = 2', 'at "*" degree = 2\n at "layers.0.*" near = 4'))
    _, out, _ = fastgrad("check", "tiny.tfg")
    assert "layers.0.attend  balanced degree 2, exact in blocks of 4" in out
    assert "warning: it averages: with |s| <= 1 no key beyond its blocks of 4 gets more than" in out
    assert "layers.1.attend  balanced degree 2  " in out


def test_check_reports_several_errors_without_colour(fastgrad: Run) -> None:
    Path("bad.tfg").write_text(
        SPEC.replace("embedding(table, tokens)", "embedding(tabel, tokens)").replace("16]", "wide]")
    )
    status, out, err = fastgrad("check", "bad.tfg")
    assert (status, out) == (2, "")
    assert "did you mean" in err
    assert "2 errors" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("content", ["", "\n", "# nothing\n"])
def test_a_file_without_a_model_is_a_diagnostic(fastgrad: Run, content: str) -> None:
    Path("empty.tfg").write_text(content)
    status, _, err = fastgrad("check", "empty.tfg")
    assert status == 2
    assert "error[FG" in err


HEAVY = {
    "torch",
    "msgspec",
    "scipy",
    "networkx",
    "numpy",
    "jinja2",
    "matplotlib",
    "fastgrad_dsl.report.document",
}


@pytest.mark.parametrize(
    ("arguments", "more", "said"),
    [
        ("check examples/bounded.tfg", {"pydantic"}, "model gpt, "),
        ("check examples/bounded.tfg --set depth=2", set(), "model gpt, "),
        ("train --help", set(), "--resume"),
    ],
)
def test_what_a_command_does_not_need_is_not_loaded(arguments: str, more: set[str], said: str) -> None:
    """Typer reads options with pydantic, which takes as long to load as half of a check; a plain one does without."""
    code = (
        f"import sys; sys.argv = ['fastgrad', *{arguments.split()!r}]\n"
        "from fastgrad_dsl.commands.cli import main\n"
        "try: main()\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        f"loaded = {HEAVY | more!r} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    path = ":".join(map(str, (ROOT, ROOT / "compiler", ROOT / "grammar")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False, cwd=ROOT, env={"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.parametrize("file", ["bad.tfg", "missing.tfg", "tiny.tfg"])
def test_a_plain_check_is_that_of_typer(fastgrad: Run, file: str) -> None:
    Path("bad.tfg").write_text("param depth 6\n")
    assert fastgrad("check", file) == fastgrad("check", "--", file)


def test_params_are_overridden_and_checked(fastgrad: Run) -> None:
    Path("tiny.tfg").write_text("param depth = 2\n" + SPEC.replace("repeat i in 2", "repeat i in depth"))
    assert "(3)" in fastgrad("check", "tiny.tfg", "--set", "depth=3")[1]
    for wrong in ("depth=x", "dept=3", "depth", "=3"):
        status, _, err = fastgrad("check", "tiny.tfg", "--set", wrong)
        assert status == 2, wrong
        assert "error[FG4" in err
    assert "[FG416]" in fastgrad("check", "tiny.tfg", "--set", "depth")[2]


def test_compile_writes_a_folder_and_keeps_what_is_not_its_own(fastgrad: Run) -> None:
    status, _, _ = fastgrad("compile", "tiny.tfg", "-o", "build/tiny")
    assert status == 0
    folder = Path("build/tiny")
    first = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "model.py",
        "plan.json",
        "report.json",
        "report.html",
        "spec.tfg",
        "__init__.py",
        "stages/06-lowrank.txt",
        "stages/07-step.txt",
    } <= first
    (folder / "mine.txt").write_text("keep")
    Path("tiny.tfg").write_text(SPEC.replace("degree = 2", "degree = 4"))
    assert fastgrad("compile", "tiny.tfg", "-o", "build/tiny")[0] == 0
    second = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    kernels = [
        {
            name
            for name in names
            if name.startswith("attention_") and "op" not in name and name.endswith(".py")
        }
        for names in (first, second)
    ]
    assert len(kernels[0]) == len(kernels[1]) == 2  # a kernel, and what serves it on a GPU
    assert not kernels[0] & kernels[1]
    assert (folder / "mine.txt").read_text() == "keep"


def test_a_folder_that_cannot_be_written_is_a_diagnostic(fastgrad: Run) -> None:
    Path("taken").write_text("a file")
    status, _, err = fastgrad("compile", "tiny.tfg", "-o", "taken/build")
    assert status == 2
    assert "[FG421]" in err
    assert Path("taken").read_text() == "a file"


def test_targets_that_are_not_there_are_refused(fastgrad: Run) -> None:
    for target in ("tritton", "toorch"):
        status, _, err = fastgrad("compile", "tiny.tfg", "-o", "build", "--target", target)
        assert status == 2
        assert "[FG420]" in err
    assert not Path("build").exists()


@pytest.mark.medium
@pytest.mark.usefixtures("native")
def test_cpp_kernels_are_built_ahead_or_a_warning_says_why_not(
    fastgrad: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("compile", "tiny.tfg", "-o", "build", "--target", "cpp")
    monkeypatch.setenv("FASTGRAD_CACHE", str(tmp_path / "cache"))
    for variable, value, reason in (
        ("CXX", "/nonexistent/c++", "CXX names, /nonexistent/c++, is not there"),
        ("FASTGRAD_NATIVE", "0", "FASTGRAD_NATIVE is 0"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            status, _, err = fastgrad(*command)
        assert status == 0
        assert "warning[FG422]" in err
        assert reason in err
    assert json.loads(Path("build/plan.json").read_text())["target"] == "cpp"
    if shutil.which("g++") is not None:
        assert fastgrad(*command)[::2] == (0, "")
        kernels = [path.stem for path in Path("build").glob("*_*.cpp")]
        assert any(name.startswith("attention_") for name in kernels)
        built = [path.name.partition("_float32-")[0] for path in (tmp_path / "cache").glob("*.so")]
        assert sorted(built) == sorted(kernels)


def test_stages_prints_the_program_after_a_pass(fastgrad: Run) -> None:
    _, out, _ = fastgrad("stages", "tiny.tfg", "--after", "attention")
    assert "= attention(" in out
    assert "softmax" not in out
    _, everything, _ = fastgrad("stages", "tiny.tfg")
    assert [line.split()[2] for line in everything.splitlines() if line.startswith("# after")] == [
        "elaborate", "shapes", "bounds", "attention", "plan", "backward", "lowrank", "step", "training", "loss", "fuse",
        "memory",
    ]  # fmt: skip
    status, _, err = fastgrad("stages", "tiny.tfg", "--after", "shape")
    assert status == 2
    assert "[FG417]" in err
    assert "did you mean shapes?" in err


def test_report_of_a_spec_and_of_its_folder_agree(fastgrad: Run) -> None:
    fastgrad("compile", "tiny.tfg", "-o", "build")
    for where, file in (("tiny.tfg", "one.json"), ("build", "two.json")):
        status, out, _ = fastgrad("report", where, "--dim", "n=400", "--json", file)
        assert status == 0
        assert "output error" in out
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert one == two
    measured = one["whole"]["output"]["measured"]
    assert 0 < measured < 0.1
    for entry in one["attentions"]:
        errors = entry["errors"]
        assert 0 < errors["output"]["measured"] <= errors["output"]["bound"]
        assert 0 < errors["gradient"]["measured"] <= errors["gradient"]["bound"]
        assert errors["output"]["estimate"] > 0


def test_report_as_a_page_and_the_headline_first(fastgrad: Run) -> None:
    status, out, _ = fastgrad(
        "report", "tiny.tfg", "--dim", "n=400", "--html", "pages/one.html", "--json", "one.json"
    )
    assert status == 0
    page, report = Path("pages/one.html").read_text(), json.loads(Path("one.json").read_text())
    lines = out.splitlines()
    assert lines[1] == report["headline"]["verdict"]["text"]
    assert lines[2] == f"  output: {report['headline']['output']['words']}"
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert warnings == [f"warning: {warning['text']}" for warning in report["warnings"]]
    assert lines.index(warnings[0]) < next(i for i, line in enumerate(lines) if line.startswith("attention"))
    for warning in report["warnings"]:
        assert warning["text"] in page
    assert fastgrad("compile", "tiny.tfg", "-o", "build")[0] == 0
    assert "No model was run" in Path("build/report.html").read_text()


def test_report_without_measuring_knows_no_measurement(fastgrad: Run) -> None:
    status, out, _ = fastgrad("report", "tiny.tfg", "--no-measure", "--json", "report.json")
    assert status == 0
    assert "no model was run: this is what is known before any data" in out
    report = json.loads(Path("report.json").read_text())
    assert report["whole"]["output"] == {"bound": None, "estimate": None, "measured": None}


@pytest.mark.medium
def test_report_refuses_what_does_not_fit(fastgrad: Run) -> None:
    Path("empty").mkdir()
    Path("weights.safetensors").write_bytes(b"nothing")
    for arguments, code in (
        (["empty"], "FG419"),
        (["tiny.tfg", "--dim", "m=3"], "FG416"),
        (["tiny.tfg", "--dim", "n=many"], "FG416"),
        (["tiny.tfg", "--dim", "n=600"], "FG416"),
        (["tiny.tfg", "--text", "none.txt"], "FG411"),
        (["tiny.tfg", "--weights", "weights.safetensors"], "FG418"),
    ):
        status, _, err = fastgrad("report", *arguments)
        assert status == 2, arguments
        assert f"[{code}]" in err, arguments


def test_report_of_a_folder_refuses_options_that_only_a_file_heeds(fastgrad: Run) -> None:
    assert fastgrad("compile", "tiny.tfg", "-o", "build", "--target", "torch", "--no-validate")[0] == 0
    for option in (["--set", "depth=1"], ["--model", "tiny"], ["--include", "."]):
        status, out, err = fastgrad("report", "build", "--no-measure", *option)
        assert (status, out) == (2, "")
        assert f"error[FG416]: {option[0]} is for a .tfg file, and build is a folder" in err
    assert fastgrad("report", "build", "--no-measure")[0] == 0
    assert fastgrad("report", "tiny.tfg", "--no-measure", "--model", "tiny", "--include", ".")[0] == 0


@pytest.mark.medium
def test_train_logs_resumes_and_writes_a_sample(fastgrad: Run) -> None:
    options = ["train", "tiny.tfg", "--text", "text.txt", "--seq", "24", "--every", "2", "--sample", "8"]
    status, out, _ = fastgrad(*options, "--steps", "4", "-o", "run")
    assert status == 0
    assert "validation loss" in out
    assert ">>>" in out
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert fastgrad(*options, "--steps", "4", "-o", "run", "--resume")[0] == 0
    status, _, err = fastgrad(*options, "--steps", "4", "-o", "run", "--resume", "--exact")
    assert status == 2
    assert "[FG414]" in err
    assert fastgrad(*options, "--steps", "1", "--exact")[0] == 0
    assert Path("runs/tiny-exact/checkpoint.safetensors").exists()


def test_train_refuses_what_it_cannot_train(fastgrad: Run) -> None:
    Path("deaf.tfg").write_text(SPEC.split("objective")[0])
    Path("short.txt").write_text("short")
    for arguments, code in (
        (["deaf.tfg", "--text", "text.txt"], "FG415"),
        (["tiny.tfg", "--text", "text.txt", "--seq", "600"], "FG415"),
        (["tiny.tfg", "--text", "none.txt", "--seq", "24"], "FG411"),
        (["tiny.tfg", "--text", "short.txt", "--seq", "24"], "FG412"),
        (["tiny.tfg", "--text", "text.txt", "--seq", "24", "--resume", "-o", "new"], "FG413"),
    ):
        status, _, err = fastgrad("train", *arguments)
        assert status == 2, arguments
        assert f"[{code}]" in err, arguments


def test_fmt_formats_checks_and_loses_nothing(fastgrad: Run) -> None:
    Path("loose.tfg").write_text("param   a=1 # why\nparam b =  2\n")
    Path("broken.tfg").write_text("param = = 1\n")
    status, out, _ = fastgrad("fmt", "--check", "loose.tfg")
    assert (status, out) == (2, "would format loose.tfg\n")
    assert "a=1" in Path("loose.tfg").read_text()
    status, out, err = fastgrad("fmt", "loose.tfg", "broken.tfg")
    assert status == 2
    assert "broken.tfg:1" in err
    assert Path("loose.tfg").read_text() == "param a = 1 # why\nparam b = 2\n".replace(" #", "  #")
    assert Path("broken.tfg").read_text() == "param = = 1\n"
    assert fastgrad("fmt", "--check", "loose.tfg")[0] == 0


def test_help_names_every_command(fastgrad: Run) -> None:
    status, out, _ = fastgrad("--help")
    assert status == 0
    assert all(
        command in out for command in ("check", "compile", "stages", "report", "train", "bench", "fmt")
    )


def test_compile_shows_the_plan_that_it_wrote(fastgrad: Run) -> None:
    _, out, _ = fastgrad("compile", "tiny.tfg", "-o", "build")
    assert "(2)  balanced degree 2" in out
    plan = json.loads(Path("build/plan.json").read_text())
    assert [entry["degree"] for entry in plan["attentions"]] == [2, 2]


def test_python_runs_the_package() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "fastgrad_dsl", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"fastgrad {fg.__version__}\n"
