"""Training on bytes: data, schedule, log, checkpoints, resuming, sampling."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fastgrad_dsl.commands.train import show
from fastgrad_dsl.generation.rerun import rerun
from fastgrad_dsl.generation.sampling import Sampling
from fastgrad_dsl.models.text_data import TextData, load_text
from fastgrad_dsl.training.folder import CHECKPOINT, LOG
from fastgrad_dsl.training.log import Event
from fastgrad_dsl.training.loop import Options, learning_rate, train
from fastgrad_grammar.diagnostics import TfgError
from tests.dsl.training_model import TEXT, Bigram, loss


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return load_text(path, 16)


OPTIONS = Options(steps=12, tokens=16, batch=2, warmup=2, validate_every=5, checkpoint_every=4)


def test_a_tenth_of_the_text_is_held_out(data: TextData) -> None:
    assert bytes(data.train.tolist()) + bytes(data.validation.tolist()) == TEXT
    assert data.validation.numel() == len(TEXT) // 10


def test_targets_are_the_next_bytes(data: TextData) -> None:
    inputs, targets = data.batch(16, 3, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (3, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    first, following = next(data.validation_batches(16, 2, 1))
    assert torch.equal(first.flatten(), data.validation[:32].long())
    assert torch.equal(following.flatten(), data.validation[1:33].long())


def test_a_text_that_is_missing_or_too_short_is_a_diagnostic(tmp_path: Path) -> None:
    with pytest.raises(TfgError) as missing:
        load_text(tmp_path / "none.txt", 16)
    assert missing.value.diagnostics[0].code == "FG411"
    for content in (b"", b"short", b"x" * 169):
        (tmp_path / "short.txt").write_bytes(content)
        with pytest.raises(TfgError) as short:
            load_text(tmp_path / "short.txt", 16)
        assert short.value.diagnostics[0].code == "FG412"
    (tmp_path / "enough.txt").write_bytes(b"x" * 171)
    assert load_text(tmp_path / "enough.txt", 16).validation.numel() == 17


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(OPTIONS, step, step / 12) for step in range(13)]
    assert rates[0] == pytest.approx(0.5e-3, rel=1e-6)
    assert max(rates) == rates[1]
    assert rates[12] == pytest.approx(1e-4)


def test_training_lowers_the_loss_and_logs_every_step(data: TextData, tmp_path: Path) -> None:
    options = Options(
        steps=60, tokens=16, batch=8, learning_rate=0.05, validate_every=30, checkpoint_every=60
    )
    events = list(train(Bigram(), loss, data, options, tmp_path / "run"))
    validations = [event.validation_loss for event in events if event.validation_loss is not None]
    assert len(validations) == 2
    assert validations[-1] < validations[0] < 5.6
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 61))
    assert lines[-1]["validation_loss"] == validations[-1]


def test_a_resumed_run_continues_bit_for_bit(data: TextData, tmp_path: Path) -> None:
    whole = Bigram()
    whole_log = [e.loss for e in train(whole, loss, data, OPTIONS, tmp_path / "whole")]
    stopped = train(Bigram(), loss, data, OPTIONS, tmp_path / "broken")
    for event in stopped:  # killed after step 6: the checkpoint is that of step 4
        if event.step == 6:
            break
    stopped.close()
    with (tmp_path / "broken" / LOG).open("a") as file:
        file.write('{"step": 7, "lo')
    torch.manual_seed(99)  # whatever another process does with its generator
    resumed = Bigram()
    log = [e.loss for e in train(resumed, loss, data, OPTIONS, tmp_path / "broken", resume=True)]
    assert log == whole_log[-len(log) :]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / LOG).read_text().splitlines()]
    assert steps == sorted(steps)
    assert [json.loads(line)["step"] for line in (tmp_path / "whole" / LOG).read_text().splitlines()] == steps


def test_resuming_needs_a_checkpoint_of_the_same_run(data: TextData, tmp_path: Path) -> None:
    with pytest.raises(TfgError) as missing:
        next(train(Bigram(), loss, data, OPTIONS, tmp_path / "new", resume=True))
    assert missing.value.diagnostics[0].code == "FG413"
    list(train(Bigram(), loss, data, OPTIONS, tmp_path / "run"))
    other, longer = replace(OPTIONS, warmup=3), replace(OPTIONS, steps=13)
    with pytest.raises(TfgError) as changed:
        next(train(Bigram(), loss, data, other, tmp_path / "run", resume=True))
    assert "warmup was 2, is 3" in changed.value.diagnostics[0].message
    with pytest.raises(TfgError) as foreign:
        next(train(nn.Linear(2, 2), loss, data, longer, tmp_path / "run", resume=True))
    assert foreign.value.diagnostics[0].code == "FG414"
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"not safetensors")
    with pytest.raises(TfgError) as broken:
        next(train(Bigram(), loss, data, OPTIONS, tmp_path / "run", resume=True))
    assert broken.value.diagnostics[0].code == "FG413"


class Counter(nn.Module):
    """Always sure that the next byte is one more than the last; refuses lengths that are no multiple of 4."""

    training = False

    def forward(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[1] % 4 == 0
        assert tokens.shape[1] <= 8
        return 100.0 * nn.functional.one_hot((tokens + 1) % 256, 256).float()


def test_sampling_continues_the_prompt_within_the_window() -> None:
    written = rerun(Counter(), b"abc", 12, Sampling(), window=8, multiple=4, size=256)
    assert bytes(written) == b"defghijklmno"


def test_the_bar_of_a_run_with_a_limit_of_time() -> None:
    """It fills with the seconds, since nobody knows how many steps there will be."""
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=True, width=60, legacy_windows=False, color_system=None)

    def events() -> Generator[Event, None, None]:
        yield Event(step=1, seconds=5.0, loss=5.0)
        yield Event(step=2, seconds=10.0, loss=4.0)

    show(console, events(), Options(seconds=10.0), lambda event: f"line of {event.step}")
    assert re.search(r"step 2 ━+ loss 4\.0000 0:00:00", printed.getvalue()), printed.getvalue()
    assert "/?" not in printed.getvalue()
    assert "line of 1" in printed.getvalue()
