"""The tasks of benchmarks/quality have the answers that they ask for, and runs go on where they were cut off."""

from __future__ import annotations

import json
import math
from math import inf
from pathlib import Path

import pytest
import torch

from benchmarks.quality import page, run
from benchmarks.quality.forms import FORMS, NAMES, layers, text
from benchmarks.quality.run import QUICK, SETTINGS, measure, measured, rate_at, runs, task_at
from benchmarks.quality.tasks import IGNORED, STATES, Task, chains, oracle_loss

GENERATOR = torch.Generator


def batch(task: Task, count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    return task.batch(count, GENERATOR().manual_seed(1))


def test_recall_asks_once_for_each_pair() -> None:
    tokens, targets = batch(Task("recall", 64, 8, 40))
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[:16:2], row[1:16:2], strict=True))
        assert len(pairs) == 8
        assert all(1 <= key < 20 <= value for key, value in pairs.items())
        asked = {token: value for token, value in zip(row, wanted, strict=True) if value != IGNORED}
        assert asked == pairs
        assert all(token == 0 for token, value in zip(row[16:], wanted[16:], strict=True) if value == IGNORED)
    with pytest.raises(ValueError, match="need 64 tokens"):
        batch(Task("recall", 60, 16, 64))


def test_copying_repeats_the_text_after_a_sign() -> None:
    tokens, targets = batch(Task("copying", 30, 5, 9))
    assert (tokens[:, 25] == 1).all()
    assert torch.equal(targets[:, 25:], tokens[:, :5])
    assert (targets[:, :25] == IGNORED).all()


def test_needle_asks_for_what_followed_the_sign() -> None:
    tokens, targets = batch(Task("needle", 30, 0, 9))
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert row.count(1) == 2
        assert row[-1] == 1
        assert wanted[-1] == row[row.index(1) + 1]
        assert set(wanted[:-1]) == {IGNORED}


def test_chains_and_what_can_be_known_of_them() -> None:
    tokens, targets = batch(Task("markov", 400, 0, STATES), 60)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    rows = chains(60, GENERATOR().manual_seed(1))
    assert torch.allclose(rows.sum(-1), torch.ones(60, STATES, dtype=torch.float64))
    entropy = -(rows * rows.log()).sum(-1).mean()
    learned, unknown = oracle_loss(tokens, targets), oracle_loss(tokens[:, :1], targets[:, :1])
    assert unknown == pytest.approx(math.log(STATES), abs=1e-6)
    assert float(entropy) < learned < unknown


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 100, 1.0) for step in range(100)]
    assert max(rates) == rates[9] == 1.0
    assert rates[0] == 0.1
    assert rates[-1] < 1e-3


def test_state_bytes() -> None:
    assert FORMS["softmax"].state_bytes(100, 2, 64, 16) == 4 * 2 * 100 * 64
    assert FORMS["window of 32, short convolution"].state_bytes(100, 2, 64, 16) == 4 * 2 * 32 * 64
    assert FORMS["1 + s + s^2/2, near"].state_bytes(100, 2, 64, 16) == 4 * 2 * (153 * 33 + 32 * 48)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("form", NAMES)
def test_forms_are_models(form: str) -> None:
    import fastgrad_dsl as fg

    spec = text(layers(form, 2), vocabulary=16, width=8, heads=1, near=2, longest=65_536)
    logits = fg.compile(spec, target="torch").module(seed=0)(torch.ones(1, 5, dtype=torch.int64))
    assert logits.shape == (1, 5, 16)


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, float]] = []

    def fake(setting: object, form: str, rate: float, seed: int) -> dict[str, object]:
        trained.append((form, rate))
        tests = [{"n": 32, "loss": 1.0, "accuracy": rate}]
        return {"seconds": 1.0, "state_bytes": 1024, "tests": tests, "curve": [(2, 1.0, 1.0)]}

    monkeypatch.setattr(run, "measured", fake)
    file, task = tmp_path / "quality.json", "recall of 16 pairs"
    measure(file, QUICK, runs([task], ["softmax"], 1), -inf)
    assert not file.exists()
    measure(file, QUICK, runs([task], ["softmax"], 1), inf)
    measure(file, QUICK, runs([task], ["softmax", "mixer"], 1), inf)
    assert trained == [(form, rate) for form in ("softmax", "mixer") for rate in run.RATES]
    document = json.loads(file.read_text())
    found = page.render(document)
    assert "| softmax | 0.010 | 0.01 | 1 | 1 KB | 1 s |" in found[page.PAGE]  # the best of three rates
    assert "<svg" in found[page.FIGURE]


def test_losses_of_text_are_drawn_against_seconds(tmp_path: Path) -> None:
    runs_ = [
        {
            "task": "language of 2,048 bytes",
            "form": form,
            "rate": 0.003,
            "seed": seed,
            "processor": "another" if form == "window" else "this one",
            "seconds": 9.0,
            "state_bytes": 2048,
            "tests": [
                {
                    "n": 2048,
                    "loss": loss + 0.02 * seed,
                    "accuracy": 0.5,
                    "quarters": [3.0, 2.5, 2.5, loss - 0.1],
                }
            ],
            "curve": [[1, 1.0, 4.0], [2, 5.0, 3.0], [3, 9.0, loss]],
        }
        for form, loss in (("softmax", 2.2), ("mixer", 2.1), ("window", 2.3))
        for seed in (0, 1)
    ]
    found = page.render({"runs": runs_})
    assert (
        "| mixer | 2.110 ± 0.010 | 2.000 ± 0.000 | 1.000 ± 0.000 | 0.003 | 2 | 2 KB | 9 s |"
        in found[page.PAGE]
    )
    assert "(quality-language-2048.svg)" in found[page.PAGE]
    assert "mixer 2.100 after 9 s" in found["docs/quality-language-2048.svg"]
    assert "window" not in found["docs/quality-language-2048.svg"]  # its seconds are of another processor
    said = " ".join(found[page.PAGE].split())
    assert "Trained on this one (*softmax*, *mixer*); another (*window*)." in said


@pytest.mark.slow
def test_the_mixer_recalls() -> None:
    """32 pairs, 600 steps: about a minute of one processor. A far field that can only average recalls a twentieth."""
    setting = SETTINGS["recall of 32 pairs"]
    assert measured(setting, "mixer", 5e-3, seed=0)["tests"][0]["accuracy"] > 0.95


def test_training_in_stages_ends_with_the_task_itself() -> None:
    setting = SETTINGS["recall of 64 pairs"]
    sizes = [(task.n, task.size) for task in (task_at(step, setting) for step in range(setting.steps))]
    third = setting.steps // 3
    assert sizes == [(128, 16)] * third + [(256, 32)] * third + [(512, 64)] * third
    assert task_at(0, SETTINGS["chains"]) == SETTINGS["chains"].task
