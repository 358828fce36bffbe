"""What budgets cost: calibration, planning, guards; and the planned model beside every single degree."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastgrad_dsl as fg
from benchmarks.settings import ROOT, Settings, heading, say
from fastgrad_compiler.approximation.polynomial import FAMILIES
from fastgrad_compiler.pipeline import run
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.api.loader import package_from_texts
from fastgrad_dsl.calibration.calibrate import calibrate
from fastgrad_dsl.calibration.capture import Subject
from fastgrad_dsl.calibration.pace import default_pace, machine_pace
from fastgrad_dsl.calibration.plan import decisions, make_plan
from fastgrad_dsl.calibration.replan import Request, replan
from fastgrad_dsl.documents.calibration import Limits, UsedCalibration
from fastgrad_dsl.documents.plan import approximated_of
from fastgrad_dsl.models.batches import model_inputs, random_batch, target_inputs
from fastgrad_dsl.models.measure import whole_errors
from fastgrad_dsl.models.text_data import load_text

SPEC, TEXT = ROOT / "examples" / "bounded.tfg", ROOT / "examples" / "data" / "emma.txt"
PIN = re.compile(r'    at "\*" degree = 2\n')
CALIBRATED, MEASURED = 2048, 4096  # tokens of a sequence: to calibrate on, and of the demonstration's step
LARGE = {"depth": 24, "d_model": 256, "heads": 16}
HAND_PICKED = (1, 2, 3)
GUARD_REPEATS = 5  # times the usual ones: a share of some percent is to be seen

Batch = tuple[Tensor, Tensor]


def demo_spec(rules: str = "", gain: str = "gain = 1.0") -> str:
    """The demonstration's model without its pinned degree, with other rules of the budget or another gain."""
    text, pins = PIN.subn(rules and f"    {rules}\n", SPEC.read_text(encoding="utf-8"))
    if pins != 1:
        raise ValueError(f"{SPEC} pins its degree in another way")
    return text.replace("gain = 1.0", gain)


def measure(settings: Settings) -> dict[str, object]:
    """The section `budget`."""
    calibrated, measured = (128, 128) if settings.quick else (CALIBRATED, MEASURED)
    text = load_text(TEXT, measured)
    generator = torch.Generator().manual_seed(0)
    batches = [text.batch(calibrated, 1, generator) for _ in range(2)]
    batches += list(text.validation_batches(calibrated, 1, 1))
    say("pace of this machine")
    machine_pace(settings.target)
    say("calibration of the demonstration's model")
    compiled = fg.compile(demo_spec(), target=settings.target)
    model = compiled.module(seed=0)
    started = time.perf_counter()
    planned = replan(compiled, Request(model, batches))
    seconds = time.perf_counter() - started
    held_out = list(text.validation_batches(measured, 1, 2))
    return {
        **heading(settings),
        "tokens": {"calibrated": calibrated, "measured": measured},
        "calibration_s": seconds,
        "planned": _document(planned),
        "picked": _picked(settings, compiled, planned, model, held_out),
        "guards": _guards(settings, batches, held_out[0]),
        "planning": _planning(settings),
    }


def _document(planned: Compiled) -> dict[str, Any]:
    assert planned.calibration is not None
    kept = {key: planned.calibration[key] for key in ("planned", "verification")}
    served = [entry.node for entry in planned.plan]
    return {**kept, "attentions": [f"{node.get('family')} {node.get('degree')}" for node in served]}


# ---------------------------------------------------------------- picked by hand


