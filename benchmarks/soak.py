"""A model that writes millions of tokens: whether memory grows, and how far its outputs are from float64.

    python -m benchmarks.soak --tokens 5000000 --call 64 --json docs/soak.json

A small model (examples/gpt.tfg, narrow and shallow, with random weights, so that its text stays varied) draws its
tokens in float32, `--call` of them at a time: with 1, each is drawn given all before it; with more, from the logits of
the call before. A second model in float64 is given the same tokens. The largest difference of their logits, relative to
the largest logit, and the memory of the process are taken at powers of two and at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.generation import DECLARED, SPEC
from benchmarks.settings import say
from fastgrad_dsl.api.compiled import compile as compile_spec
from fastgrad_dsl.bench.machine import describe_machine
from fastgrad_dsl.bench.memory import resident
from fastgrad_dsl.storage.files import write_atomically

SIZES = {"depth": 2, "d_model": 32, "heads": 2, "near": 16}
TOLERANCE = 1e-4  # of float32 logits beside float64, relative to the largest


def main() -> None:
    """Write the tokens; the status is 1 where outputs or memory leave their limits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--call", type=int, default=1, help="tokens at a time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = SPEC.read_text().replace(DECLARED, f"dim n <= {2 * options.tokens}")
    spec = compile_spec(text, params=SIZES)
    single: Any = spec.module(seed=0)
    double: Any = spec.module(seed=0, dtype=torch.float64)
    points = list(write(single, double, options.tokens, options.call))
    worst, growth = max(p["difference"] for p in points), points[-1]["resident"] - points[0]["resident"]
    found = {
        "machine": describe_machine(1),
        "tokens": options.tokens,
        "call": options.call,
        "sizes": SIZES,
        "tolerance": TOLERANCE,
        "points": points,
        "worst": worst,
        "growth_bytes": growth,
    }
    if options.json is not None:
        write_atomically(options.json, json.dumps(found, indent=1) + "\n")
    print(
        f"{options.tokens:,} tokens: off float64 by at most {worst:.1e}, memory grew by {growth / 2**20:.1f} MiB"
    )
    raise SystemExit(int(worst > TOLERANCE or growth > 2**24))


def write(single: Any, double: Any, tokens: int, call: int) -> Any:
    """Yield a point at powers of two from 1,024 on, and at the end."""
    generator = torch.Generator().manual_seed(0)
    states = single.start(1), double.start(1)
    given, started = torch.zeros((1, call), dtype=torch.int64), time.monotonic()
    for count in range(call, tokens + call, call):
        logits, _ = single.step(given, states[0])
        exact, _ = double.step(given, states[1])
        if count >= tokens or (count >= 1024 and count.bit_length() > (count - call).bit_length()):
            difference = float((logits.double() - exact).abs().max() / exact.abs().max())
            seconds = round(time.monotonic() - started, 1)
            say(f"{count:,} tokens, {seconds} s: off by {difference:.1e}")
            point = {"tokens": count, "difference": difference, "resident": resident(), "seconds": seconds}
            yield {**point, "state_bytes": states[0].nbytes}
        given = torch.multinomial(logits[0].softmax(-1), 1, generator=generator).mT


if __name__ == "__main__":
    main()
