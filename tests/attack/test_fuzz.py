"""The short form of `attack.fuzz`: what it found once, a few hundred cases, and that it finds what is planted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from attack import fuzz as attack_fuzz
from attack.fuzz import Fuzz, Hang, check, fuzz_specs, limited
from attack.fuzz_commands import SOUND, copy, options, prepare, run, with_value
from attack.fuzz_files import fuzz_files, readers
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.pipeline import run as run_passes
from fastgrad_dsl.commands import cli
from fastgrad_dsl.commands.line import stages
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import read_source

HEAD = "use std\ndim b\ndim n\nmodel m(x: float[b, n, 16]) -> float[b, n, 16] {\n"
RULE = 'budget {\n    at "*" degree = 2\n}\n'
WIDE = "std.attention(std.rms_norm(x); heads = 2, qk_dim = 1000000000000, gain = 1.0)"
DOUBLED = "".join(
    f"block f{i}(x: float[b, n, d]) -> float[b, n, d] {{\n    return f{i - 1}(f{i - 1}(x))\n}}\n"
    for i in range(1, 40)
)
REGRESSIONS = {
    "a width of 10^12": ("FG307", f"{HEAD}    return {WIDE}\n}}\n{RULE}"),
    "a width of 10^12 of a polynomial of its own": (
        "FG307", f"{HEAD}    return std.kernel_attention(x; heads = 2, qk_dim = 1000000000000)\n}}\n"
    ),
    "a transpose of a scalar": ("FG205", f"{HEAD}    return x * float(transpose(24))\n}}\n"),
    "repeats within repeats": (
        "FG241",
        f"{HEAD}    repeat i in 100000 {{\n        repeat j in 100000 {{\n            x = tanh(x)\n        }}\n    }}\n"
        "    return x\n}\n",
    ),
    "65,536 layers": (
        "FG241",
        f"{HEAD}    repeat i in 65536 {{\n        x = std.attention(x; heads = 2) as l\n    }}\n    return x\n}}\n",
    ),
    "blocks that call the one before twice": (
        "FG241",
        "block f0(x: float[b, n, d]) -> float[b, n, d] {\n    return tanh(x)\n}\n"
        f"{DOUBLED}{HEAD.removeprefix('use std')}    return f39(x)\n}}\n",
    ),
    "a number times an int is no scaled int": (None, f"{HEAD}    return softmax((2.0 * int(x)) @ unit(x).T) @ x\n}}\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_was_found_once(tmp_path: Path, name: str) -> None:
    code, text = REGRESSIONS[name]
    path = tmp_path / "found.tfg"
    path.write_text(text)
    with limited():
        outcome = check(path)
    assert (outcome == "planned") == (code is None)
    if code is not None:
        with pytest.raises(TfgError, match=rf"\[{code}\]"):
            run_passes(elaborate(read_source(path)), until="plan", validate=False)


@pytest.mark.medium
def test_mutated_specs(tmp_path: Path) -> None:
    fuzz = Fuzz(5, tmp_path / "out")
    fuzz_specs(fuzz, 0, 200, tmp_path)
    assert not fuzz.findings
    assert {"spec: planned", "spec: refused as text", "spec: refused as program"} <= set(fuzz.outcomes)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::fastgrad_compiler.runtime.triton_tuned.TunedWarning")
def test_mutated_files(tmp_path: Path) -> None:
    fuzz = Fuzz(5, tmp_path / "out")
    kinds = readers(tmp_path)
    fuzz_files(fuzz, 0, 6 * len(kinds), kinds)
    assert not fuzz.findings
    for kind in kinds:
        assert any(each.startswith(f"{kind.name}: ") for each in fuzz.outcomes)
    assert sum(count for each, count in fuzz.outcomes.items() if "refused" in each) > 30


def test_every_command_has_a_sound_call() -> None:
    """Except of the language server, which has no option and ends with its input; tests/lsp attacks it."""
    commands = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert set(SOUND) == commands - {"lsp"}


def _cheap() -> Iterator[list[str]]:
    """Of the commands that run no model, every option with a few values."""
    for command in ("check", "stages", "fmt"):
        yield [command, *SOUND[command]]
        for name, values in options(command):
            for value in values[::23]:
                yield with_value(command, name, value)


@pytest.mark.medium
def test_commands_with_extremes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path / "sound", build=False)
    copy(tmp_path / "sound", tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    ended = set()
    for arguments in _cheap():
        with limited():
            ended.add(run(arguments))
    assert ended == {"status 0", "status 2"}


@pytest.mark.medium
def test_a_planted_exception_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(attack_fuzz, "elaborate", broken)
    fuzz = Fuzz(5, tmp_path / "out")
    fuzz_specs(fuzz, 0, 3, tmp_path)
    assert sum(fuzz.findings.values()) == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["finding-1"]


def _count_for_ever() -> None:
    while True:
        pass


def test_a_planted_hang_is_found() -> None:
    with pytest.raises(Hang, match="processor"), limited(0.05):
        _count_for_ever()
    with pytest.raises(Hang, match="waits"), limited(5.0, waiting=0.05):
        time.sleep(20)


def test_a_planted_traceback_of_a_command_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(stages, "read_source", broken)
    with pytest.raises(Exception, match=r"^status 1, .*KeyError: 'planted'"):
        run(["check", "tiny.tfg"])
