"""How to get the same report again: the commands, the seed and what else it needs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

FOLDER = "build"  # any will do
IN_MEMORY = "<text>"  # the source of a program that was given as text


def reproduce(
    plan: Mapping[str, Any], batch: Mapping[str, Any] | None, calibration: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`commands`, None where Python alone can do it: a program given as text, a batch given as tensors."""
    given = batch is not None and "options" not in batch
    commands = None
    if plan["source"] != IN_MEMORY and not given:
        options = [f"--set {name}={value}" for name, value in plan["params"].items()]
        compile_ = ["fastgrad compile", shlex.quote(plan["source"]), f"--model {plan['model']}", *options]
        report = ["fastgrad report", FOLDER, *(["--no-measure"] if batch is None else batch["options"])]
        commands = [
            " ".join([*compile_, f"--target {plan['target']}", f"-o {FOLDER}"]),
            " ".join([*report, f"--html {FOLDER}/report.html"]),
        ]
    return {
        "commands": commands,
        "seed": None if batch is None else batch["seed"],
        "data": None if batch is None else batch["kind"],
        "weights": None if batch is None else batch["weights"],
        "calibration": None
        if calibration is None
        else {key: calibration[key] for key in ("data", "weights", "batches", "dims", "seed")},
    }
