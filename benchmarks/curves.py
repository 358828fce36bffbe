"""Training curves of the planned and of the exact model on the same data and seed, and the plan before and after."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastgrad_dsl as fg
from benchmarks.budget import TEXT, demo_spec
from benchmarks.settings import Settings, heading, say
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.calibration.replan import Request, replan
from fastgrad_dsl.models.text_data import TextData, load_text
from fastgrad_dsl.training.log import Event
from fastgrad_dsl.training.loop import Options, train

STEPS, TOKENS, EVERY = 300, 2048, 25
RATE = 2e-3  # the demonstration's
HELD_OUT = 8  # batches
BUDGETS = {  # limits of output and gradient; the first are the file's
    "planned": (0.1, 0.25),
    "planned tightly": (0.02, 0.05),
    "planned very tightly": (0.002, 0.005),
}
CHANCE = 1e-6  # by which the initial weights of a second exact run are moved, relatively: what chance does to a loss


def measure(settings: Settings) -> dict[str, object]:
    """The section `curves`."""
    steps, tokens = (4, 64) if settings.quick else (STEPS, TOKENS)
    options = Options(
        steps=steps, tokens=tokens, validate_every=2 if settings.quick else EVERY, checkpoint_every=steps,
        validation_batches=HELD_OUT, learning_rate=RATE, seed=0,
    )  # fmt: skip
    data = load_text(TEXT, tokens)
    curves, plans = {}, {}
    for name, (output, gradient) in BUDGETS.items():
        spec = demo_spec().replace("output <= 0.1", f"output <= {output}")
        compiled = fg.compile(
            spec.replace("gradient <= 0.25", f"gradient <= {gradient}"), target=settings.target
        )
        say(f"{name}: the plan at initial weights")
        planned = _planned(compiled, compiled.module(seed=0), data, tokens)
        model = planned.adopt(compiled.module(seed=0))
        curves[name] = _curve(name, planned, model, data, options)
        say(f"{name}: the plan at trained weights")
        again = _planned(compiled, model, data, tokens)
        plans[name] = {"initial": _summary(planned), "trained": _summary(again)}
    compiled = fg.compile(demo_spec(), target=settings.target)
    for name, moved in (("exact", 0.0), ("exact again", CHANCE)):
        model = compiled.module(seed=0)
        curves[name] = _curve(name, compiled, compiled.reference(_moved(model, moved)), data, options)
    sizes = {"steps": steps, "tokens": tokens}
    return {**heading(settings), **sizes, "budgets": BUDGETS, "curves": curves, "plans": plans}


def _moved(model: nn.Module, share: float) -> nn.Module:
    """A model with its weights times 1 + share times normal numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + share * torch.randn(parameter.shape, generator=generator))
    return model


def _planned(compiled: Compiled, model: nn.Module, data: TextData, tokens: int) -> Compiled:
    generator = torch.Generator().manual_seed(1)
    batches = [data.batch(tokens, 1, generator) for _ in range(2)]
    return replan(compiled, Request(model, [*batches, *data.validation_batches(tokens, 1, 1)]))


def _curve(
    name: str, compiled: Compiled, model: nn.Module, data: TextData, options: Options
) -> dict[str, object]:
    """Points of step, training loss and, where it was measured, validation loss in nats per byte; seconds in all."""
    assert compiled.loss is not None
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        for event in train(model, compiled.loss, data, options, Path(folder)):
            events.append(event)
            if event.validation_loss is not None:
                say(f"{name}: step {event.step}, validation loss {event.validation_loss:.4f}")
    return {"points": [_point(event) for event in events], "seconds": round(events[-1].seconds, 1)}


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
