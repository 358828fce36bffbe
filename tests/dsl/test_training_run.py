"""`fastgrad train` as a person uses it: its folder, stopping, going on, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import nn

import fastgrad_dsl as fg
from fastgrad_dsl.calibration import replan as replan_module
from fastgrad_dsl.calibration.pace import Line, MachinePace, default_pace
from fastgrad_dsl.commands.cli import main
from fastgrad_dsl.training import budget_watch
from fastgrad_dsl.training import loop as training
from fastgrad_dsl.training import plan as run_plan
from fastgrad_dsl.training.checkpoint import read_checkpoint
from fastgrad_dsl.training.folder import claimed
from tests.dsl.file_faults import Killed

SPEC = """use "parts/layer.tfg" as parts
use std
param width = 8
dim b
dim n <= 65536
model tiny(tokens: int[b, n]) -> float[b, n, 256] {
    weight table: float[256, width] = normal(std = 0.5)
    x = embedding(table, tokens)
    x = dropout(parts.layer(x), 0.1)
    return std.rms_norm(x) @ table.T
}
objective loss(logits: float[b, n, 256], targets: int[b, n]) = cross_entropy(logits, targets)
budget {
    output <= 0.05
    gradient <= 0.1
}
"""
LAYER = """use std
block layer(x: float[b, n, d]) -> float[b, n, d] {
    return x + std.attention(std.rms_norm(x); heads = 2, qk_dim = 2, causal = true)
}
"""
GATED = """use std
block layer(x: float[b, n, d]) -> float[b, n, d] {
    h = std.short_conv(std.rms_norm(x); width = 3) as mix
    return x + std.attention(h; heads = 2, qk_dim = 2, gain = 1.0, forget = true)
}
"""
Run = Callable[..., tuple[int, str, str]]
OPTIONS = (
    "train",
    "tiny.tfg",
    "--text",
    "text.txt",
    "--seq",
    "24",
    "--every",
    "2",
    "--sample",
    "0",
    "-o",
    "run",
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "layer.tfg").write_text(LAYER)
    (tmp_path / "tiny.tfg").write_text(SPEC)
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_plan, "machine_pace", fast_polynomials)
    return tmp_path


def fast_polynomials(target: str) -> MachinePace:
    """A pace at which polynomials serve every length from 128 on."""
    return replace(default_pace(target), polynomial=Line(1e-7, 1e14))


@pytest.fixture
def fastgrad(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; gives status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgrad", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out, err

    return run


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[], object]) -> None:
    """`happens` before the update that would make step `step`, once."""
    real, count = training.update, 0

    def update(optimiser: torch.optim.Optimizer, rate: float) -> None:
        nonlocal count
        count += 1
        if count == step:
            monkeypatch.setattr(training, "update", real)
            happens()
        real(optimiser, rate)

    monkeypatch.setattr(training, "update", update)


def killed() -> None:
    raise Killed


def log(folder: str = "run") -> list[dict[str, object]]:
    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = Path(folder, "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refused) for line in lines]


def without_time(events: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in event.items() if key != "seconds"} for event in events]


def same_run(one: str, other: str) -> None:
    """That the checkpoints, all of their tensors and plans, weights, models and logs are the same."""
    first, second = (read_checkpoint(Path(folder, "checkpoint.safetensors")) for folder in (one, other))
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    assert first.progress.plan == second.progress.plan
    for name in ("weights.safetensors", "model/model.py", "model/plan.json"):
        assert Path(one, name).read_bytes() == Path(other, name).read_bytes(), name
    assert without_time(log(one)) == without_time(log(other))


# ---------------------------------------------------------------- the folder


def test_a_run_folder_is_complete(fastgrad: Run) -> None:
    assert fastgrad(*OPTIONS, "--steps", "3", "--set", "width=6")[0] == 0
    assert {path.name for path in Path("run").iterdir()} == {
        "model", "spec", "weights.safetensors", "checkpoint.safetensors", "log.jsonl", ".lock",
    }  # fmt: skip
    assert Path("run/spec/tiny.tfg").read_text() == SPEC
    assert Path("run/spec/parts/layer.tfg").read_text() == LAYER
    model = fg.load("run")
    weights = load_file("run/weights.safetensors")
    assert weights["table"].shape == (256, 6)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert fastgrad("report", "run", "--no-measure")[0] == 0
    shutil.move("run", "elsewhere")
    Path("tiny.tfg").unlink()
    shutil.rmtree("parts")
    again = ("train", "elsewhere/spec/tiny.tfg", "--text", "text.txt", "--seq", "24", "--set", "width=6")
    status, _, err = fastgrad(*again, "--steps", "4", "--sample", "0", "-o", "elsewhere", "--resume")
    assert status == 0, err


def test_the_spec_of_a_run_is_the_one_that_it_began_with(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 1, lambda: Path("parts/layer.tfg").write_text("# edited while the run goes on\n"))
    assert fastgrad(*OPTIONS, "--steps", "2")[0] == 0
    assert Path("run/spec/parts/layer.tfg").read_text() == LAYER


def test_the_model_of_an_exact_run_is_exact(fastgrad: Run) -> None:
    assert fastgrad(*OPTIONS, "--steps", "2", "--exact")[0] == 0
    plan = json.loads(Path("run/model/plan.json").read_text())
    assert {entry["decision"] for entry in plan["attentions"]} == {"exact"}
    tokens = torch.arange(24)[None]
    compiled = fg.compile("tiny.tfg")
    reference = compiled.reference(compiled.module())
    reference.load_state_dict(load_file("run/weights.safetensors"))
    assert torch.equal(fg.load("run").eval()(tokens), reference.eval()(tokens))


def test_a_run_that_exists_is_refused_unless_forced(fastgrad: Run) -> None:
    assert fastgrad(*OPTIONS, "--steps", "2")[0] == 0
    before = Path("run/checkpoint.safetensors").read_bytes()
    status, _, err = fastgrad(*OPTIONS, "--steps", "2", "--seed", "1")
    assert status == 2
    assert "[FG431]" in err
    assert "--resume" in err
    assert "--force" in err
    assert Path("run/checkpoint.safetensors").read_bytes() == before
    assert fastgrad(*OPTIONS, "--steps", "2", "--seed", "1", "--force")[0] == 0
    assert Path("run/checkpoint.safetensors").read_bytes() != before
    assert [event["step"] for event in log()] == [1, 2, 2]
    assert fastgrad(*OPTIONS, "--steps", "2", "--resume", "--force")[0] == 2


def test_a_strangers_folder_is_refused_unless_forced(fastgrad: Run) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("mine")
    status, _, err = fastgrad(*OPTIONS, "--steps", "1")
    assert status == 2
    assert "[FG431]" in err
    assert "thesis.txt" in err
    assert fastgrad(*OPTIONS, "--steps", "1", "--force")[0] == 0
    assert Path("run/thesis.txt").read_text() == "mine"
    for name in ("model", "spec"):
        Path("project", name).mkdir(parents=True)
        assert "[FG431]" in fastgrad(*OPTIONS, "--steps", "1", "-o", "project")[2]
        Path("project", name).rmdir()


def test_links_in_a_run_folder_are_not_followed(fastgrad: Run, place: Path) -> None:
    (place / "outside").mkdir()
    (place / "outside.jsonl").write_text("mine")
    Path("run").mkdir()
    Path("run/spec").symlink_to(place / "outside")
    Path("run/log.jsonl").symlink_to(place / "outside.jsonl")
    status, _, err = fastgrad(*OPTIONS, "--steps", "1", "--force")
    assert status == 2
    assert "[FG421]" in err
    assert "is a link" in err
    assert not list((place / "outside").iterdir())
    assert (place / "outside.jsonl").read_text() == "mine"


def test_one_training_at_a_time(fastgrad: Run) -> None:
    with claimed(Path("run"), resume=False, force=False):
        for extra in ((), ("--force",)):
            status, _, err = fastgrad(*OPTIONS, "--steps", "1", *extra)
            assert status == 2
            assert "[FG432]" in err
            assert f"process {os.getpid()} on " in err
    assert fastgrad(*OPTIONS, "--steps", "1")[0] == 0
    with claimed(Path("run"), resume=True, force=False):
        assert "[FG432]" in fastgrad(*OPTIONS, "--steps", "2", "--resume")[2]


# ---------------------------------------------------------------- stopping and going on


@pytest.fixture(autouse=True)
def _signals_of_a_terminal() -> Iterator[None]:
    """Whoever started the tests may have had SIGINT or SIGHUP ignored, as a shell does in the background."""
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGHUP, hang_up)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    assert fastgrad(*OPTIONS, "--steps", "7", "-o", "whole")[0] == 0
    before = signal.getsignal(number)
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), number))
    ended, out, err = fastgrad(*OPTIONS, "--steps", "7")
    assert ended == status
    assert "run/checkpoint.safetensors holds step 4" in err
    assert "--resume" in err
    assert "step      5" not in out
    assert signal.getsignal(number) is before
    assert log()[-1]["step"] == 4
    assert read_checkpoint(Path("run/checkpoint.safetensors")).progress.step == 4
    assert fastgrad(*OPTIONS, "--steps", "7", "--resume")[0] == 0
    same_run("run", "whole")


def test_a_second_ctrl_c_stops_at_once(fastgrad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastgrad(*OPTIONS, "--steps", "5", "-o", "whole")[0] == 0

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 4, twice)
    assert fastgrad(*OPTIONS, "--steps", "5")[0] == 130
    assert read_checkpoint(Path("run/checkpoint.safetensors")).progress.step == 2
    assert fastgrad(*OPTIONS, "--steps", "5", "--resume")[0] == 0
    same_run("run", "whole")


@pytest.fixture
def calibrated(fastgrad: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Options of a run with a new plan at every validation, batches that a generator draws, and guards that sample by
    their calls; such a run is in the folder `whole`, and nothing disturbed it.
    """
    monkeypatch.setattr(budget_watch, "CLOSE", 0.0)
    options = (*OPTIONS, "--calibrate", "--seq", "130", "--steps", "5")
    assert fastgrad(*options, "-o", "whole")[0] == 0
    kept = read_checkpoint(Path("whole/checkpoint.safetensors"))
    assert any(name.startswith("guard.") for name in kept.tensors)
    assert kept.progress.plan is not None
    assert kept.progress.plan.decisions
    return options


