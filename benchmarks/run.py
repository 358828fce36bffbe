"""Run the benchmark and merge its sections into one JSON file (docs/benchmark.md says what is in it).

    python -m benchmarks.run [--section NAME ...] [--json FILE] [--target T] [--threads N]
                             [--repeats N] [--seconds S] [--quick]

Each section is written as soon as it is measured, so that a run that was cut off goes on with `--section`. Pages are
made from the file by `python -m benchmarks.document`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    anatomy,
    attention,
    budget,
    compiler,
    curves,
    demo,
    generation,
    gpu,
    gpu_model,
    peers,
    soak,
    training,
)
from benchmarks.scaling import section as scaling
from benchmarks.settings import ROOT, Settings, say
from fastgrad_dsl.storage.files import write_atomically

FORMAT = 1
SECTIONS: dict[str, Callable[[Settings], dict[str, object]]] = {
    "attention": attention.measure,
    "peers": peers.measure,
    "training": training.measure,
    "anatomy": anatomy.measure,
    "compiler": compiler.measure,
    "budget": budget.measure,
    "curves": curves.measure,
    "demo": demo.measure,
    "generation": generation.measure,
    "soak": soak.measure,
    "gpu_model": gpu_model.measure,
    "gpu": gpu.measure,
    "scaling": scaling.measure,
}
USUAL = (
    "attention",
    "peers",
    "training",
    "generation",
    "compiler",
    "budget",
    "gpu_model",
)  # others are asked for by name


def main() -> None:
    """Measure the sections that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--section", action="append", choices=SECTIONS, help="by default the usual ones: docs/benchmark.md"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "performance.json")
    parser.add_argument("--target", default="auto", help="of the polynomial attention")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--repeats", type=int, default=5, help="passes of which the median is taken")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="for the passes of one contender at one length"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether it works")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = 1.0 if options.quick else options.seconds
    settings = Settings(options.target, options.threads, options.repeats, seconds, options.quick)
    for name in options.section or USUAL:
        started = time.monotonic()
        section = SECTIONS[name](settings)
        merge(options.json, name, {**section, "seconds": round(time.monotonic() - started, 1)})
        say(f"{name}: {time.monotonic() - started:.0f} s")


def merge(path: Path, name: str, section: dict[str, object]) -> None:
    """Put one section into the file, beside those that are there."""
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"sections": {}}
    sections = {**document["sections"], name: section}
    ordered = {key: sections[key] for key in SECTIONS if key in sections}
    write_atomically(path, json.dumps({"format": FORMAT, "sections": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
