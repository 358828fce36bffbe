"""One training step of examples/gpt.tfg on a long sequence, its memory limited by a budget.

    python -m benchmarks.long_step TOKENS BYTES

Seconds of both passes, and by how much the resident set rises within them beyond what a first short step left, which is
known on Linux only.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import torch

import fastgrad_dsl as fg
from fastgrad_dsl.bench.memory import peak_of

SPEC = Path(__file__).parents[1] / "examples" / "gpt.tfg"
SHORT = 128  # tokens


def main() -> None:
    """Measure, and print what was planned and what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tokens", type=int)
    parser.add_argument("bytes", type=float, help="limit of the budget")
    options = parser.parse_args()
    n = options.tokens
    text, places = re.subn(r"dim n <= \d+", f"dim n <= {n}", SPEC.read_text(encoding="utf-8"))
    assert places == 1
    text += f"\nbudget {{\n    memory <= {options.bytes!r}\n}}\n"
    try:
        compiled = fg.compile(text, dims={"n": n, "b": 1}, validate=False)
    except fg.TfgError as error:
        parser.error(str(error))
    planned, loss = compiled.plan_document.memory, compiled.loss
    assert planned is not None
    assert loss is not None
    pieces = f"in pieces of {planned.piece:,} tokens" if planned.piece else "whole"
    print(f"planned: {planned.bytes / 1e9:.2f} GB (estimate), {pieces}", flush=True)
    model = compiled.module(seed=0)
    tokens = torch.randint(0, 256, (1, n + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss.of(model, (inputs[:, :SHORT],), (targets[:, :SHORT],)).backward()
    started = time.perf_counter()
    peak = peak_of(lambda: loss.of(model, (inputs,), (targets,)).backward())
    seen = "unknown" if peak is None else f"{peak / 1e9:.2f} GB"
    print(f"{time.perf_counter() - started:.0f} s, the resident set rises by {seen} (measured)")


if __name__ == "__main__":
    main()
