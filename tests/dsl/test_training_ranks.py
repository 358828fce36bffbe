"""`fastgrad train` on several processes: what one gives, whatever the mesh, and nothing lost when one of them is."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastgrad_dsl as fg
from fastgrad_dsl.commands.cli import main
from fastgrad_dsl.training import Options
from fastgrad_dsl.training.budget_watch import merged
from fastgrad_dsl.training.folder import remove_sharded, sharded_steps
from fastgrad_dsl.training.loop import accumulated_gradients, make_optimiser
from fastgrad_dsl.training.parallel import Parallel, check_batch, check_machine, check_model
from fastgrad_dsl.training.ranks import Mesh, Ranks
from fastgrad_dsl.training.sharded import latest
from fastgrad_grammar.diagnostics import TfgError
from tests.dsl.training_model import Bigram, loss, text_data

pytestmark = pytest.mark.medium

SPEC = """use std
dim b
dim n <= 65536
block layer(x: float[b, n, d]) -> float[b, n, d] {
    return x + std.mixer(std.rms_norm(x); heads = 2, qk_dim = 2, near = 4)
}
model tiny(tokens: int[b, n]) -> float[b, n, 256] {
    weight table: float[256, 12] = normal(std = 0.5)
    x = embedding(table, tokens)
    repeat i in 2 {
        x = layer(x) as layers
    }
    return std.rms_norm(x) @ table.T
}
objective loss(logits: float[b, n, 256], targets: int[b, n]) = cross_entropy(logits, targets)
"""
TRAIN = ("train", "tiny.tfg", "--text", "text.txt", "--target", "torch", "--seq", "33", "--batch", "4")
OPTIONS = (*TRAIN, "--every", "3", "--sample", "0")
STEPS = 8
Line = tuple[int, float, float]


def write(place: Path) -> None:
    (place / "tiny.tfg").write_text(SPEC)
    (place / "text.txt").write_bytes(bytes(range(32, 127)) * 60)


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a group of its own, as a terminal starts it."""
    root = Path(__file__).parent.parent.parent
    paths = os.pathsep.join(str(root / each) for each in (".", "compiler", "grammar"))
    return subprocess.Popen(
        [sys.executable, "-m", "fastgrad_dsl", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(place: Path, *arguments: str) -> tuple[int, str, str]:
    command = start(place, *arguments)
    out, err = command.communicate(timeout=500)
    return command.returncode, out, err


def run_until(
    place: Path, step: int, then: Callable[[subprocess.Popen[str], list[int]], None], *arguments: str
) -> tuple[int, str, str]:
    """then(the command, its processes by rank) when a step is done."""
    command = start(place, *arguments)
    while len(losses(place / "run")) < step:
        assert command.poll() is None, command.communicate()
        time.sleep(0.01)
    then(command, processes_of(command.pid))
    out, err = command.communicate(timeout=500)
    return command.returncode, out, err


def processes_of(pid: int) -> list[int]:
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
                worker = b"spawn_main" in (each / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue
            found += [int(each.name)] if parent == pid and worker else []
    return sorted(found)


def events(folder: Path) -> list[dict]:
    if not (folder / "log.jsonl").exists():
        return []
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(folder: Path) -> list[Line]:
    return [(e["step"], e["loss"], e["gradient_norm"]) for e in events(folder) if "loss" in e]


def close(found: list[Line], wanted: list[Line]) -> bool:
    """Losses to 1e-6 of their size, and norms to 1e-5, both in float32."""
    pairs = list(zip(found, wanted, strict=True))
    return all(a[0] == b[0] and abs(a[1] / b[1] - 1) < 1e-6 and abs(a[2] / b[2] - 1) < 1e-5 for a, b in pairs)


TWO = ("--steps", str(STEPS), "--nproc", "2", "--context", "2")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on two processes, each with half of every sequence, one of which is killed in between."""
    place = tmp_path_factory.mktemp("two")
    write(place)
    options = (*OPTIONS, *TWO, "-o", "run")
    status, out, err = run_until(place, 5, lambda _, ranks: os.kill(ranks[-1], signal.SIGKILL), *options)
    assert status == 0
    assert "a process was lost: all 2 are started again" in err
    assert out.count("step      8  loss") == 1  # of two processes one prints
    shares = [event["waiting"] for event in events(place / "run") if "loss" in event]
    assert len(shares) >= STEPS
    assert all(0 < share < 1 for share in shares)
    assert re.search(r"\nin communication: \d+% of the time of steps", out)
    return (place / "run").rename(place / "whole").parent


def single(place: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["fastgrad", *OPTIONS, *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


def test_two_processes_give_what_one_gives(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one of them was lost, and all were started again from the last checkpoint."""
    single(two, monkeypatch, "--steps", str(STEPS), "-o", "alone")
    assert close(losses(two / "whole"), losses(two / "alone"))
    assert losses(two / "whole") != losses(two / "alone")  # it did run in pieces
    assert all("waiting" not in event for event in events(two / "alone"))
    found, wanted = (load_file(two / name / "weights.safetensors") for name in ("whole", "alone"))
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_process_that_is_killed_changes_nothing(two: Path) -> None:
    """Losses and weights are those of a run that is left alone, bit for bit."""
    status, _, err = run(two, *OPTIONS, *TWO, "-o", "left")
    assert (status, err) == (0, "")
    assert losses(two / "left") == losses(two / "whole")
    found, wanted = (load_file(two / name / "weights.safetensors") for name in ("left", "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_going_on_in_one_process(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of two processes is read by one, whose own takes its place."""
    shutil.copytree(two / "whole", two / "on")
    single(two, monkeypatch, "--steps", str(STEPS + 2), "-o", "on", "--resume")
    assert len(losses(two / "on")) == STEPS + 2
    assert not sharded_steps(two / "on")
    assert latest(two / "on").progress.step == STEPS + 2
    shutil.copytree(two / "alone", two / "alone on")
    single(two, monkeypatch, "--steps", str(STEPS + 2), "-o", "alone on", "--resume")
    assert close(losses(two / "on"), losses(two / "alone on"))


@pytest.mark.slow
def test_blocks_that_run_again(two: Path) -> None:
    options = (
        *OPTIONS,
        "--steps",
        str(STEPS),
        "-o",
        "again",
        "--nproc",
        "2",
        "--context",
        "2",
        "--recompute",
    )
    assert run(two, *options)[0] == 0
    assert losses(two / "again") == losses(two / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        ("--data", "4"),
        ("--data", "2", "--context", "2"),
        ("--context", "3"),
        ("--context", "2", "--tensor", "2"),
        ("--tensor", "2", "--recompute"),
    ],
)
def test_every_mesh(two: Path, mesh: tuple[str, ...]) -> None:
    """Begun on it, and gone on from what two processes saved."""
    name = "".join(mesh)
    assert run(two, *OPTIONS, "--steps", str(STEPS), "-o", name, *mesh)[0] == 0
    assert close(losses(two / name), losses(two / "whole"))
    for source, more in ((name, ("--context", "2")), ("whole", mesh)):
        shutil.copytree(two / source, two / f"{name} {source}")
        status, _, err = run(
            two, *OPTIONS, "--steps", str(STEPS + 1), "-o", f"{name} {source}", "--resume", *more
        )
        assert (status, err) == (0, "")
    found = [losses(two / f"{name} {source}")[-1:] for source in (name, "whole")]
    assert close(*found)
    weights, wanted = (load_file(two / each / "weights.safetensors") for each in (name, "whole"))
    assert weights.keys() == wanted.keys()
    for key, weight in wanted.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_process_that_hangs_is_named(two: Path) -> None:
    shutil.rmtree(two / "run", ignore_errors=True)
    options = (*OPTIONS, "--steps", str(STEPS), "-o", "run", "--context", "2", "--timeout", "8")
    stopped: list[int] = []

    def stop(_: subprocess.Popen[str], ranks: list[int]) -> None:
        stopped.append(ranks[-1])
        os.kill(ranks[-1], signal.SIGSTOP)

    status, _, err = run_until(two, 4, stop, *options)
    assert status == 0
    assert f"error[FG504]: no answer within 8 seconds from rank 1 (process {stopped[0]} on " in err
    assert "it hangs" in err
    assert losses(two / "run") == losses(two / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint(two: Path, number: int, status: int) -> None:
    """As from a terminal, which sends Ctrl-C to every process."""
    shutil.rmtree(two / "run", ignore_errors=True)
    options = (*OPTIONS, "-o", "run", "--context", "2", "--steps")
    ended, _, err = run_until(two, 4, lambda command, _: os.killpg(command.pid, number), *options, "1000")
    assert ended == status
    assert "--resume goes on" in err
    assert "Traceback" not in err
    step = latest(two / "run").progress.step
    assert step >= 4
    assert losses(two / "run")[-1][0] == step


@pytest.mark.slow
def test_a_process_that_is_lost_time_and_again(two: Path) -> None:
    shutil.rmtree(two / "run", ignore_errors=True)
    options = (*OPTIONS, "-o", "run", "--context", "2", "--steps", "1000", "--restarts", "0")
    ended, _, err = run_until(two, 4, lambda _, ranks: os.kill(ranks[-1], signal.SIGKILL), *options)
    assert ended == 2
    assert "error[FG504]: rank 1 (process " in err
    assert "was killed by SIGKILL" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_torchrun_starts_it_too(two: Path) -> None:
    root = Path(__file__).parent.parent.parent
    paths = os.pathsep.join(str(root / each) for each in (".", "compiler", "grammar"))
    called = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    ended = subprocess.run(
        [*called, "fastgrad_dsl", *OPTIONS, "--steps", str(STEPS), "-o", "torchrun", "--context", "2"],
        cwd=two,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert losses(two / "torchrun") == losses(two / "whole")


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(two: Path) -> None:
    """A folder that cannot be written is told once, with status 2, and nothing starts again."""
    (two / "taken").mkdir(exist_ok=True)
    (two / "taken" / "mine.txt").write_text("mine")
    status, _, err = run(two, *OPTIONS, "--steps", "3", "-o", "taken", "--context", "2")
    assert status == 2
    assert err.count("error[FG431]") == 1
    assert err.count("error") == 1
    status, _, err = run(two, *OPTIONS, "--steps", "300", "-o", "wild", "--context", "2", "--rate", "1e30")
    assert status == 2
    assert err.count("error[FG433]") == 1
    assert "again" not in err


# ---------------------------------------------------------------- in one process


def test_accumulated_parts_give_the_gradient_of_the_batch() -> None:
    data, options = text_data(), Options(tokens=16, batch=6)
    places = data.places(16, 6, torch.Generator().manual_seed(1))
    found = []
    for parts in (1, 3):
        model = Bigram().double().eval()
        optimiser = make_optimiser(model, options)
        size = 6 // parts
        batches = [data.windows(places[i * size : (i + 1) * size], 16) for i in range(parts)]
        value, norm = accumulated_gradients(
            model, loss, optimiser, batches, replace(options, accumulate=parts), Ranks()
        )
        gradients = [p.grad for p in model.parameters()]
        found.append((value, norm, gradients))
    assert abs(found[0][0] - found[1][0]) < 1e-12
    assert abs(found[0][1] - found[1][1]) < 1e-12
    for one, other in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_accumulating_is_the_same_run(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single(two, monkeypatch, "--steps", "4", "-o", "parts", "--accumulate", "2")
    single(two, monkeypatch, "--steps", "4", "-o", "at once")
    assert close(losses(two / "parts"), losses(two / "at once"))


@pytest.mark.parametrize("data", [1, 2, 3])
def test_rows_are_divided_without_overlap(data: int) -> None:
    for rows in range(1, 8):
        weights, seen = [], []
        for rank in range(data):
            ranks = Ranks(Mesh(data, 1), rank)
            own, weight = ranks.own_rows(rows)
            weights.append(weight)
            seen += list(range(rows))[own] if weight else []
        assert seen == list(range(rows))
        assert sum(weights) == pytest.approx(1.0)
    found = [each for rank in range(data) for each in Ranks(Mesh(data, 1), rank).own(list(range(6)))]
    assert found == list(range(6))


def test_guards_of_all_ranks_count_together() -> None:
    status = {"path": "a", "bound": 2.0, "calls": 3, "violations": 1, "largest": 1.5}
    (found,) = merged([[status], [{**status, "violations": 0, "largest": 1.9}]])
    assert found == {**status, "calls": 6, "violations": 1, "largest": 1.9}


def test_meshes() -> None:
    assert Parallel(4, 2, 2).mesh() == Parallel(4, 2).mesh() == Parallel(None, 2, 2).mesh() == Mesh(2, 2)
    assert Parallel(4).mesh() == Mesh(4, 1)
    assert Parallel(8, tensor=2).mesh() == Parallel(8, 4, tensor=2).mesh() == Mesh(4, 1, 2)
    assert Parallel(8, context=2, tensor=2).mesh() == Parallel(None, 2, 2, 2).mesh() == Mesh(2, 2, 2)
    assert Parallel().mesh() == Mesh(1, 1)
    assert refused(Parallel(recompute=True).mesh) == "FG416 --recompute is for several processes"


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(TfgError) as found:
        work()
    return "; ".join(f"{each.code} {each.message}" for each in found.value.diagnostics)


def test_meshes_that_do_not_fit() -> None:
    """All of them before anything starts."""
    compiled = fg.compile(SPEC, target="torch", validate=False)
    options = Options(tokens=8, batch=4)
    assert (
        refused(Parallel(4, 3).mesh)
        == "FG503 a mesh of --data 3 --context 1 has 3 processes, and there are 4"
    )
    said = refused(Parallel(4, tensor=3).mesh)
    assert said == "FG503 a mesh of --data 1 --context 1 --tensor 3 has 3 processes, and there are 4"
    said = refused(lambda: check_batch(options, Mesh(3, 1)))
    assert said == "FG503 --data 3: a batch of 4 sequences has no 3 equal parts"
    said = refused(lambda: check_batch(replace(options, accumulate=2), Mesh(4, 1)))
    assert said == "FG503 --data 4: a batch of 4 sequences has no 2 times 4 equal parts"
    said = refused(lambda: check_batch(replace(options, accumulate=3), Mesh()))
    assert said == "FG416 --accumulate 3 does not divide a batch of 4"
    said = refused(lambda: check_batch(options, Mesh(1, 9)))
    assert said == "FG503 --context 9: sequences of 8 tokens are too short for so many pieces"
    said = refused(lambda: check_model(compiled, options, Mesh(1, 1, 3)))
    assert said == "; ".join(
        f"FG503 --tensor 3 does not divide the 2 heads or hidden entries of layers.{i}.mixer.attention"
        for i in range(2)
    )
    check_model(compiled, options, Mesh(1, 1, 2))
    said = refused(lambda: check_machine(compiled.program, Mesh(10**6, 1)))
    assert said.startswith("FG503 1000000 processes take 20")
    changing = SPEC.replace(
        "std.mixer(std.rms_norm(x); heads = 2, qk_dim = 2, near = 4)", "softmax(causal(x @ x.T)) @ x"
    )
    clamping = fg.compile(
        f"{changing}\nbudget {{\n    on_violation = clamp\n}}\n", target="torch", validate=False
    )
    said = refused(lambda: check_model(clamping, options, Mesh(1, 2)))
    assert said == "FG503 --context 2: on_violation = clamp needs whole sequences"
    check_model(clamping, options, Mesh(2, 1))
    said = refused(lambda: check_model(clamping, options, Mesh(1, 1, 2)))
    assert said == "FG503 --tensor 2: no block of tiny has heads or a hidden width that can be divided"
    acting = fg.compile(f"{SPEC}\nbudget {{\n    on_violation = exact\n}}\n", target="torch", validate=False)
    said = refused(lambda: check_model(acting, options, Mesh(1, 1, 2)))
    assert said == "FG503 --tensor 2: on_violation = exact needs all heads of an attention"
    mixing = SPEC.replace("return std.rms_norm(x)", "return (x - mean(x; axis = 1, keepdim = true))")
    mixed = fg.compile(mixing, target="torch", validate=False)
    assert refused(lambda: check_model(mixed, options, Mesh(1, 2))).startswith("FG501 no step form along n")
    root = SPEC.replace("= cross_entropy(logits, targets)", "= sqrt(cross_entropy(logits, targets))")
    rooted = fg.compile(root, target="torch", validate=False)
    for mesh, accumulate in ((Mesh(1, 2), 1), (Mesh(2, 1), 1), (Mesh(), 2)):
        said = refused(partial(check_model, rooted, replace(options, accumulate=accumulate), mesh))
        assert said.startswith("FG501 no value in pieces along")
    check_model(rooted, options, Mesh())


def test_what_is_not_finished_goes(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint"
    for name in ("step-3-3", ".step-6-6", "mine", "step-x"):
        (place / name).mkdir(parents=True)
    remove_sharded(tmp_path, unfinished=True)
    assert {each.name for each in place.iterdir()} == {"step-3-3", "mine", "step-x"}
    assert sharded_steps(tmp_path) == [(3, 3)]
    remove_sharded(tmp_path)
    assert {each.name for each in place.iterdir()} == {"mine", "step-x"}
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "checkpoint").symlink_to(place)
    (place / "step-9-9").mkdir()
    remove_sharded(tmp_path / "link")
    assert (place / "step-9-9").exists()
    assert sharded_steps(tmp_path / "link") == []


@pytest.mark.parametrize("damage", ["progress", "shard", "cut"])
def test_a_damaged_checkpoint_is_named(
    damage: str, two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(two / "whole", two / damage)
    place = two / damage / "checkpoint" / f"step-{STEPS}-{STEPS}"
    shard = sorted(place.glob("*.safetensors"))[-1]
    if damage == "progress":
        (place / "progress.json").write_text('{"format": []')
    elif damage == "shard":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-7])
    monkeypatch.chdir(two)
    monkeypatch.setattr(sys, "argv", ["fastgrad", *OPTIONS, "--steps", "99", "-o", damage, "--resume"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "error[FG41" in capsys.readouterr().err
