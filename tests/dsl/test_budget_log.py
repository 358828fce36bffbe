"""The budget's records: when they come, what they carry, and what the two handlers write."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fastgrad_dsl as fg
from fastgrad_compiler.runtime.guard import Guard, budget_status, name_guards
from fastgrad_compiler.runtime.logit_range import Pairs, rows_of

PAIRS = Pairs(1.0, False, 0)
LOGGER = logging.getLogger("fastgrad.budget")


class Model(nn.Module):
    """Two guards, as a generated model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.y_guard = Guard("y", bound=2.0, source="data")
        self.z_guard = [Guard("z", bound=(1.0, 4.0), source="asserted", policy="exact")]
        name_guards(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.expand(1, 2, 3, 4)
        for guard in (self.y_guard, *self.z_guard):
            guard.allows(rows_of(q, q, None, None), PAIRS)
        return x

    def budget_status(self, reset: bool = False) -> list[dict[str, object]]:
        return budget_status(self, reset)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    handlers, level = list(LOGGER.handlers), LOGGER.level
    yield
    for handler in set(LOGGER.handlers) - set(handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.setLevel(level)


def test_every_second_pass_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    handle = fg.log_budget(model, every=2)
    for _ in range(5):
        model(torch.full((4,), 0.5))
    records = [record for record in caplog.records if record.levelno == logging.INFO]
    assert [vars(record)["step"] for record in records] == [2, 4]
    assert [[one["calls"] for one in vars(record)["budget"]] for record in records] == [[2, 2], [4, 4]]
    assert [one["path"] for one in vars(records[0])["budget"]] == ["y", "z.0"]
    assert records[0].getMessage() == "2 guarded attentions, no logit seen beyond its range"
    handle.remove()
    model(torch.zeros(4))
    model(torch.zeros(4))
    assert len([record for record in caplog.records if record.levelno == logging.INFO]) == 2


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "budget.jsonl"
    LOGGER.addHandler(fg.JsonLinesHandler(path))
    model = Model()
    fg.log_budget(model)
    model(torch.full((4,), 0.5))
    model(torch.tensor([0.9, 0.9, torch.nan, 0.0]))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    states = [row for row in rows if "step" in row]
    said = [row for row in rows if "message" in row]
    assert [(row["step"], row["path"], row["violations"]) for row in states] == [
        (1, "y", 0), (1, "z.0", 0), (2, "y", 1), (2, "z.0", 1)
    ]  # fmt: skip
    assert states[0]["largest"] == 1.0
    assert states[3]["largest"] is None
    assert [row["level"] for row in said] == ["WARNING", "WARNING"]
    assert "z.0: a logit of size nan" in said[1]["message"]
    assert all(isinstance(row["time"], float) for row in rows)


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    handler = fg.TensorBoardHandler(tmp_path)
    LOGGER.addHandler(handler)
    model = Model()
    fg.log_budget(model)
    for size in (0.5, 1.0):
        model(torch.full((4,), size))
    LOGGER.removeHandler(handler)
    handler.close()
    written = accumulator.EventAccumulator(str(tmp_path))
    written.Reload()
    assert [(event.step, event.value) for event in written.Scalars("z.0/share")] == [(1, 1.0), (2, 4.0)]
    assert [event.value for event in written.Scalars("y/largest")] == [1.0, 4.0]
    assert [event.value for event in written.Scalars("y/violations")] == [0.0, 1.0]


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'fastgrad-dsl\[tensorboard\]'"):
        fg.TensorBoardHandler(tmp_path)


def test_what_cannot_be_logged() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        fg.log_budget(Model(), every=0)
    with pytest.raises(TypeError, match="Linear has no budget_status"):
        fg.log_budget(nn.Linear(1, 1))


def test_unsettled_calls_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Norms beyond R in a long call where no logit that was seen is: the record does not say that all is well."""
    model = Model()
    fg.log_budget(model)
    guard = Guard("w", bound=3.0, source="data")
    model.z_guard.append(guard)
    q, k = (
        torch.eye(40, dtype=torch.float64)[None, None].mul(2.0).expand(1, 2, 40, 40).split(20, 2)
    )  # orthogonal, with norms of 2
    guard.allows(rows_of(q, k, None, None), PAIRS)
    model(torch.zeros(4))
    assert guard.status()["violations"] == 0
    assert guard.status()["unsettled"] == 1
    assert caplog.records[-1].getMessage().endswith(", no logit seen beyond its range, 1 calls unsettled")
