"""report.json: what the plan, a measurement and a calibration say of a model, in one self-contained document."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrad_compiler.planning.cost import Pace
from fastgrad_dsl import __version__
from fastgrad_dsl.report.candidates import calibrated, candidates_key, certified
from fastgrad_dsl.report.cautions import notes, warnings
from fastgrad_dsl.report.curves import curve, curve_key
from fastgrad_dsl.report.derivation import derivation, derivation_key
from fastgrad_dsl.report.entries import Entry, calibration_of, shared
from fastgrad_dsl.report.errors import (
    attention_errors,
    exact_zero,
    finite,
    found_errors,
    heads_of,
    whole_errors,
)
from fastgrad_dsl.report.headline import headline, summary, waterfall
from fastgrad_dsl.report.prediction import cost_curve, cost_key, longest_sizes, pace_of, predict
from fastgrad_dsl.report.reproduce import reproduce
from fastgrad_dsl.report.sources import annotated_spec, kernel_code
from fastgrad_dsl.storage.outputs import write_output
from fastgrad_grammar.quote import json_text

if TYPE_CHECKING:
    from fastgrad_dsl.api.measure import ModelErrors

FORMAT = "fastgrad-report-4"
MEASURED_ON = ("tokens", "kind", "dims", "seed", "weights")


def build_report(
    plan: Mapping[str, Any],
    errors: ModelErrors | None = None,
    batch: Mapping[str, Any] | None = None,
    *,
    spec: str | None = None,
    files: Mapping[str, str] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report of a plan (docs/report.md), valid by schema.json; deterministic. None stands for what is not known.

    Args:
        plan: plan.json as data.
        errors: measured on a batch, with `batch` for what that was: its `tokens`, `kind`, `dims`, `seed` and `weights`.
        spec: the text of the `.tfg` file.
        files: the generated files by name, of which those of kernels are shown.
        calibration: a calibration document, whose histograms, candidates and estimates are shown.
    """
    calibrations = {entry["path"]: calibration_of(entry, calibration) for entry in plan["attentions"]}
    entries = plan["attentions"]
    whole = whole_errors(plan, errors, calibration)
    code, code_files = kernel_code(entries, files or {})
    attentions = []
    for entry, names in zip(entries, code_files, strict=True):
        found, own = found_errors(entry, errors), calibrations[entry["path"]]
        attentions.append(
            {
                **entry,
                "errors": attention_errors(
                    entry, found, own if own and own["path"] == entry["path"] else None
                ),
                "exact_zero": exact_zero(found),
                "per_head": heads_of(entry, found, own),
                "code": names,
            }
        )
    pace, kind = pace_of(plan, calibration)
    sizes, undeclared = longest_sizes(plan)
    described = None if batch is None else {"batches": 1, **{key: batch[key] for key in MEASURED_ON}}
    trust = (calibration or {}).get("trust", "calibrated")
    document = {
        "format": FORMAT,
        **{key: plan[key] for key in ("model", "source", "target", "params", "dims", "budget")},
        "versions": _versions(),
        "reproduce": reproduce(plan, batch, calibration),
        "batch": described,
        "headline": headline(plan, whole, described, calibration, predict(plan, pace, kind, calibration)),
        "summary": summary(plan, whole, described),
        "spec": annotated_spec(plan["source"], spec, attentions),
        "whole": whole,
        "attentions": attentions,
        "waterfall": waterfall(plan, attentions, whole, calibration),
        **_shared(attentions, sizes, (pace, plan["target"]), calibrations, trust),
        "code": code,
        "weight_gradients": None if errors is None else finite(errors.weight_gradients),
        "calibration": None if calibration is None else dict(calibration),
        "notes": notes(plan, errors, undeclared),
    }
    return {**document, "warnings": warnings(document)}


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report, atomically."""
    write_output(path, to_json(report))


def to_json(report: Mapping[str, Any]) -> str:
    """The text of report.json; ValueError for a number that is not finite."""
    return json_text(report, 2) + "\n"


def _shared(
    attentions: list[dict[str, Any]],
    sizes: Mapping[str, int],
    served: tuple[Pace, str],
    calibrations: Mapping[str, Mapping[str, Any] | None],
    trust: str,
) -> dict[str, Any]:
    """What equal attentions share, each once; the attentions get their places in these lists.

    served: the pace and the target.
    """
    pace, target = served

    def candidates_of(entry: Mapping[str, Any]) -> dict[str, Any] | None:
        own = calibrations[entry["path"]]
        return calibrated(own, trust) if own and own["candidates"] else certified(entry, sizes, pace, target)

    def key_of_candidates(entry: Mapping[str, Any]) -> object:
        own = calibrations[entry["path"]]
        return own["path"] if own and own["candidates"] else candidates_key(entry)

    tables: dict[str, tuple[str, Callable[[Entry], object], Callable[[Entry], dict[str, Any] | None]]] = {
        "curves": ("curve", curve_key, curve),
        "costs": ("cost", cost_key, partial(cost_curve, sizes=sizes, pace=pace)),
        "candidates": ("candidates", key_of_candidates, candidates_of),
        "derivations": ("derivation", derivation_key, derivation),
    }
    found = {}
    for table, (name, key, make) in tables.items():
        found[table], places = shared(attentions, key, make)
        for entry, place in zip(attentions, places, strict=True):
            entry[name] = place
    return found


def _versions() -> dict[str, str | None]:
    try:
        torch: str | None = version("torch")  # of the package, without loading it
    except PackageNotFoundError:
        torch = None
    return {"fastgrad": __version__, "torch": torch, "python": platform.python_version()}
