"""How to get the same report again: the commands, the seed and what else it needs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

FOLDER = "build"  # any will do
IN_MEMORY = "<text>"  # the source of a program that was given as text
INITIAL, STORED = "initial weights", "weights of "  # how weights are described
FILES = ("text of ", "batches of ")  # how data of a calibration are described that stand in a file


def reproduce(
    plan: Mapping[str, Any], batch: Mapping[str, Any] | None, calibration: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`commands`, None where Python alone can do it: a program given as text, batches or weights as tensors."""
    return {
        "commands": _commands(plan, batch, calibration),
        "seed": None if batch is None else batch["seed"],
        "data": None if batch is None else batch["kind"],
        "weights": None if batch is None else batch["weights"],
        "calibration": None
        if calibration is None
        else {key: calibration[key] for key in ("data", "weights", "batches", "dims", "seed")},
    }


def _commands(
    plan: Mapping[str, Any], batch: Mapping[str, Any] | None, calibration: Mapping[str, Any] | None
) -> list[str] | None:
    measured = ["--no-measure"] if batch is None else batch.get("options")
    calibrated = [] if calibration is None else _calibrate(calibration)
    if plan["source"] == IN_MEMORY or measured is None or calibrated is None:
        return None
    params = [shlex.quote(f"{name}={value}") for name, value in plan["params"].items()]
    options = [
        f"--model {shlex.quote(plan['model'])}",
        *(f"--set {param}" for param in params),
        f"--target {shlex.quote(plan['target'])}",
    ]
    return [
        " ".join(["fastgrad compile", shlex.quote(plan["source"]), *options, *calibrated, f"-o {FOLDER}"]),
        " ".join(["fastgrad report", FOLDER, *measured, f"--html {FOLDER}/report.html"]),
    ]


def _calibrate(calibration: Mapping[str, Any]) -> list[str] | None:
    """The options of `compile` that calibrate again; None where data or weights were given as tensors."""
    described, weights = str(calibration["data"]).partition(", one batch")[0], str(calibration["weights"])
    data = next((described.removeprefix(start) for start in FILES if described.startswith(start)), None)
    data = "random" if described == "random inputs" else data
    if data is None or not weights.startswith((INITIAL, STORED)):
        return None
    options = [f"--calibrate {shlex.quote(data)}"]
    options += [f"--dim {shlex.quote(f'{name}={size}')}" for name, size in calibration["dims"].items()]
    if weights.startswith(STORED):
        options.append(f"--weights {shlex.quote(weights.removeprefix(STORED))}")
    return [*options, f"--seed {calibration['seed']}"]
