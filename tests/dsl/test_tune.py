"""`fastgrad tune`: its candidates, its search by a clock of the tests, and what launches make of the file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrad_compiler.runtime import triton_tuned
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.runtime.triton_attention import Launches
from fastgrad_compiler.runtime.triton_tuned import FILE, Configuration, TunedWarning, read
from fastgrad_dsl.bench import tuning
from fastgrad_dsl.bench.tuning import Shape, Work, neighbours, tune
from fastgrad_dsl.commands.cli import main
from fastgrad_dsl.commands.tune import Tuned, TuneRequest, print_choices, run_tune
from tests.gpu import interpreter
from tests.kernels.inputs import COEFFICIENTS

interpreter.install()

SPEC = """
use std

dim b
dim n <= 512

model tiny(x: float[b, n, 8]) -> float[b, n, 8] {
    repeat i in 2 {
        x = x + std.attention(x; heads = 1, qk_dim = 4, causal = true, gain = 1.0) as layers
    }
    return x
}

budget {
    at "*" degree = 2
}
"""
SHAPE = Shape(("layers.0",), KernelSpec(4, 8, COEFFICIENTS[2], causal=True), 1, 1)
WORK = Work(1, 16, "float32", torch.device("cpu"))
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTGRAD_CACHE", str(tmp_path / "cache"))
    triton_tuned.chosen.cache_clear()
    yield
    triton_tuned.chosen.cache_clear()


@pytest.fixture
def fastgrad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in a folder that holds tiny.tfg; gives status, stdout and stderr."""
    (tmp_path / "tiny.tfg").write_text(SPEC)
    (tmp_path / "exact.tfg").write_text(SPEC.replace('at "*" degree = 2', 'at "*" exact'))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgrad", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run


class Clock:
    """A timer that runs what it is given and says that each run is faster than the one before."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, run: Callable[[], None]) -> float:
        run()
        self.runs += 1
        return 1.0 / self.runs


def test_tuning_without_a_gpu_is_a_diagnostic(fastgrad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    status, out, err = fastgrad("tune", "tiny.tfg")
    assert (status, out) == (2, "")
    assert "[FG424]: GPU kernels cannot be timed here: they need a GPU" in err
    status, _, err = fastgrad("tune", "exact.tfg")
    assert status == 2
    assert "[FG424]: no attention of tiny has Triton kernels" in err
    status, _, err = fastgrad("tune", "tiny.tfg", "--dtype", "bfloat61")
    assert status == 2
    assert "[FG416]" in err
    assert "did you mean bfloat16?" in err


def test_a_dry_run_lists_candidates_and_times_nothing(
    fastgrad: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "tune", lambda *_: pytest.fail("timed"))
    status, out, err = fastgrad("tune", "tiny.tfg", "--dry-run", "--dtype", "float16")
    assert (status, err) == (0, "")
    assert out.startswith("layers.0.attend .. layers.1.attend (2)  Polynomial attention, degree 2, causal")
    assert "float16, table of sm_80" in out
    for kernel in ("state_kernel", "forward_kernel", "query_gradient_kernel", "key_gradient_kernel"):
        assert f"  {kernel}  " in out
    assert not (tmp_path / "cache" / FILE).exists()


class Kernel:
    """The signature of a kernel."""

    def __init__(self, *names: str) -> None:
        self.arg_names = names


def test_neighbours_differ_in_one_number_that_the_kernel_takes() -> None:
    config = (64, 32, 64, 4, 2)
    found = list(neighbours(Kernel("x", "ROWS", "KEYS", "FEATURES"), config))
    assert all(sum(a != b for a, b in zip(config, other, strict=True)) == 1 for other in found)
    assert len(set(found)) == len(found) == 9  # FEATURES cannot be 128
    assert list(neighbours(Kernel("TOKENS"), config)) == [
        (64, 16, 64, 4, 2),
        (64, 64, 64, 4, 2),
        *((64, 32, 64, warps, 2) for warps in (2, 8)),
        *((64, 32, 64, 4, stages) for stages in (1, 3)),
    ]
    smallest = neighbours(Kernel("ROWS"), (16, 16, 16, 2, 1))
    assert list(smallest) == [(32, 16, 16, 2, 1), (16, 16, 16, 4, 1), (16, 16, 16, 2, 2)]


def few(kernel: Any, config: Configuration) -> list[Configuration]:
    """Neighbours that cost little to interpret."""
    rows, keys, features, warps, stages = config
    return [(rows, keys, features, warps, stages + 1), (rows, keys, features, 2 * warps, stages)]


@pytest.fixture
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch leaves zeros: interpreting both passes takes a second for each candidate."""
    monkeypatch.setattr(tuning, "neighbours", few)
    monkeypatch.setattr(Launches, "_launch", lambda *_, **__: None)
    empty = Launches._empty
    monkeypatch.setattr(Launches, "_empty", lambda *given: empty(*given).zero_())


