"""What a training step of examples/gpt.tfg spends its time on: products, attention, the loss, all else, and floors.

A floor is what the step would take if its products ran at the peak of the machine's multiply-adds, and all else at the
speed at which memory is read: each operation reading its operands and writing its result once. A kernel that fuses
operations may be faster than the floor of those operations.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.generation import bandwidth
from benchmarks.settings import ROOT, Settings, heading, say
from fastgrad_dsl.api.compiled import compile as compile_spec
from fastgrad_dsl.bench.peak import peak_flops

SPEC = ROOT / "examples" / "gpt.tfg"
LENGTHS, QUICK_LENGTHS = (4096, 16_384), (64, 128)
VOCABULARIES, QUICK_VOCABULARIES = (256, 32_000), (256,)
LONGEST_OF_MANY = 4096  # tokens with more classes than bytes
PRODUCTS = frozenset(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"))
PARTS = {
    "products": "products with weights",
    "attention": "attention",
    "loss": "the loss, with its product",
    "rest": "all else",
}


def measure(settings: Settings) -> dict[str, object]:
    """The section `anatomy` of the JSON."""
    lengths, vocabularies = (QUICK_LENGTHS, QUICK_VOCABULARIES) if settings.quick else (LENGTHS, VOCABULARIES)
    peak, speed = peak_flops(settings.threads), bandwidth()
    rows = []
    for vocabulary in vocabularies:
        for n in lengths:
            if vocabulary == vocabularies[0] or n <= LONGEST_OF_MANY:
                say(f"anatomy of a step, n = {n:,}, {vocabulary:,} classes")
                rows.append(_row(n, vocabulary, settings, peak, speed))
    return {**heading(settings), "peak_flops": peak, "bytes_per_second": speed, "parts": PARTS, "rows": rows}


def _row(n: int, vocabulary: int, settings: Settings, peak: float | None, speed: float) -> dict[str, object]:
    compiled = compile_spec(SPEC, params={"vocab": vocabulary}, target=settings.target)
    model: Any = compiled.module(seed=0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, n + 1), generator=generator)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()

    step()  # builds what is built once
    seconds, shares = [], []
    for _ in range(1 if settings.quick else 3):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
        shares.append(shares_of(step))
    flops, moved = counted(step)
    width = model.table.shape[1]
    loss_flops = 6 * n * width * vocabulary
    return {
        "n": n,
        "classes": vocabulary,
        "seconds": statistics.median(seconds),
        "shares": {part: statistics.median(share[part] for share in shares) for part in PARTS},
        "flops": {"products": flops, "loss": loss_flops},
        "rest_bytes": moved,
        "floors": {
            "products": None if peak is None else flops / peak,
            "loss": None if peak is None else loss_flops / peak,
            "rest": moved / speed,
        },
    }


def shares_of(step: Callable[[], None]) -> dict[str, float]:
    """The share of each of PARTS in the time that operations took; they add up to 1."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    spent: Counter[str] = Counter()
    for event in found.events():
        spent[_part(event)] += event.self_cpu_time_total
    total = sum(spent.values())
    return {part: spent[part] / total for part in PARTS}


def _part(event: Any) -> str:
    """That of the outermost operation of this project around an event, or of the event itself."""
    part = "products" if event.name in PRODUCTS else "rest"
    while event is not None:
        if event.name.startswith("fastgrad::"):
            part = "loss" if "linear_loss" in event.name else "attention"
        event = event.cpu_parent
    return part


class _Moved(TorchDispatchMode):
    """The bytes that operations read and write, except views, products and the operations of this project."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not (func.is_view or name in PRODUCTS or name.startswith("fastgrad::")):
            tensors = [x for x in tree_leaves((args, kwargs or {}, result)) if isinstance(x, Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in tensors)
        return result


def counted(step: Callable[[], None]) -> tuple[int, int]:
    """Flops of the products, and the bytes that all else moves."""
    with FlopCounterMode(display=False) as flops:
        step()
    with _Moved() as moved:  # type: ignore[no-untyped-call]
        step()
    return flops.get_total_flops(), moved.moved
