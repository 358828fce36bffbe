"""Every option and command that a text of the product names exists where the text can be read."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from msgspec.structs import replace

from fastgrad_dsl.commands.cli import app, main
from fastgrad_dsl.documents.report import Batch
from fastgrad_dsl.models.text_data import load_text
from fastgrad_dsl.report.reproduce import reproduce
from fastgrad_grammar.diagnostics import TfgError
from tests.dsl.calibrations import calibration_of
from tests.dsl.models import small

ROOT = Path(__file__).parents[2]
FOLDERS = ("fastgrad_dsl", "compiler/fastgrad_compiler", "grammar/fastgrad_grammar")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
COMMAND = re.compile(r"`fastgrad ([a-z]+)")
ALL = ("check", "compile", "advise", "stages", "report", "train", "convert", "generate", "tune")

SHOWN_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "compiler/fastgrad_compiler/passes/memory.py": {"--dim": ("check", "compile")},
    "compiler/fastgrad_compiler/planning/pieces.py": {"--along": ("stages",)},
    "fastgrad_dsl/commands/advise.py": {"--wide": ("advise",)},
    "fastgrad_dsl/commands/serve.py": dict.fromkeys(("--serve", "--port"), ("report",)),
    "fastgrad_dsl/commands/bench.py": dict.fromkeys(
        ("--n", "--heads", "--degree", "--d", "--dtype"), ("bench",)
    ),
    "fastgrad_dsl/storage/build_manifest.py": {"--force": ("compile", "train")},
    "fastgrad_dsl/storage/staged.py": {"--force": ("import", "export")},
    "fastgrad_dsl/calibration/data.py": {"--dim": ("compile", "advise")},
    "fastgrad_dsl/training/checkpoint.py": {"--out": ("train", "convert")},
    "fastgrad_dsl/conversion/run.py": dict.fromkeys(
        ("--weights", "--near", "--far-dim", "--at", "--adapters", "--transfer-steps"), ("convert",)
    ),
    "fastgrad_dsl/conversion/spec.py": {"--at": ("convert",)},
    "fastgrad_dsl/commands/convert.py": {"--resume": ("convert",)},
    "fastgrad_dsl/commands/train.py": dict.fromkeys(("--rate", "--resume", "--steps", "--clip"), ("train",)),
    "fastgrad_dsl/api/native_build.py": {"--target": ("compile",)},
    "fastgrad_dsl/report/cautions.py": {"--dim": ("report",), "--calibrate": ("compile",)},
    "fastgrad_dsl/api/report.py": dict.fromkeys(("--dim", "--seed"), ("report",)),
    "fastgrad_dsl/models/sizes.py": {"--dim": ("report",)},
    "fastgrad_dsl/commands/report_table.py": {"--wide": ("report",)},
    "fastgrad_dsl/training/folder.py": {
        **dict.fromkeys(("--exact", "--calibrate"), ("train",)),
        **dict.fromkeys(
            ("--target", "--resume", "--force", "--out", "--set", "--model", "--tokenizer"),
            ("train", "convert"),
        ),
    },
    "fastgrad_dsl/models/text_data.py": {"--seq": ("train", "convert")},
    "fastgrad_dsl/models/tokenizer.py": {"--tokenizer": ("train", "generate", "convert")},
    "fastgrad_dsl/commands/generate.py": dict.fromkeys(
        ("--load-state", "--prompt", "--stop", "--tokens", "--weights"), ("generate",)
    ),
    "fastgrad_dsl/generation/reading.py": {"--save-state": ("generate",)},
    "fastgrad_dsl/training/loop.py": dict.fromkeys(("--rate", "--resume", "--clip"), ("train", "convert")),
    "fastgrad_dsl/training/launch.py": {"--resume": ("train",)},
    "fastgrad_dsl/training/parallel.py": dict.fromkeys(
        ("--accumulate", "--batch", "--context", "--data", "--nproc", "--recompute", "--seq", "--tensor"),
        ("train",),
    ),
    "fastgrad_dsl/training/ranks.py": {"--timeout": ("train",)},
    "fastgrad_dsl/commands/tune.py": {"--dtype": ("tune",)},
    "fastgrad_dsl/bench/tuning.py": {"--dry-run": ("tune",)},
    "compiler/fastgrad_compiler/frontend/modules.py": {"--include": ALL},
    "compiler/fastgrad_compiler/frontend/programs.py": {"--model": ALL},
    "grammar/fastgrad_grammar/read.py": {"--include": ALL},
}
"""By file: the options that its texts name, and the commands that can show them."""

LINE = "fastgrad_dsl.commands.line."
"""Where options are declared, a module for each command."""

APART = {
    "fastgrad_dsl/commands/cli.py",  # --version
    "fastgrad_dsl/commands/line/options.py",  # declares what several commands have
    "fastgrad_dsl/report/reproduce.py",  # writes whole commands, which are read below
    "fastgrad_dsl/bench/machine.py",  # asks a compiler
    "compiler/fastgrad_compiler/runtime/native.py",  # how g++ is installed
}


@cache
def options() -> dict[str, set[str]]:
    """The options of each command."""
    return {
        name: {each for option in command.params for each in (*option.opts, *option.secondary_opts)}
        for name, command in declared().items()
    }


def declared() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def texts() -> Iterator[tuple[str, str]]:
    """Every string of the product that is no docstring, with its file."""
    for file in (file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))):
        tree = ast.parse(file.read_text())
        described = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
                yield file.relative_to(ROOT).as_posix(), node.value


@pytest.mark.medium
def test_options_exist_on_the_commands_that_show_them() -> None:
    found: dict[str, set[str]] = {}
    for file, text in texts():
        if file not in APART and (named := OPTION.findall(text)):
            found.setdefault(file, set()).update(named)
    own: dict[str, set[str]] = {}
    for name, command in declared().items():
        assert command.callback.__module__.startswith(LINE)
        own.setdefault(f"{command.callback.__module__.replace('.', '/')}.py", set()).update(options()[name])
    for file, known in own.items():
        assert found.pop(file, set()) <= known, f"{file} names an option that its commands lack"
    assert found == {file: set(named) for file, named in SHOWN_BY.items()}, "say which commands show it"
    for file, shown in SHOWN_BY.items():
        for option, commands in shown.items():
            for command in commands:
                assert option in options()[command], f"{file} names {option}, which {command} lacks"


@pytest.mark.medium
def test_commands_that_are_named_exist() -> None:
    named = {(file, command) for file, text in texts() for command in COMMAND.findall(text)}
    assert named
    assert {command for _, command in named} <= set(options()), named


def test_commands_that_reproduce_a_report_have_their_options() -> None:
    compiled = small("bounded")
    plan = replace(compiled.plan_document, params={"depth": "2"})
    calibration = calibration_of(plan, data="text of a.txt", weights="weights of w.safetensors")
    batch = Batch(batches=1, tokens=1, kind="text of a.txt", dims={}, seed=1, weights="weights of w")
    for given in (None, batch):
        for line in reproduce(plan, given, ["--text a.txt", "--seed 1"], calibration)["commands"]:
            _, command, *words = line.split()
            assert {word for word in words if word.startswith("--")} <= options()[command], line


@pytest.mark.parametrize("option", ["--seq", "--dim"])
def test_a_short_text_is_mended_by_the_option_of_the_command(option: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(TfgError) as raised:
        load_text(tmp_path / "short.txt", 64, option)
    (found,) = raised.value.diagnostics
    assert found.code == "FG412"
    assert OPTION.findall(" ".join(found.help)) == [option]


@pytest.mark.parametrize("line", ["report", "advise", "compile", "train"])
def test_a_short_text_names_an_option_that_is_there(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    file = str(ROOT / "examples" / "bounded.tfg")
    more = {
        "report": ["--text", "short.txt"],
        "train": ["--text", "short.txt"],
        "advise": ["--calibrate", "short.txt"],
        "compile": ["--calibrate", "short.txt", "-o", "build"],
    }[line]
    monkeypatch.setattr(sys, "argv", ["fastgrad", line, file, *more, "--set", "depth=1"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "[FG412]" in said
    assert (named := set(OPTION.findall(said))), said
    assert named <= options()[line]
