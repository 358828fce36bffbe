"""What a training step of examples/gpt.tfg spends its time on: products, attention, the loss, all else, and floors.

A floor is what the step would take if its products ran at the peak of the machine's multiply-adds, and all else at the
speed at which memory is read: each operation reading its operands and writing its result once.

Beside it is the step with torch.compile in place of the pass `fuse`: inductor fuses what stands between the products,
and attention and the loss are the same kernels.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.generation import bandwidth
from benchmarks.settings import ROOT, Settings, heading, say
from fastgrad_compiler.passes import fuse
from fastgrad_dsl.api.compiled import compile as compile_spec
from fastgrad_dsl.bench.peak import peak_flops

SPEC = ROOT / "examples" / "gpt.tfg"
LENGTHS, QUICK_LENGTHS = (4096, 16_384), (64, 128)
VOCABULARIES, QUICK_VOCABULARIES = (256, 32_000), (256,)
LONGEST_OF_MANY = 4096  # tokens with more classes than bytes
PRODUCTS = frozenset(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"))
OPERATIONS = {  # of this project, by part; what is fused is part of the rest
    "attention": ("fastgrad::attention_", "fastgrad::exact_attention_"),
    "loss": ("fastgrad::linear_loss_",),
}
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
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, n + 1), generator=generator)

    def step_of(model: Any, loss: Callable[..., Tensor]) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad(set_to_none=True)
            loss(tokens[:, :-1], tokens[:, 1:]).backward()

        step()  # builds what is built once
        return step

    def model() -> Any:
        return compile_spec(SPEC, params={"vocab": vocabulary}, target=settings.target).module(seed=0)

    own = model()
    step = step_of(own, own.loss)
    with patch.object(fuse, "_groups", lambda graph: ()):
        unfused = model()
    peer = step_of(unfused, torch.compile(unfused.loss))
    seconds, peer_seconds, shares = [], [], []
    for _ in range(1 if settings.quick else 3):
        seconds.append(seconds_of(step))
        peer_seconds.append(seconds_of(peer))
        shares.append(shares_of(step))
    flops, moved = counted(step)
    width = own.table.shape[1]
    loss_flops = 6 * n * width * vocabulary
    return {
        "n": n,
        "classes": vocabulary,
        "seconds": statistics.median(seconds),
        "inductor_seconds": statistics.median(peer_seconds),
        "shares": {part: statistics.median(share[part] for share in shares) for part in PARTS},
        "flops": {"products": flops, "loss": loss_flops},
        "rest_bytes": moved,
        "floors": {
            "products": None if peak is None else flops / peak,
            "loss": None if peak is None else loss_flops / peak,
            "rest": moved / speed,
        },
    }


def seconds_of(step: Callable[[], None]) -> float:
    """Of one step."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


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
        part = next((own for own, names in OPERATIONS.items() if event.name.startswith(names)), part)
        event = event.cpu_parent
    return part


class _Moved(TorchDispatchMode):
    """The bytes that operations read and write, except views, products, attention and the loss."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not (func.is_view or name in PRODUCTS or name.startswith(sum(OPERATIONS.values(), ()))):
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