def _picked(
    settings: Settings, compiled: Compiled, planned: Compiled, model: nn.Module, held_out: Sequence[Batch]
) -> list[dict[str, object]]:
    """Errors, and the time of a training step, of the planned model and of each single family and degree."""
    contenders = {"planned": planned}
    for degree in HAND_PICKED[:1] if settings.quick else HAND_PICKED:
        for family in FAMILIES:
            rules = f'at "*" degree = {degree}\n    at "*" family = "{family}"'
            try:
                contenders[f"{family} {degree}"] = fg.compile(demo_spec(rules), target=settings.target)
            except fg.TfgError:
                continue  # not positive on its range
    modules = {name: each.adopt(model) for name, each in contenders.items()}
    times = _steps(settings, {name: partial(_step, modules[name], compiled) for name in modules}, held_out[0])
    found = []
    for name, each in contenders.items():
        say(f"errors of {name}")
        served = approximated_of(each.plan_document)
        errors = [whole_errors(modules[name], b[:1], b[1:], compiled.loss, served) for b in held_out]
        output, gradient = (max(e[place] for e in errors) for place in (0, 1))
        budget = compiled.plan_document["budget"]
        keeps = output <= budget["output"] and gradient <= budget["gradient"]
        entry = {"name": name, "step_s": times[name], "output": output, "gradient": gradient}
        found.append({**entry, "keeps": keeps})
    return found


def _step(model: nn.Module, compiled: Compiled, batch: Batch) -> None:
    model.zero_grad(set_to_none=True)
    assert compiled.loss is not None
    compiled.loss(model(batch[0]), batch[1]).backward()


def _steps(
    settings: Settings, contenders: dict[str, Callable[[Batch], None]], batch: Batch
) -> dict[str, float]:
    """Median seconds of a step of each, interleaved; the first pass warms up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(1 + settings.repeats):
        for name, step in contenders.items():
            started = time.perf_counter()
            step(batch)
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


# ---------------------------------------------------------------- guards


def _guards(settings: Settings, batches: Sequence[Batch], batch: Batch) -> dict[str, object]:
    """A model whose ranges are measured, with its guards and with the same code without them."""
    say("guards")
    compiled = fg.compile(demo_spec(gain="gain = none").replace("near = near,", ""), target=settings.target)
    model = compiled.module(seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wq", "wk")):
                parameter.mul_(0.5)  # logits that a polynomial of the budget can serve
    planned = replan(compiled, Request(model, batches))
    guarded = planned.adopt(model)
    plain = dict(planned.modules)
    plain["model.py"] = re.sub(r",?\s*guard=[\w.\[\]]+\.key", "", plain["model.py"])
    bare: nn.Module = package_from_texts(plain).MODEL(None)
    bare.load_state_dict(model.state_dict())
    times = _steps(
        replace(settings, repeats=GUARD_REPEATS * settings.repeats),
        {"guarded": partial(_step, guarded, compiled), "bare": partial(_step, bare, compiled)},
        batch,
    )
    status = guarded.budget_status()  # type: ignore[operator]
    counts = {"attentions": len(status), "calls": sum(each["calls"] for each in status)}
    return {**{f"{name}_s": seconds for name, seconds in times.items()}, **counts}


# ---------------------------------------------------------------- planning


def _planning(settings: Settings) -> dict[str, object]:
    """Seconds from a calibration of 24 layers of 16 heads to a compiled program."""
    params = {**LARGE, "depth": 2} if settings.quick else LARGE
    compiled = fg.compile(demo_spec(), params=params, target=settings.target)
    program = compiled.recognised
    tensors = [*model_inputs(program), *target_inputs(program)]
    batch = random_batch(tensors, {"b": 1, "n": 256}, 0)
    say(f"planning {params['depth']} layers of {params['heads']} heads")
    subject = Subject(program, dict(compiled.module(seed=0).state_dict()), compiled.loss)
    used = UsedCalibration("random inputs", "initial weights", 1, {"b": 1, "n": 256}, 0)
    found = calibrate(subject, [batch], used, default_pace(settings.target), probes=2)
    limits = Limits(1e-2, 5e-2)
    started = time.perf_counter()
    plan = make_plan(found, limits)
    assert plan is not None
    planned = time.perf_counter() - started
    run(compiled.stages[0].program, target=settings.target, assignment=decisions(plan, found))
    total = time.perf_counter() - started
    sizes = {"layers": params["depth"], "heads": params["heads"]}
    return {**sizes, "plan_s": planned, "total_s": total, "gap": plan.planned.gap}
