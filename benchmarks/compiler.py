"""Times the compiler: a 96-layer gpt.tfg after imports, and `fastgrad check` as a whole process.

    python benchmarks/compiler.py [--json FILE]

Prints medians; every number is measured in this run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from fastgrad_dsl.compiled import compile as compile_spec

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "examples" / "gpt.tfg"
RUNS = 7


def main() -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    result = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "command": "python benchmarks/compiler.py",
        "compile_96_layers_s": _median([_compile(96) for _ in range(RUNS)]),
        "compile_1_layer_s": _median([_compile(1) for _ in range(RUNS)]),
        "check_process_s": _median([_check() for _ in range(RUNS)]),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _compile(depth: int) -> float:
    """Text to the texts of all files: every pass, verified, and the generated code; no module is made."""
    started = time.perf_counter()
    files = compile_spec(SPEC, params={"depth": depth}).files
    assert "model.py" in files
    return time.perf_counter() - started


def _check() -> float:
    started = time.perf_counter()
    command = [sys.executable, "-c", "from fastgrad_dsl.cli import main; main()", "check", str(SPEC)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


if __name__ == "__main__":
    main()
