"""The error report: the plan, and bound, estimate and measured error of each attention and of the whole model.

report.json is the result; every view of it is made from that alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrad_compiler.passes.attention_table import OWN
from fastgrad_compiler.text_parser import parse_dim
from fastgrad_dsl.batches import Input, random_batch
from fastgrad_dsl.files import write_atomically
from fastgrad_dsl.plan_document import is_approximated
from fastgrad_grammar.diagnostics import Diagnostic, TfgError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastgrad_dsl.measure import ModelErrors

FORMAT = "fastgrad-report-1"
DEFAULT_LENGTH = 2048  # tokens of a batch whose size nobody gave
Tell = Callable[[str], None]


@dataclass(frozen=True)
class ReportRequest:
    """What to report on: a build folder or a spec, its params and model, a text, trained weights, sizes of dims."""

    where: Path
    params: Mapping[str, object]
    model: str | None
    text: Path | None
    weights: Path | None
    dims: Mapping[str, int]
    seed: int
    measure: bool


@dataclass(frozen=True)
class Subject:
    """A plan and, where it is to be run, its module and objective."""

    plan: Mapping[str, Any]
    module: Callable[[int], nn.Module]
    objective: Callable[..., Tensor] | None


def make_report(request: ReportRequest, tell: Tell) -> dict[str, Any]:
    """The report of a folder or a spec.

    Raises TfgError: what compiling or loading finds wrong; FG416 for an unknown dim, FG411 or FG412 for the text,
    FG418 for weights that are not this model's.
    """
    subject = _subject(request)
    if not request.measure:
        return build_report(subject.plan, None, None)
    sizes = _sizes(subject.plan, request.dims)
    kind, inputs, targets = _batch(subject.plan, request, sizes)
    model = subject.module(request.seed)
    if request.weights is not None:
        from fastgrad_dsl.weights import load_weights

        load_weights(model, request.weights)
    batch = {
        "kind": kind,
        "dims": sizes,
        "seed": request.seed,
        "weights": f"weights of {request.weights}"
        if request.weights
        else f"initial weights, seed {request.seed}",
    }
    errors = measure_plan(subject.plan, model, inputs, targets, subject.objective, tell)
    return build_report(subject.plan, errors, batch)


def measure_plan(
    plan: Mapping[str, Any],
    model: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    objective: Callable[..., Tensor] | None,
    tell: Tell = lambda what: None,
) -> ModelErrors:
    """Measured errors of a model that was compiled with this plan."""
    from fastgrad_dsl.measure import Served, measure_errors

    served = [
        Served(
            entry["path"], entry["eps"], entry["eps_prime"], entry["scale"], own=not is_approximated(entry)
        )
        for entry in plan["attentions"]
        if entry["decision"] == "polynomial"
    ]
    return measure_errors(model, inputs, targets, objective if targets else None, served, progress=tell)


def build_report(
    plan: Mapping[str, Any], errors: ModelErrors | None, batch: Mapping[str, Any] | None
) -> dict[str, Any]:
    """report.json: the plan's attentions, each with its `errors`, and the whole. None stands for what is not known."""
    return {
        "format": FORMAT,
        **{key: plan[key] for key in ("model", "source", "target", "dims", "budget")},
        "batch": batch,
        "whole": _whole(plan, errors),
        "summary": _summary(plan, errors),
        "attentions": [{**entry, "errors": _errors_of(entry, errors)} for entry in plan["attentions"]],
        "weight_gradients": None if errors is None else dict(errors.weight_gradients),
        "notes": _notes(plan, errors, batch),
    }


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report, atomically."""
    write_atomically(path, json.dumps(report, indent=2, allow_nan=False) + "\n")


def _errors_of(entry: Mapping[str, Any], errors: ModelErrors | None) -> dict[str, dict[str, float | None]]:
    """`output` and `gradient`, each with bound (proved), estimate (effect on the model) and measured (alone)."""
    if not is_approximated(entry):
        return {what: {"bound": 0.0, "estimate": 0.0, "measured": 0.0} for what in ("output", "gradient")}
    found = next((a for a in errors.attentions if a.path == entry["path"]), None) if errors else None
    if found is None:
        return {what: {"bound": None, "estimate": None, "measured": None} for what in ("output", "gradient")}
    return {
        "output": _three(found.output_bound, found.output_effect, found.output),
        "gradient": _three(found.gradient_bound, found.gradient_effect, found.gradient),
    }


def _three(bound: float, estimate: float, measured: float) -> dict[str, float | None]:
    values = {"bound": bound, "estimate": estimate, "measured": measured}
    return {name: value if isfinite(value) else None for name, value in values.items()}


def _whole(plan: Mapping[str, Any], errors: ModelErrors | None) -> dict[str, Any]:
    """The whole model; no useful bound is proved through layers that approximate."""
    exact = not any(map(is_approximated, plan["attentions"]))
    bound = 0.0 if exact else None
    if errors is None:
        unknown = {"bound": bound, "estimate": bound, "measured": bound}
        return {"output": dict(unknown), "gradient": dict(unknown), "loss": None, "exact_loss": None}
    return {
        "output": {"bound": bound, "estimate": errors.output_estimate, "measured": errors.output},
        "gradient": {"bound": bound, "estimate": errors.gradient_estimate, "measured": errors.gradient},
        "loss": errors.loss,
        "exact_loss": errors.exact_loss,
    }


def _summary(plan: Mapping[str, Any], errors: ModelErrors | None) -> list[str]:
    """The headline: errors of the whole against the budget, and the two losses."""
    if errors is None:
        return []
    budget = plan["budget"] or {}
    lines = []
    for what, measured, estimate in (
        ("output", errors.output, errors.output_estimate),
        ("gradient", errors.gradient, errors.gradient_estimate),
    ):
        limit = budget.get(what)
        kept = "kept" if limit is None or measured <= limit else "EXCEEDED"
        verdict = "" if limit is None else f"; budget {limit:g}: {kept} on this batch"
        lines.append(f"{what} error {measured:.2e} (measured), {estimate:.2e} (estimate){verdict}")
    if errors.loss is not None and errors.exact_loss is not None:
        lines.append(
            f"loss {errors.loss:.5f} compiled, {errors.exact_loss:.5f} exact, same weights and batch (measured)"
        )
    return lines


def _notes(plan: Mapping[str, Any], errors: ModelErrors | None, batch: Mapping[str, Any] | None) -> list[str]:
    entries = plan["attentions"]
    notes = []
    if any(entry["family"] == OWN for entry in entries):
        notes.append(
            "weights that are the model's own polynomial stand in for nothing: their error is 0, without a bound of the"
            " logits"
        )
    if any(map(is_approximated, entries)):
        notes.append(
            "no useful bound is proved through several layers; the whole has an estimate and a measurement"
        )
    if any(entry["asserted"] for entry in entries):
        notes.append(
            "a bound R rests on assume_bound, the file's word: logits beyond it have unbounded error"
        )
    if errors is not None and batch is not None:
        shortest = min((e["break_even"] for e in entries if e["break_even"] is not None), default=0)
        longest = max(batch["dims"].values(), default=0)
        if longest < shortest:
            notes.append(
                f"below {shortest} tokens every attention runs exactly: measure a longer batch (--dim)"
            )
    if errors is not None and errors.loss is None:
        notes.append(
            "the file has no objective: gradients are those of a fixed random projection of the output"
        )
    return notes


def _subject(request: ReportRequest) -> Subject:
    import fastgrad_dsl as fg
    from fastgrad_dsl.loader import load_objective, load_plan

    if request.where.is_dir():
        folder = request.where
        return Subject(load_plan(folder), lambda seed: fg.load(folder, seed=seed), load_objective(folder))
    compiled = fg.compile(request.where, params=request.params, model=request.model)
    return Subject(compiled.plan_document, lambda seed: compiled.module(seed=seed), compiled.loss)


def _sizes(plan: Mapping[str, Any], given: Mapping[str, int]) -> dict[str, int]:
    """A size for every dim of a batch: what was given, else 1 for the first dim (the batch), else a usual length."""
    shapes = [parse_dim(dim) for tensor in (*plan["inputs"], *plan["targets"]) for dim in tensor["shape"]]
    names = list(dict.fromkeys(name for dim in shapes for name in sorted(dim.names)))
    for name in given:
        if name not in names:
            near = nearest(name, names)
            help_ = (f"did you mean {near}?",) if near else (f"the model's dims are {', '.join(names)}",)
            raise TfgError([Diagnostic("FG416", f"the model has no run-time dim {name}", help=help_)])
    limits = {dim["name"]: dim for dim in plan["dims"]}
    sizes = {}
    for place, name in enumerate(names):
        limit = limits.get(name, {"at_most": None, "multiple_of": 1})
        multiple = limit["multiple_of"] or 1
        usual = 1 if place == 0 else min(DEFAULT_LENGTH, limit["at_most"] or DEFAULT_LENGTH)
        sizes[name] = given.get(name, max(usual // multiple, 1) * multiple)
        if sizes[name] > (limit["at_most"] or sizes[name]) or sizes[name] % multiple:
            declared = (
                f"at most {limit['at_most']}, a multiple of {multiple}"
                if multiple > 1
                else f"at most {limit['at_most']}"
            )
            raise TfgError(
                [Diagnostic("FG416", f"--dim {name}={sizes[name]}: the spec declares {name} {declared}")]
            )
    return sizes


def _batch(
    plan: Mapping[str, Any], request: ReportRequest, sizes: Mapping[str, int]
) -> tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]:
    inputs, targets = (
        [Input(t["name"], t["dtype"], tuple(parse_dim(d) for d in t["shape"]), t["below"]) for t in plan[key]]
        for key in ("inputs", "targets")
    )
    if request.text is None:
        batch = random_batch([*inputs, *targets], sizes, request.seed)
        return "random inputs", batch[: len(inputs)], batch[len(inputs) :]
    from fastgrad_dsl.text_data import load_text

    is_text = (
        len(inputs) == 1 and inputs[0].dtype == "int" and len(inputs[0].shape) == 2 and inputs[0].below >= 256
    )
    if not is_text:
        raise TfgError(
            [Diagnostic("FG415", f"model {plan['model']} does not take bytes of text: leave out --text")]
        )
    rows, tokens = (dim.evaluate(sizes) for dim in inputs[0].shape)
    text = load_text(request.text, tokens)
    held_out, following = next(text.validation_batches(tokens, rows, 1))
    return f"held-out text of {request.text}", (held_out,), (following,) if targets else ()
