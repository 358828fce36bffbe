"""The budget while a model trains: states, a new plan in time, and the same weights after it."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import nn

import fastgrad_dsl as fg
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.calibration.calibrate import MARGIN
from fastgrad_dsl.calibration.replan import Request, replan
from fastgrad_dsl.documents.plan import Budget
from fastgrad_dsl.models.text_data import load_text
from fastgrad_dsl.training.budget_watch import CLOSE, BudgetState, BudgetWatch
from fastgrad_dsl.training.loop import Options, train
from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from tests.dsl.models import always_polynomial

LIMITS = Budget(output=0.05, gradient=0.1, memory=None, near=None, trust="calibrated", on_violation="warn")
SPEC = """use std
dim b
dim n <= 65536
model tiny(tokens: int[b, n]) -> float[b, n, 256] {
    weight table: float[256, 16] = normal(std = 0.5)
    x = embedding(table, tokens)
    repeat i in 2 {
        x = x + std.attention(std.rms_norm(x); heads = 2, qk_dim = 2, causal = true) as layers
    }
    return std.rms_norm(x) @ table.T
}
objective loss(logits: float[b, n, 256], targets: int[b, n]) = cross_entropy(logits, targets)
budget {
    output <= 0.05
    gradient <= 0.1
}
"""


CERTIFIED = """use std
dim b
dim n <= 65536
model certified(tokens: int[b, n]) -> float[b, n, 256] {
    weight table: float[256, 16] = normal(std = 0.5)
    weight wq: float[16, 4] = normal(std = 0.1)
    weight wk: float[16, 4] = normal(std = 0.1)
    x = embedding(table, tokens)
    h = std.rms_norm(x)
    s = split_heads(h @ wq, 2) @ split_heads(h @ wk, 2).T
    return (x + merge_heads(softmax(causal(s)) @ split_heads(h, 2))) @ table.T
}
objective loss(logits: float[b, n, 256], targets: int[b, n]) = cross_entropy(logits, targets)
budget {
    output <= 0.05
    gradient <= 0.1
    trust = certified
}
"""


@cache
def _batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(256, (1, 65), generator=generator) for _ in range(3)]
    return [(each[:, :-1], each[:, 1:]) for each in tokens]


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return _batches()


def _again(compiled: Compiled, model: nn.Module) -> Compiled:
    return replan(compiled, Request(model, _batches(), measured_pace=False))


@cache
def _planned(spec: str) -> tuple[Compiled, Compiled]:
    """A model as the file has it, and with the plan of its first weights."""
    compiled = fg.compile(spec, target="torch")
    return compiled, _again(compiled, compiled.module(seed=0))


def _watch(
    batches: list[tuple[torch.Tensor, torch.Tensor]], lines: list[str], spec: str = SPEC
) -> tuple[BudgetWatch, nn.Module]:
    compiled, planned = _planned(spec)
    watch = BudgetWatch(compiled, batches[-1], _again, lines.append)
    watch.compiled = planned
    return watch, planned.adopt(compiled.module(seed=0))


@pytest.mark.medium
def test_a_quiet_budget_keeps_its_plan(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    lines: list[str] = []
    watch, model = _watch(batches, lines)
    assert any(entry.node.op == "poly_attention" for entry in watch.compiled.plan)
    before = watch.compiled
    state, same = watch.look(model)
    assert same is model
    assert watch.compiled is before
    assert state.output is not None
    assert 0 < state.output <= 0.05
    assert state.gradient is not None
    assert 0 < state.gradient <= 0.1
    assert "(measured on one batch of 64 tokens, held out)" in lines[0]


@pytest.mark.medium
def test_growing_logits_bring_a_new_plan(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Queries grow until the measured error or a range is close: the watch plans anew with the very same weights."""
    lines: list[str] = []
    watch, model = _watch(batches, lines)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("wq"):
                parameter.mul_(2.0)
    before = watch.compiled
    state, changed = watch.look(model)
    assert state.share(LIMITS) >= CLOSE or state.violations
    assert watch.compiled is not before
    assert changed is not model
    assert dict(changed.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for name, parameter in changed.named_parameters():
        assert parameter is dict(model.named_parameters())[name]
    assert "planned anew" in lines[-1]
    after, same = watch.look(changed)
    assert same is changed
    assert after.output is not None
    assert after.output <= 0.05
    assert not after.violations


@pytest.mark.medium
def test_a_range_proved_from_weights_is_watched_as_they_grow(
    batches: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """What is proved of the present weights counts, not what the logits of a batch happen to take."""
    lines: list[str] = []
    watch, model = _watch(batches, lines, CERTIFIED)
    (entry,) = watch.compiled.plan_document["attentions"]
    assert (entry["range_source"], entry["decision"]) == ("weights", "polynomial")
    quiet, _ = watch.look(model)
    assert quiet.where == entry["path"]
    assert quiet.range == pytest.approx(1 / MARGIN, abs=0.01)
    with torch.no_grad():
        dict(model.named_parameters())["wq"].mul_(1.2)
    state, _ = watch.look(model)
    assert state.range == pytest.approx(1.2 / MARGIN, abs=0.01)


@pytest.mark.medium
def test_a_verdict_of_exact_outlives_a_look(
    batches: list[tuple[torch.Tensor, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On devices that are not waited for, `exact` acts from a later call on: a look takes the counts alone."""
    spec = SPEC.replace("gradient <= 0.1", "gradient <= 0.1\n    on_violation = exact")
    watch, below = _watch(batches, [], spec)
    model = always_polynomial(watch.compiled, below)
    guard = sys.modules[f"{type(model).__module__.rpartition('.')[0]}.guard"]
    monkeypatch.setattr(guard, "_waits", lambda device: False)
    monkeypatch.setattr(watch, "again", _refused)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("wq"):
                parameter.mul_(4.0)
    tokens = batches[0][0]
    polynomial, exact = model(tokens), model(tokens)
    assert not torch.equal(polynomial, exact)
    watch.look(model)
    assert watch.states[-1].violations
    assert torch.equal(model(tokens), exact)


def _refused(compiled: Compiled, model: nn.Module) -> Compiled:
    raise TfgError([Diagnostic("FG312", "no plan keeps the budget")])


def test_shares() -> None:
    state = BudgetState(0.04, 0.02, 2048, 0.5, "layers.0.attend", 0)
    assert state.share(LIMITS) == pytest.approx(0.8)
    assert state.share(None) == 0.5
    line = state.line(replace(LIMITS, gradient=None))
    assert "(measured on one batch of 2,048 tokens, held out); logits at 50 % of R in layers.0.attend" in line
    assert "3 calls beyond" in BudgetState(0.0, 0.0, 2048, None, None, 3).line(None)


def test_training_goes_on_with_the_new_plan(
    tmp_path: Path, batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """A new module in the loop shares its parameters with the optimiser, and the log has the state."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 8)
    lines: list[str] = []
    watch, model = _watch(batches, lines)
    watched: list[nn.Module] = []

    def always(compiled: Compiled, module: nn.Module) -> Compiled:
        watched.append(module)
        return compiled

    watch.again = always
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("wq"):
                parameter.mul_(4.0)
    options = Options(steps=4, tokens=64, validate_every=2, checkpoint_every=4, validation_batches=1)
    loss = watch.compiled.loss
    assert loss is not None
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    events = list(train(model, loss, load_text(text, 64), options, tmp_path / "run", watch=watch))
    states = [event.budget for event in events if event.budget is not None]
    assert len(states) == 2
    assert len(watched) == 2
    assert watched[1] is not watched[0]
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert '"budget": {"output"' in (tmp_path / "run" / "log.jsonl").read_text()
