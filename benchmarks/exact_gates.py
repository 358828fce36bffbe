"""Exact attention with forget gates by its kernel, in blocks of PyTorch's operations, and PyTorch's fused one without.

    python -m benchmarks.exact_gates [TOKENS]

Milliseconds of processor time of one thread, forward and backward, the least of several turns in one process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fastgrad_dsl as fg

HEADS, WIDTH, TURNS = 4, 32, 7
SPEC = """\
dim b
dim n <= 1048576
model m(q: T, k: T, v: T, x: float[b, {heads}, n]) -> T {{
    return softmax({scores}) @ v
}}
""".replace("T", "float[b, {heads}, n, {width}]")
FUSED = "causal(q @ k.T * 0.25)"
GATED = f"forget({FUSED}, log_sigmoid(x + 4.0))"
CONTENDERS = {
    "gates, kernel": (GATED, "cpp"),
    "gates, blocks of PyTorch's operations": (GATED, "torch"),
    "no gates, PyTorch's fused kernel": (FUSED, "torch"),
}


def contender(scores: str, target: str, inputs: list[Tensor]) -> Callable[[], None]:
    """One pass of both directions."""
    text = SPEC.format(scores=scores, heads=HEADS, width=WIDTH)
    model = fg.compile(text, target=target, validate=False).module()

    def step() -> None:
        model(*inputs).sum().backward()

    return step


def main() -> None:
    """Measure, and print a row for each."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, HEADS, n, WIDTH)] * 3 + [(1, HEADS, n)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    steps = {name: contender(*how, inputs) for name, how in CONTENDERS.items()}
    for step in steps.values():
        step()  # builds what is built once
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            started = time.process_time()
            step()
            found[name].append(time.process_time() - started)
    for name, seconds in found.items():
        print(f"{name:38s} {1e3 * min(seconds):8.1f} ms")


if __name__ == "__main__":
    main()
