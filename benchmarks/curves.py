"""Training small models with planned and with exact attention, from many seeds: which differences are not chance."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastgrad_dsl as fg
from benchmarks.budget import TEXT, demo_spec
from benchmarks.curves_causes import CAUSES, local_errors
from benchmarks.settings import Settings, heading, say
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.commands.terminal import progress
from fastgrad_dsl.models.text_data import TextData, load_text
from fastgrad_dsl.training.budget_watch import BudgetWatch
from fastgrad_dsl.training.log import Event
from fastgrad_dsl.training.loop import Options, train
from fastgrad_dsl.training.plan import SCORES, TextPlanner
from fastgrad_dsl.training.stopping import Stop

MODEL = {"depth": 2, "d_model": 128, "heads": 4}
SEEDS, STEPS, TOKENS, EVERY = 6, 200, 1024, 20
RATE = 2e-3  # the demonstration's
HELD_OUT = 16  # batches
PLANNED = {"planned": None, "planned for training": SCORES}  # limits of scores; the last is the default
CHANCE = 1e-2  # by which the initial weights of second runs are moved, relatively: what chance does to a loss


def measure(settings: Settings) -> dict[str, object]:
    """The section `curves`: final losses by run and seed, and what the first seed's runs were like."""
    seeds, steps, tokens = (2, 4, 192) if settings.quick else (SEEDS, STEPS, TOKENS)
    compiled = fg.compile(demo_spec(), params=MODEL, target=settings.target)
    options = Options(
        steps=steps, tokens=tokens, validate_every=2 if settings.quick else EVERY, checkpoint_every=steps,
        validation_batches=HELD_OUT, learning_rate=RATE,
    )  # fmt: skip
    data = load_text(TEXT, tokens)
    local = local_errors(compiled, [data.batch(tokens, 1, torch.Generator().manual_seed(0))])
    curves: dict[str, object] = {}
    plans: dict[str, object] = {}
    losses: dict[str, list[float]] = {}
    for seed in range(seeds):
        say(f"seed {seed}")
        runs = _Runs(compiled, data, replace(options, seed=seed))
        planned = {name: runs.planned(name, scores) for name, scores in PLANNED.items()}
        found = {name: curve for name, (curve, _) in planned.items()}
        found |= {"exact": runs.exact(), "exact again": runs.exact(CHANCE)}
        if seed == 0:
            curves, plans = {**found}, {name: plan for name, (_, plan) in planned.items()}
        found |= {name: runs.curve(name, cause.model(MODEL, seed)) for name, cause in CAUSES.items()}
        for name, curve in found.items():
            losses.setdefault(name, []).append(curve["points"][-1]["validation_loss"])
    limits = compiled.plan_document.budget
    budget = {"output": limits.output, "gradient": limits.gradient} if limits else {}
    told = {
        "model": MODEL,
        "steps": steps,
        "tokens": tokens,
        "budget": budget,
        "scores": SCORES,
        "chance": CHANCE,
    }
    measured = {"losses": losses, "local": local, "curves": curves, "plans": plans}
    return {**heading(settings), **told, **measured}


class _Runs:
    """Training runs of one model on the same data and from the same initial weights."""

    def __init__(self, compiled: Compiled, data: TextData, options: Options) -> None:
        self.compiled, self.data, self.options = compiled, data, options

    def planned(self, name: str, scores: float | None) -> tuple[dict[str, Any], dict[str, object]]:
        """The curve of `fastgrad train --calibrate` with a limit of scores; plans at initial and trained weights."""
        say(f"{name}: the plan at initial weights")
        planner = TextPlanner(self.data, self.options, Stop(), progress, scores=scores)
        model = self.compiled.module(seed=self.options.seed)
        planned = planner(self.compiled, model)
        watch = BudgetWatch(planned, planner.held_out, planner, say)
        model = planned.adopt(model)
        curve = self.curve(name, model, watch)
        again = planner(self.compiled, model)
        return curve, {"initial": _summary(planned), "trained": _summary(again)}

    def exact(self, moved: float = 0.0) -> dict[str, Any]:
        """The curve of the exact model, from weights times 1 + moved times normal numbers."""
        model = _moved(self.compiled.module(seed=self.options.seed), moved)
        return self.curve("exact again" if moved else "exact", self.compiled.reference(model))

    def curve(self, name: str, model: nn.Module, watch: BudgetWatch | None = None) -> dict[str, Any]:
        """Points of step, training loss and, where measured, validation loss in nats per byte; seconds in all."""
        assert self.compiled.loss is not None
        events: list[Event] = []
        with tempfile.TemporaryDirectory() as folder:
            for event in train(model, self.compiled.loss, self.data, self.options, Path(folder), watch=watch):
                events.append(event)
                if event.validation_loss is not None:
                    say(f"{name}: step {event.step}, validation loss {event.validation_loss:.4f}")
        return {"points": [_point(event) for event in events], "seconds": round(events[-1].seconds, 1)}


def _moved(model: nn.Module, share: float) -> nn.Module:
    """A model with its weights times 1 + share times normal numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + share * torch.randn(parameter.shape, generator=generator))
    return model


def _point(event: Event) -> dict[str, float]:
    values = {"step": event.step, "loss": event.loss, "validation_loss": event.validation_loss}
    return {key: round(value, 5) for key, value in values.items() if value is not None}


def _summary(planned: Compiled) -> list[dict[str, Any]]:
    """Of each attention: what serves it, R and where that comes from, measured extremes of the logits, gains."""
    assert planned.calibration is not None
    found = []
    for each in planned.calibration["attentions"]:
        chosen: Mapping[str, Any] = next(c for c in each["candidates"] if c["chosen"])
        seen = max(max(abs(head["least"]), abs(head["largest"])) for head in each["heads"])
        gains = {what: gain and round(gain["value"], 4) for what, gain in each["gains"].items()}
        known = {"path": each["path"], "chosen": chosen["name"], "bound": chosen["bound"]}
        errors = {what: chosen[what] for what in ("output", "gradient")}
        found.append({**known, "seen": seen, "gains": gains, **errors})
    return found