@pytest.mark.usefixtures("no_kernel_runs")
def test_the_fastest_is_kept_and_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "ROUNDS", 2)
    file = tmp_path / "tiny.tfg"
    file.write_text(SPEC)
    told: list[str] = []
    result: Tuned = run_tune(TuneRequest(file, {}, None, 1, 16, "float32"), told.append, Clock())
    ((shape, choices),) = result.found
    assert [f"{choice.kernel} of {shape.paths[0]}" for choice in choices] == told
    assert {"forward_kernel", "key_gradient_kernel"} <= {choice.kernel for choice in choices}
    for choice in choices:
        rows, keys, features, warps, stages = choice.table
        assert choice.found == (rows, keys, features, 4 * warps, stages)  # the last of each round
        assert choice.tried == 5
    path = tmp_path / "cache" / FILE
    assert result.path == path
    assert read(path) == {choice.name: choice.found for choice in choices}
    print_choices(result)
    assert f"kept in {path}" in capsys.readouterr().out

    triton_tuned.chosen.cache_clear()
    search = tuning._Search(shape, WORK, Clock())
    launches = Launches(search.module, search.attention.spec, *search.inputs)
    for choice in choices:
        assert launches.configuration(choice.kernel) == choice.found
        assert launches.row(choice.kernel) == choice.table


@pytest.mark.medium
def test_a_candidate_with_other_results_or_none_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, for the first kernel of a search, which both passes launch."""
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "neighbours", few)
    monkeypatch.setattr(tuning._Search, "kernels", property(lambda search: (*search.table,)[:1]))
    forward = tuning._Trial.forward

    def wrong(self: Any) -> Any:
        if any(config[3] != self.row(kernel)[3] for kernel, config in self.trial.items()):
            raise OSError("does not fit")
        out, *rest = forward(self)
        if any(config[4] != self.row(kernel)[4] for kernel, config in self.trial.items()):
            out[..., 0, 0] = torch.nan
        return (out, *rest)

    monkeypatch.setattr(tuning._Trial, "forward", wrong)
    clock = Clock()
    (choice,) = tune(SHAPE, WORK, clock, lambda what: None)
    assert (choice.found, choice.tried) == (choice.table, 1)
    assert clock.runs == 1  # only the row of the table was timed


@pytest.mark.usefixtures("no_kernel_runs")
@pytest.mark.parametrize("gain", [0.01, 0.05])
def test_noise_is_no_gain(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    search = tuning._Search(SHAPE, WORK, lambda run: 0.0)
    passes = search._run({})
    monkeypatch.setattr(search, "_run", lambda trial: passes)
    seconds = iter((1.0, 1.0, 1 - gain))
    monkeypatch.setattr(search, "timer", lambda run: next(seconds))
    choice = search.best(search.kernels[0])
    assert (choice.found == choice.table) == (gain < tuning.LEAST_GAIN)


def test_an_entry_that_is_no_longer_faster_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "cache" / FILE
    path.parent.mkdir()
    path.write_text(json.dumps({"other": [16, 16, 16, 4, 1], "mine": [16, 16, 16, 4, 2]}))
    table = (16, 16, 16, 4, 1)
    assert tuning.store([tuning.Choice("k", "mine", table, table, 1.0, 1.0, 3)]) == path
    assert read(path) == {"other": table}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": [1, 2]}', '{"a": [16, 16, 16, 4, "2"]}', '{"a": [0, 1, 1, 1, 1]}']
)
def test_a_broken_file_is_ignored_with_a_warning(text: str, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FILE).write_text(text)
    with pytest.warns(TunedWarning, match="is ignored"):
        assert triton_tuned.chosen() == {}
    assert triton_tuned.chosen() == {}  # without another
