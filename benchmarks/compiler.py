"""Times of the compiler: a 96-layer bounded.tfg after imports, and `fastgrad check` as a whole process."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from benchmarks.settings import ROOT, Settings, heading, say
from fastgrad_dsl.api.compiled import compile as compile_spec

SPEC = ROOT / "examples" / "bounded.tfg"
RUNS, QUICK_RUNS = 7, 1


def measure(settings: Settings) -> dict[str, object]:
    """The section `compiler` of the JSON: medians, seconds."""
    runs = QUICK_RUNS if settings.quick else RUNS
    say("the compiler")
    return {
        **heading(settings),
        "runs": runs,
        "compile_96_layers_s": statistics.median(_compile(96) for _ in range(runs)),
        "compile_1_layer_s": statistics.median(_compile(1) for _ in range(runs)),
        "check_process_s": statistics.median(_check() for _ in range(runs)),
    }


def _compile(depth: int) -> float:
    """Text to the texts of all files: every pass, verified, and the generated code; no module is made."""
    started = time.perf_counter()
    files = compile_spec(SPEC, params={"depth": depth}).files
    assert "model.py" in files
    return time.perf_counter() - started


def _check() -> float:
    started = time.perf_counter()
    command = [sys.executable, "-c", "from fastgrad_dsl.commands.cli import main; main()", "check", str(SPEC)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started
