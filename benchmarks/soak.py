"""A model that writes millions of tokens: whether memory grows, and how far its outputs are from float64.

    python -m benchmarks.run --section soak

A small model (examples/gpt.tfg, narrow and shallow, with random weights, so that its text stays varied) draws its
tokens in float32, some at a time, from the logits of the call before. A second model in float64 is given the same
tokens. The largest difference of their logits, relative to the largest logit, and the memory of the process are taken
at powers of two and at the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.generation import DECLARED, SPEC
from benchmarks.settings import Settings, heading, say
from benchmarks.tables import Section, heading_of, table_of
from fastgrad_dsl.api.compiled import compile as compile_spec
from fastgrad_dsl.bench.memory import resident

SIZES = {"depth": 2, "d_model": 32, "heads": 2, "near": 64}
TOKENS, QUICK_TOKENS, CALL = 5_000_000, 4096, 128


def measure(settings: Settings) -> dict[str, object]:
    """The section `soak` of the JSON."""
    tokens = QUICK_TOKENS if settings.quick else TOKENS
    spec = compile_spec(
        SPEC.read_text().replace(DECLARED, f"dim n <= {2 * tokens}"), params=SIZES, target=settings.target
    )
    single, double = spec.module(seed=0), spec.module(seed=0, dtype=torch.float64)
    points = list(_points(single, double, tokens))
    return {**heading(settings), "tokens": tokens, "call": CALL, "sizes": SIZES, "points": points}


def _points(single: Any, double: Any, tokens: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    states = single.start(1), double.start(1)
    given, started = torch.zeros((1, CALL), dtype=torch.int64), time.monotonic()
    for count in range(CALL, tokens + CALL, CALL):
        logits, _ = single.step(given, states[0])
        exact, _ = double.step(given, states[1])
        if count >= tokens or (count >= 1024 and count.bit_length() > (count - CALL).bit_length()):
            difference = float((logits.double() - exact).abs().max() / exact.abs().max())
            say(f"{count:,} tokens, {time.monotonic() - started:.0f} s: off by {difference:.1e}")
            sizes = {"resident_bytes": resident(), "state_bytes": states[0].nbytes}
            yield {"tokens": count, "difference": difference, **sizes}
        given = torch.multinomial(logits[0].softmax(-1), 1, generator=generator).mT


def soak(section: Section) -> str:
    """The section of docs/performance.md."""
    first, last = section["points"][0], section["points"][-1]
    growth = (last["resident_bytes"] - first["resident_bytes"]) / 2**20
    columns = (
        ("tokens", lambda point: f"{point['tokens']:,}"),
        ("off float64 by", lambda point: f"{point['difference']:.1e}"),
        ("state", lambda point: f"{point['state_bytes']:,} bytes"),
    )
    shown = [point for place, point in enumerate(section["points"]) if place % 2 == 0 or point is last]
    return "\n".join(
        [
            heading_of("A soak", section),
            f"A small model of the same kind writes {last['tokens']:,} tokens in float32, {section['call']} at a time, "
            "and one in float64 is given the same: the largest difference of logits, relative to the largest logit. "
            f"Between the first and the last row the process grew by {growth:.1f} MiB.\n",
            table_of(columns, shown, left=0),
        ]
    )
