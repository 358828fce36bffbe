"""How to get the same report again: the commands, the seed and what else it needs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from fastgrad_dsl.documents.base import picked
from fastgrad_dsl.documents.calibration import Calibration, UsedCalibration
from fastgrad_dsl.documents.plan import Plan
from fastgrad_dsl.documents.report import Batch, Reproduce

FOLDER = "build"  # any will do
IN_MEMORY = "<text>"  # the source of a program that was given as text
INITIAL, STORED = "initial weights", "weights of "  # how weights are described
FILES = ("text of ", "batches of ")  # how data of a calibration are described that stand in a file


def reproduce(
    plan: Plan, batch: Batch | None, options: Sequence[str] | None, calibration: Calibration | None
) -> Reproduce:
    """How to get a report again; `options` of the command line measure on the same batch, None where none do."""
    return Reproduce(
        commands=_commands(plan, ["--no-measure"] if batch is None else options, calibration),
        seed=batch.seed if batch else None,
        data=batch.kind if batch else None,
        weights=batch.weights if batch else None,
        calibration=picked(UsedCalibration, calibration) if calibration else None,
    )


def _commands(
    plan: Plan, measured: Sequence[str] | None, calibration: Calibration | None
) -> tuple[str, ...] | None:
    calibrated = [] if calibration is None else _calibrate(calibration)
    if plan.source == IN_MEMORY or measured is None or calibrated is None:
        return None
    params = [shlex.quote(f"{name}={value}") for name, value in plan.params.items()]
    options = [
        f"--model {shlex.quote(plan['model'])}",
        *(f"--set {param}" for param in params),
        f"--target {shlex.quote(plan['target'])}",
    ]
    return (
        " ".join(["fastgrad compile", shlex.quote(plan.source), *options, *calibrated, f"-o {FOLDER}"]),
        " ".join(["fastgrad report", FOLDER, *measured, f"--html {FOLDER}/report.html"]),
    )


def _calibrate(calibration: Calibration) -> list[str] | None:
    """The options of `compile` that calibrate again; None where data or weights were given as tensors."""
    described, weights = calibration.data.partition(", one batch")[0], calibration.weights
    data = next((described.removeprefix(start) for start in FILES if described.startswith(start)), None)
    data = "random" if described == "random inputs" else data
    if data is None or not weights.startswith((INITIAL, STORED)):
        return None
    options = [f"--calibrate {shlex.quote(data)}"]
    options += [f"--dim {shlex.quote(f'{name}={size}')}" for name, size in calibration.dims.items()]
    if weights.startswith(STORED):
        options.append(f"--weights {shlex.quote(weights.removeprefix(STORED))}")
    return [*options, f"--seed {calibration['seed']}"]
