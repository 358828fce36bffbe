"""Generation with examples/gpt.tfg against the same model on softmax with its cache of keys and values.

    python -m benchmarks.run --section generation

A token after contexts of several lengths, and the time to the first token of a prompt. The state of a context is filled
with random numbers where it would take long to read it: what a step costs does not depend on them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.settings import ROOT, Settings, heading, say
from fastgrad_dsl.api.compiled import compile as compile_spec

SPEC = ROOT / "examples" / "gpt.tfg"
DECLARED, LONGER = "dim n <= 65536", "dim n <= 1048576"
CONTEXTS, QUICK_CONTEXTS = (1024, 16_384, 65_536, 262_144), (64, 128)
BATCHES = (1, 16)
PROMPTS, QUICK_PROMPTS = (16_384, 65_536), (256,)
MOST_STATE = 5e9  # bytes of a cache that is measured; a copy of it fits into memory too
TURNS = 3  # of all contenders at one context; a median is of all tokens of all turns
MODELS: Mapping[str, Mapping[str, object]] = {"mixer": {}, "softmax": {"softmax": True}}
"""Of params; softmax runs on PyTorch's scaled_dot_product_attention, as does a token whose cache is long."""


def measure(settings: Settings) -> dict[str, object]:
    """The section `generation` of the JSON."""
    text = SPEC.read_text()
    if DECLARED not in text:
        raise RuntimeError(f"{SPEC.name} has no line {DECLARED!r} to declare more tokens in")
    made: dict[str, Any] = {
        name: compile_spec(text.replace(DECLARED, LONGER), params=params, target=settings.target).module()
        for name, params in MODELS.items()
    }
    contexts = QUICK_CONTEXTS if settings.quick else CONTEXTS
    tokens = [
        row for batch in BATCHES for context in contexts for row in _tokens(made, context, batch, settings)
    ]
    prompts = [
        row for length in (QUICK_PROMPTS if settings.quick else PROMPTS) for row in _prompt(made, length)
    ]
    return {
        **heading(settings),
        "weights_bytes": sum(x.numel() * x.element_size() for x in made["mixer"].parameters()),
        "bytes_per_second": bandwidth(),
        "products": [{"batch": batch, "seconds": _products(made["mixer"], batch)} for batch in BATCHES],
        "tokens": tokens,
        "prompts": prompts,
    }


# ---------------------------------------------------------------- tokens


def _tokens(made: Mapping[str, Any], context: int, batch: int, settings: Settings) -> list[dict[str, object]]:
    """A row for each model; one whose state is too large has no time."""
    say(f"a token after {context:,}, batch {batch}")
    rows = {name: _row(name, model, context, batch) for name, model in made.items()}
    states = {
        name: _filled(model, context, batch)
        for name, model in made.items()
        if rows[name]["state_bytes"] <= MOST_STATE
    }
    given, seconds = torch.zeros((batch, 1), dtype=torch.int64), dict[str, list[float]]()
    for _ in range(TURNS):
        for name, state in states.items():
            seconds.setdefault(name, []).extend(_timed(partial(made[name].step, given, state), settings))
    return [{**row, "seconds": statistics.median(seconds[name]) if name in seconds else None}
            for name, row in rows.items()]  # fmt: skip


def _row(name: str, model: Any, context: int, batch: int) -> dict[str, Any]:
    """With the bytes of the state, from those of one with half as much capacity where it is a cache."""
    small, large = (model.start(1, capacity=size).nbytes for size in (1024, 2048))
    each = (large - small) / 1024
    state = batch * (small + each * (max(context, 64) - 1024 if each else 0))
    return {"model": name, "context": context, "batch": batch, "state_bytes": int(state)}


def _filled(model: Any, context: int, batch: int) -> Any:
    """The state of a context, with random numbers for what its tokens would have left."""
    generator = torch.Generator().manual_seed(0)
    state = model.start(batch, capacity=context + 1024)
    for tensor in state.tensors.values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.1, generator=generator)
    state.position.fill_(context)
    return state


def _timed(run: Callable[[], object], settings: Settings) -> list[float]:
    """Seconds of calls, one to warm up before them."""
    run()
    found: list[float] = []
    while len(found) < 8 * settings.repeats and sum(found) < settings.less / TURNS:
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return found


# ---------------------------------------------------------------- what bounds a token


def _products(model: Any, batch: int) -> float:
    """The median of all products with weights of one token."""
    weights = [x for x in model.parameters() if x.ndim == 2 and x.shape[0] > 4]  # not those of convolutions
    given = {size: torch.randn(batch, size) for size in {x.shape[0] for x in weights}}

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [given[x.shape[0]] @ x for x in weights]

    return statistics.median(_timed(run, Settings(seconds=6.0)))


def bandwidth() -> float:
    """Bytes a second that a sum over 256 MiB reads."""
    numbers = torch.ones(2**26)
    return numbers.numel() * 4 / min(_timed(numbers.sum, Settings(seconds=6.0)))


# ---------------------------------------------------------------- prompts


def _prompt(made: Mapping[str, Any], length: int) -> list[dict[str, object]]:
    """The time to the first token of a prompt, and of the forward pass of the whole text."""
    given = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, object]] = []
    for name, model in made.items():
        say(f"a prompt of {length:,} tokens: {name}")
        model.step(given[:, :256], model.start(1, capacity=512))
        state = model.start(1, capacity=length)
        started = time.perf_counter()
        model.step(given, state)
        first = time.perf_counter() - started
        with torch.no_grad():
            started = time.perf_counter()
            model(given)
            whole = time.perf_counter() - started
        rows.append({"model": name, "length": length, "seconds": first, "forward_seconds": whole})
    return rows