@pytest.mark.medium
@pytest.mark.parametrize(
    "step", [4, pytest.param(5, marks=pytest.mark.slow)]
)  # before and after a checkpoint
def test_a_calibrated_run_that_is_killed_goes_on_bit_for_bit(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch, calibrated: tuple[str, ...], step: int
) -> None:
    at_step(monkeypatch, step, killed)
    with pytest.raises(Killed):
        fastgrad(*calibrated)
    torch.manual_seed(99)
    assert fastgrad(*calibrated, "--resume")[0] == 0
    same_run("run", "whole")


@pytest.mark.medium
def test_gates_and_short_convolutions_are_planned_trained_and_resumed(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of `--calibrate`, and the same killed after its first checkpoint."""
    Path("parts/layer.tfg").write_text(GATED)
    options = (*OPTIONS, "--calibrate", "--seq", "130", "--steps", "5", "--target", "torch")
    status, out, err = fastgrad(*options, "-o", "whole")
    assert status == 0, err
    assert out.count("calibrated on the text") == 1
    (entry,) = json.loads(Path("whole/model/plan.json").read_text())["attentions"]
    assert (entry["roles"], entry["decision"]) == (["forget"], "polynomial")
    weights = load_file("whole/weights.safetensors")
    assert {"layer.mix.w", "layer.attention.wf", "layer.attention.bf"} <= weights.keys()
    for name in ("layer.mix.w", "layer.attention.bf"):
        start = 0.0 if name.endswith(".w") else 4.0
        assert bool((weights[name] != start).any())
    budgets = [event["budget"] for event in log("whole") if "budget" in event]
    assert len(budgets) == 2  # after steps 2 and 4: at the end none was due
    assert all(b["output"] <= 0.05 and b["gradient"] <= 0.1 for b in budgets)  # type: ignore[index]
    loss, *_, end = log("whole")
    assert set(loss) == {"step", "seconds", "loss", "learning_rate", "gradient_norm"}
    assert set(end) == {"step", "seconds", "validation_loss"}
    at_step(monkeypatch, 4, killed)
    with pytest.raises(Killed):
        fastgrad(*options)
    assert fastgrad(*options, "--resume")[0] == 0
    same_run("run", "whole")


@pytest.mark.slow
def test_a_signal_within_a_validation(
    fastgrad: Run, monkeypatch: pytest.MonkeyPatch, calibrated: tuple[str, ...]
) -> None:
    """It is given up, and made anew by the resumed run with guards and generators as they were before."""
    real, calls = replan_module.replan, 0

    def replan(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(run_plan, "replan", replan)
    assert fastgrad(*calibrated)[0] == 130
    monkeypatch.setattr(run_plan, "replan", real)
    progress = read_checkpoint(Path("run/checkpoint.safetensors")).progress
    assert (progress.step, progress.validated) == (4, 2)
    assert fastgrad(*calibrated, "--resume")[0] == 0
    same_run("run", "whole")


@pytest.mark.medium
def test_killed_for_good(fastgrad: Run, place: Path) -> None:
    """A process that is killed by the system, and what it leaves."""
    options = (*OPTIONS, "--steps", "40")
    assert fastgrad(*options, "-o", "whole")[0] == 0
    command = [sys.executable, "-c", "from fastgrad_dsl.commands.cli import main; main()", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ends = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < ends:
        if Path("run/log.jsonl").exists() and len(Path("run/log.jsonl").read_text().splitlines()) > 6:
            process.kill()
        time.sleep(0.002)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = Path("run/.checkpoint.safetensors.0123abcd.tmp")
    left.write_bytes(b"half")
    assert fastgrad(*options, "--resume")[0] == 0
    assert not left.exists()
    same_run("run", "whole")


def test_a_finished_run_is_left_alone(fastgrad: Run) -> None:
    options = (*OPTIONS, "--steps", "3")
    assert fastgrad(*options)[0] == 0
    everything = sorted([Path("run"), *Path("run").rglob("*")])
    before = [(path, os.stat(path).st_mtime_ns, os.stat(path).st_ctime_ns) for path in everything]
    status, out, _ = fastgrad(*options, "--resume")
    assert status == 0
    assert "has done its 3 steps" in out
    everything = sorted([Path("run"), *Path("run").rglob("*")])
    assert [(path, os.stat(path).st_mtime_ns, os.stat(path).st_ctime_ns) for path in everything] == before


@pytest.mark.medium
def test_more_steps_and_other_validations(fastgrad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on to more steps does not depend on where it was killed before and after."""
    assert fastgrad(*OPTIONS, "--steps", "3")[0] == 0
    shutil.copytree("run", "other")
    assert fastgrad(*OPTIONS, "--steps", "7", "--resume")[0] == 0
    at_step(monkeypatch, 3, killed)
    with pytest.raises(Killed):
        fastgrad(*OPTIONS, "--steps", "7", "--resume", "-o", "other")
    assert fastgrad(*OPTIONS, "--steps", "7", "--resume", "-o", "other")[0] == 0
    same_run("run", "other")
    assert [(event["step"], "loss" in event) for event in log()] == [
        (1, True), (2, True), (2, False), (3, True), (3, False), (4, True), (4, False), (5, True), (6, True),
        (6, False), (7, True), (7, False),
    ]  # fmt: skip
    assert fastgrad(*OPTIONS, "--steps", "9", "--every", "5", "--resume")[0] == 0
    status, _, err = fastgrad(*OPTIONS, "--steps", "8", "--resume")
    assert status == 2
    assert "has done 9 steps, more than 8" in err


OTHERS: dict[str, tuple[tuple[str, ...], str]] = {
    "text": (("--text", "other.txt"), "the text was sha256 "),
    "spec": (("other.tfg",), "the spec was sha256 "),
    "param": (("--set", "width=6"), "--set was nothing, is width=6"),
    "target": (("--target", "torch"), "--target was auto, is torch"),
    "exact": (("--exact",), "--exact was not given, is given"),
    "calibrate": (("--calibrate",), "--calibrate was not given, is given"),
    "rate": (("--rate", "0.5"), "learning_rate was 0.001, is 0.5"),
    "seed": (("--seed", "1"), "seed was 0, is 1"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("what", OTHERS)
def test_another_run_is_refused_by_what_differs(fastgrad: Run, what: str) -> None:
    Path("other.txt").write_bytes(bytes(range(32, 126)) * 40)
    Path("other.tfg").write_text(SPEC.replace("0.5", "0.25"))
    assert fastgrad(*OPTIONS, "--steps", "1")[0] == 0
    options, message = OTHERS[what]
    arguments = [options[0] if what == "spec" and each == "tiny.tfg" else each for each in OPTIONS]
    for steps in ("1", "2"):
        status, _, err = fastgrad(
            *arguments, *(() if what == "spec" else options), "--steps", steps, "--resume"
        )
        assert status == 2
        assert "[FG414]" in err
        assert message in " ".join(err.split())
    Path("parts/layer.tfg").write_text(LAYER.replace("heads = 2", "heads = 1"))
    err = fastgrad(*OPTIONS, "--steps", "1", "--resume")[2]
    assert "the file parts/layer.tfg was sha256 " in err


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("every", ["1", "2", "50"])
def test_a_rate_that_is_far_too_large_stops_the_run(fastgrad: Run, every: str) -> None:
    status, _, err = fastgrad(*OPTIONS, "--steps", "20", "--rate", "1e30", "--every", every)
    assert status == 2
    assert "[FG433]" in err
    assert "--rate" in err
    kept = read_checkpoint(Path("run/checkpoint.safetensors"))
    assert f"the checkpoint of step {kept.progress.step} is kept" in err
    assert all(bool(t.isfinite().all()) for t in kept.tensors.values() if t.is_floating_point())
    assert all(bool(t.isfinite().all()) for t in fg.load("run").state_dict().values())
    assert log()


def test_no_option_is_infinite(fastgrad: Run) -> None:
    for option in ("--rate", "--clip"):
        for value in ("inf", "nan"):
            status, _, err = fastgrad(*OPTIONS, "--steps", "1", option, value)
            assert status == 2, err
    assert not Path("run").exists()


def test_texts_that_never_end(fastgrad: Run) -> None:
    os.mkfifo("pipe")
    for path in ("pipe", "/dev/zero", "."):
        status, _, err = fastgrad("train", "tiny.tfg", "--text", path, "--seq", "24")
        assert status == 2
        assert "[FG411]" in err


def test_a_model_in_half_precision_goes_on_bit_for_bit(place: Path) -> None:
    """From Python: weights and moments in bfloat16."""
    from fastgrad_dsl.models.text_data import load_text

    compiled = fg.compile("tiny.tfg")
    assert compiled.loss is not None
    data = load_text(Path("text.txt"), 24)
    options = training.Options(steps=5, tokens=24, validate_every=2, checkpoint_every=2)

    def model() -> nn.Module:
        return compiled.module(seed=0, dtype=torch.bfloat16)

    list(training.train(model(), compiled.loss, data, options, Path("whole")))
    part = training.train(model(), compiled.loss, data, options, Path("part"))
    for event in part:
        if event.step == 3:
            break
    part.close()
    list(training.train(model(), compiled.loss, data, options, Path("part"), resume=True))
    ends = [read_checkpoint(Path(name, "checkpoint.safetensors")).tensors for name in ("whole", "part")]
    assert ends[0]["model.table"].dtype == torch.bfloat16
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
