"""A conversion from end to end: what each phase does, what stays, stopping, going on, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastgrad_dsl as fg
from fastgrad_dsl.conversion.document import Conversion
from fastgrad_dsl.conversion.run import Request, Silent, convert
from fastgrad_dsl.conversion.spec import Form
from fastgrad_dsl.documents.read import read_document
from fastgrad_dsl.training.log import Event
from fastgrad_dsl.training.loop import Options
from fastgrad_dsl.training.stopping import Stop, Stopped
from fastgrad_grammar.diagnostics import TfgError
from tests.conversion.models import ENCODER, encoder_texts, numbers, options, request
from tests.grids import wide


def equal(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.medium
def test_a_decoder(tmp_path: Path) -> None:
    asked = request(
        tmp_path,
        trained=150,
        form=Form(near=1, far_dim=4),  # a word is longer than the near field
        transfer=options(steps=60, learning_rate=0.1),
        tuning=options(steps=40, learning_rate=1e-3),
    )
    report = convert(asked)
    rows = numbers(report)
    attention, loss, longer = rows["attention error", 48], rows["loss", 48], rows["loss", 192]
    assert attention.transferred < 0.7 * attention.before
    assert loss.original < loss.tuned < loss.transferred < loss.before
    assert longer.tuned < longer.before
    assert (report.transfer_tokens, report.tuning_tokens) == (60 * 2 * 48, 40 * 2 * 48)
    assert read_document(tmp_path / "out" / "conversion.json", Conversion) == report

    model = fg.load(tmp_path / "out")
    tokens = torch.randint(256, (1, 48))
    made = fg.compile(tmp_path / "out" / "spec" / "model.tfg", target="torch").module()
    made.load_state_dict(load_file(tmp_path / "out" / "weights.safetensors"))
    torch.testing.assert_close(model(tokens), made(tokens))
    assert [int(token) for token in fg.generate(model, [1, 2, 3], tokens=2)]
    plan = fg.compile(tmp_path / "out" / "spec" / "model.tfg").plan
    assert [entry.attention.is_own for entry in plan] == [True, True]


@pytest.mark.medium
def test_tuning_on_longer_sequences(tmp_path: Path) -> None:
    asked = request(tmp_path, tuning=options(steps=2, tokens=96, batch=1))
    report = convert(asked)
    assert report.tuning_tokens == 2 * 96
    assert set(numbers(report)) == {
        ("attention error", 48),
        ("loss", 48),
        ("loss", 192),
    }  # those of the transfer


@pytest.mark.medium
def test_transfer_moves_the_attentions_own_weights_alone(tmp_path: Path) -> None:
    asked = request(tmp_path, tuning=options(steps=0), patterns=("layers.1",))
    convert(asked)
    before, after = load_file(asked.weights), load_file(asked.folder / "weights.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    new = after.keys() - before.keys()
    assert {name.rpartition(".")[0] for name in new} == {"layers.1.attention.attend"}


@pytest.mark.medium
def test_adapters_are_merged_and_change_what_they_are_of(tmp_path: Path) -> None:
    asked = request(tmp_path, adapters=2)
    convert(asked)
    before, after = load_file(asked.weights), load_file(asked.folder / "weights.safetensors")
    transferred = load_file(asked.folder / "transfer" / "weights.safetensors")
    changed = {name for name in after if not torch.equal(transferred[name], after[name])}
    matrices = {name for name, value in before.items() if value.ndim == 2 and name != "table"}
    assert changed == matrices | {name for name in after if name not in before}
    for name in matrices:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) <= 2
    assert fg.load(asked.folder) is not None


@pytest.mark.medium
def test_an_encoder_learns_its_own_results(tmp_path: Path) -> None:
    asked = request(
        tmp_path, ENCODER, transfer=options(steps=40), tuning=options(steps=60, learning_rate=3e-3)
    )
    report = convert(asked)
    rows = numbers(report)
    error, attention, ranks = (
        rows["output error", 48],
        rows["attention error", 48],
        rows["rank correlation", 48],
    )
    assert attention.transferred < attention.before
    assert error.tuned < error.before
    assert error.original == 0.0
    assert ranks.original == 1.0
    assert ranks.tuned > 0.9
    assert ("rank correlation", 192) not in rows  # the spec allows no text of this length


class Interrupted(Silent):
    """Stops, or kills the process, within a phase."""

    def __init__(self, phase: str, step: int, stop: Stop | None) -> None:
        self.name, self.step, self.stop = phase, step, stop

    def phase(self, name: str, options: Options, events: Generator[Event, None, None]) -> None:
        for event in events:
            if name == self.name and event.step >= self.step:
                if self.stop is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                else:
                    self.stop.signal = signal.SIGINT


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A forked process has none of the threads that work in this one, and would wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Request:
    asked = request(tmp_path_factory.mktemp("whole"), adapters=2)
    convert(asked)
    return asked


@pytest.mark.medium
@pytest.mark.parametrize(
    ("how", "phase", "step"),
    wide(
        [(how, *when) for how in ("stopped", "killed") for when in (("transfer", 6), ("tuning", 5))],
        few=[("killed", "transfer", 6), ("stopped", "tuning", 5)],
    ),
)
def test_a_resumed_conversion_is_an_undisturbed_one(
    how: str, phase: str, step: int, undisturbed: Request, tmp_path: Path
) -> None:
    asked = replace(undisturbed, folder=tmp_path / "out")
    if how == "stopped":
        stop = Stop()
        with pytest.raises(Stopped):
            convert(asked, Interrupted(phase, step, stop), stop)
    else:
        child = os.fork()
        if not child:
            convert(asked, Interrupted(phase, step, None))
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert fg.load(asked.folder) is not None  # a model of what is done so far
    report = convert(replace(asked, resume=True))
    assert equal(asked.folder / "weights.safetensors", undisturbed.folder / "weights.safetensors")
    wanted = read_document(undisturbed.folder / "conversion.json", Conversion)
    assert report.measured == wanted.measured


@pytest.mark.medium
def test_a_finished_one_is_left_alone(undisturbed: Request) -> None:
    files = {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*") if path.is_file()}
    report = convert(replace(undisturbed, resume=True))
    assert report == read_document(undisturbed.folder / "conversion.json", Conversion)
    assert {
        path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*") if path.is_file()
    } == files


def code(asked: Request) -> str:
    with pytest.raises(TfgError) as raised:
        convert(asked)
    return raised.value.diagnostics[0].code


@pytest.mark.medium
def test_what_a_folder_is_refused_for(undisturbed: Request, tmp_path: Path) -> None:
    assert code(undisturbed) == "FG431"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    assert code(replace(undisturbed, folder=tmp_path / "other")) == "FG431"
    assert code(replace(undisturbed, folder=tmp_path / "none", resume=True)) == "FG413"
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "transfer").symlink_to(outside)
    assert code(replace(undisturbed, folder=tmp_path / "linked", force=True)) == "FG421"
    assert not list(outside.iterdir())


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "changed",
    [
        {"form": Form(near=4, far_dim=2)},
        {"patterns": ("layers.0",)},
        {"adapters": None},
        {"tuning": options(learning_rate=2e-3)},
    ],
    ids=["width", "pattern", "adapters", "rate"],
)
def test_another_conversion_is_not_resumed(changed: dict[str, Any], undisturbed: Request) -> None:
    assert code(replace(undisturbed, resume=True, **changed)) == "FG414"


def test_other_weights_are_not_resumed(undisturbed: Request, tmp_path: Path) -> None:
    weights = load_file(undisturbed.weights)
    save_file({name: value * 1.01 for name, value in weights.items()}, tmp_path / "other.safetensors")
    assert code(replace(undisturbed, resume=True, weights=tmp_path / "other.safetensors")) == "FG414"


def test_a_damaged_record_is_a_diagnostic(undisturbed: Request, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "conversion.json").write_text("{}")
    assert code(replace(undisturbed, folder=tmp_path / "out", resume=True)) == "FG430"


def test_wrong_inputs(tmp_path: Path) -> None:
    asked = request(tmp_path)
    assert code(replace(asked, weights=tmp_path / "text.txt")) == "FG418"
    assert code(replace(asked, data=tmp_path / "nothing.txt")) == "FG411"
    short = tmp_path / "short.txt"
    short.write_text("short")
    assert code(replace(asked, data=short)) == "FG412"
    assert code(replace(asked, tuning=options(tokens=5000))) == "FG415"
    assert not asked.folder.exists()


def test_wrong_inputs_of_an_encoder(tmp_path: Path) -> None:
    asked = request(tmp_path, ENCODER)
    assert code(replace(asked, data=encoder_texts(tmp_path, 5))) == "FG412"
    assert code(replace(asked, tuning=options(tokens=97))) == "FG415"


def test_a_model_of_neither_kind(tmp_path: Path) -> None:
    spec = "use std\ndim b\ndim n\nmodel m(x: float[b, n, 8]) -> float[b, n, 8] {\n"
    asked = request(tmp_path, f"{spec} return std.attention(x; heads = 2)\n}}\n")
    assert code(asked) == "FG415"


@pytest.mark.medium
def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    asked = request(tmp_path)
    weights = load_file(asked.weights)
    weights["table"][0] = torch.nan
    save_file(weights, asked.weights)
    assert code(replace(asked, data=_text_with_zeros(tmp_path))) == "FG433"
    assert (
        code(replace(request(tmp_path), tuning=options(learning_rate=1e30, clip=1e30), force=True)) == "FG433"
    )


def _text_with_zeros(folder: Path) -> Path:
    path = folder / "zeros.txt"
    path.write_bytes(bytes(2000))
    return path


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastgrad_dsl.commands import cli

    asked = request(tmp_path)
    line = f"convert {tmp_path}/model.tfg --weights {asked.weights} --data {asked.data} -o {tmp_path}/out"
    line += (
        " --target torch --seq 48 --batch 2 --near 4 --far-dim 4 --transfer-steps 3 --steps 2 --tuning-seq 96"
    )
    line += f" --json {tmp_path}/report.json"
    monkeypatch.setattr("sys.argv", ["fastgrad", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "2 attentions converted: near field in blocks of 4, maps of width 4" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads((tmp_path / "out" / "conversion.json").read_text())
    row = report["measured"][0]
    assert f"{row['original']:.4f}" in said
    assert f"{row['tuned']:.4f}" in said


def test_the_names_of_the_package_are_what_they_say() -> None:
    from fastgrad_dsl import conversion

    for name in conversion.__all__:
        assert getattr(conversion, name) is getattr(conversion, name)
        assert callable(getattr(conversion, name))
