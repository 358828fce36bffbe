"""The report of a model: what the plan, a measurement and a calibration say of it, in one self-contained document."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from msgspec.structs import asdict

from fastgrad_dsl import __version__
from fastgrad_dsl.documents.base import finite, picked
from fastgrad_dsl.documents.calibration import Calibration
from fastgrad_dsl.documents.form import format_of
from fastgrad_dsl.documents.plan import Attention, Plan, longest_sizes
from fastgrad_dsl.documents.report import Batch, Candidates, Report, ReportedAttention, Versions
from fastgrad_dsl.report.candidates import calibrated, candidates_key, certified
from fastgrad_dsl.report.cautions import notes, warnings
from fastgrad_dsl.report.curves import curve, curve_key
from fastgrad_dsl.report.derivation import derivation, derivation_key
from fastgrad_dsl.report.entries import calibration_of, shared
from fastgrad_dsl.report.errors import attention_errors, exact_zero, found_errors, heads_of, whole_errors
from fastgrad_dsl.report.headline import headline, summary, waterfall
from fastgrad_dsl.report.prediction import cost_curve, cost_key, pace_of, predict
from fastgrad_dsl.report.reproduce import reproduce
from fastgrad_dsl.report.sources import annotated_spec, kernel_code
from fastgrad_dsl.report.weights import largest_share_of, spread_of

if TYPE_CHECKING:
    from fastgrad_dsl.models.measure import ModelErrors


def build_report(
    plan: Plan,
    errors: ModelErrors | None = None,
    batch: Batch | None = None,
    *,
    options: Sequence[str] | None = None,
    spec: str | None = None,
    files: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """The report of a plan (docs/report.md); deterministic. None stands for what is not known.

    Args:
        plan: of the model.
        errors: measured on a batch, with `batch` for what that was, and `options` of the command that measure again.
        spec: the text of the `.tfg` file.
        files: the generated files by name, of which those of kernels are shown.
        calibration: whose histograms, candidates and estimates are shown.
    """
    entries = plan.attentions
    calibrations = {entry.path: calibration_of(entry, calibration) for entry in entries}
    whole = whole_errors(plan, errors, calibration)
    code, code_files = kernel_code(entries, files or {})
    sizes, undeclared = longest_sizes(plan)
    pace, kind = pace_of(plan, calibration)

    def candidates_of(entry: Attention) -> Candidates | None:
        own = calibrations[entry.path]
        if own and own.candidates:
            return calibrated(own, calibration.trust if calibration else "calibrated")
        return certified(entry, sizes, pace, plan.target)

    def key_of_candidates(entry: Attention) -> object:
        own = calibrations[entry.path]
        return own.path if own and own.candidates else candidates_key(entry)

    curves, curve_places = shared(entries, curve_key, curve)
    costs, cost_places = shared(entries, cost_key, partial(cost_curve, sizes=sizes, pace=pace))
    candidates, candidates_places = shared(entries, key_of_candidates, candidates_of)
    derivations, derivation_places = shared(entries, derivation_key, derivation)
    attentions = []
    for place, entry in enumerate(entries):
        found, own = found_errors(entry, errors), calibrations[entry.path]
        estimated = own if own and own.path == entry.path else None
        attentions.append(
            ReportedAttention(
                **asdict(entry),
                largest_share=largest_share_of(entry, sizes),
                spread=spread_of(entry, errors),
                errors=attention_errors(entry, found, estimated),
                exact_zero=exact_zero(found),
                per_head=heads_of(entry, found, own),
                code=code_files[place],
                curve=curve_places[place],
                cost=cost_places[place],
                candidates=candidates_places[place],
                derivation=derivation_places[place],
            )
        )
    said = headline(plan, whole, batch, calibration, predict(plan, pace, kind, calibration))
    return picked(
        Report,
        plan,
        format=format_of(Report),
        versions=_versions(),
        reproduce=reproduce(plan, batch, options, calibration),
        batch=batch,
        headline=said,
        summary=summary(plan, whole, batch),
        spec=annotated_spec(plan.source, spec, attentions),
        whole=whole,
        attentions=tuple(attentions),
        waterfall=waterfall(plan, attentions, whole, calibration),
        curves=curves,
        costs=costs,
        candidates=candidates,
        derivations=derivations,
        code=code,
        weight_gradients=finite(errors.weight_gradients) if errors else None,
        calibration=calibration,
        notes=notes(plan, errors, undeclared),
        warnings=warnings(said, attentions, plan.budget, batch, calibration),
    )


def _versions() -> Versions:
    try:
        torch: str | None = version("torch")  # of the package, without loading it
    except PackageNotFoundError:
        torch = None
    return Versions(fastgrad=__version__, torch=torch, python=platform.python_version())
