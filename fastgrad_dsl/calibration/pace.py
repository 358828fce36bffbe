"""How fast this machine serves attention: lines fitted to a micro-benchmark of some ten seconds, kept in the cache.

    seconds of a call, forward and backward = overhead + flops / rate

one line each for polynomial kernels of the target, for PyTorch's fused softmax, and for exact attention in blocks (near
fields, windows, documents, forget gates). Flops are those of `fastgrad_compiler.planning.cost`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, ClassVar, cast

import torch
from msgspec import Meta
from torch import Tensor

from fastgrad_compiler.planning.cost import DOUBLE, Shape, Way, flops
from fastgrad_compiler.runtime.exact_attention import exact_attention
from fastgrad_compiler.runtime.private_files import cache_folder
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.bench.contenders import Attention, Contender
from fastgrad_dsl.bench.machine import describe_machine
from fastgrad_dsl.bench.timing import time_together
from fastgrad_dsl.documents.base import Document, Target, picked
from fastgrad_dsl.documents.calibration import Pace, PaceKind
from fastgrad_dsl.documents.form import built
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.storage.files import write_atomically

HEADS, D, DV, DEGREE, NEAR = 8, 16, 64, 2, 64
LENGTHS = (512, 4096)
KEYS_AT = 1024  # length at which a call's overhead is told in keys
MOST = 1e30  # flops a second and seconds of a call; beyond, a file is broken
REPEATS, SECONDS = 5, 1.0  # of each contender at each length
GATED = 1.3  # times as long a polynomial takes with forget gates in PyTorch (measured); in C++ hardly longer
LEAST_RATE_SHARE = 0.1  # a fitted rate is at least this share of what the longer call alone shows


class Line(Document, frozen=True):
    """Seconds of a call: `overhead`, and its flops at `rate` a second."""

    overhead: Annotated[float, Meta(ge=0, le=MOST)]
    rate: Annotated[float, Meta(gt=0, le=MOST)]

    def seconds(self, work: int) -> float:
        """Of a call of so many flops, all heads and both passes."""
        return self.overhead + work / self.rate


class MachinePace(Document, frozen=True):
    """The three lines, what they were measured on, and whether they were (`kind`: measured or default).

    It is a model of cost (`fastgrad_compiler.planning.cost.Cost`).
    """

    polynomial: Line
    fused: Line
    blocks: Line
    target: Target
    machine: str
    threads: int
    kind: PaceKind
    step: ClassVar[int] = 1

    def seconds(self, shape: Shape, way: Way) -> float:
        """Of one attention, forward and backward, of a batch of one (an estimate).

        Exact attention is fused, by PyTorch or by a native kernel, which is as fast; or in blocks: with a near field
        that has logits of its own and, without native kernels, with documents, forget gates or a window. A polynomial
        on all pairs is in blocks.
        """
        work = shape.heads * flops(shape, way).total
        if way.degree is not None and not way.dense:
            gated = GATED if shape.forget and not BACKENDS[self.target].cpp else 1.0
            return gated * self.polynomial.seconds(work) / (DOUBLE if way.precision == "float64" else 1.0)
        masked = shape.documents or shape.forget or shape.window is not None
        in_blocks = way.dense or shape.near is not None or (masked and not BACKENDS[self.target].cpp)
        return (self.blocks if in_blocks else self.fused).seconds(work)

    @property
    def document(self) -> Pace:
        """As the calibration's document names it."""
        a_pair = _exact_flops(KEYS_AT) / KEYS_AT**2
        return picked(
            Pace,
            self,
            speed=round(self.polynomial.rate / self.fused.rate, 2),
            keys=round(self.fused.overhead * self.fused.rate / (a_pair * KEYS_AT)),
        )


# Measured on a server CPU with AVX-512, two threads (docs/performance.md), rounded.
_NATIVE_RATE, _TORCH_RATE, _FUSED_RATE, _BLOCKS_RATE = 3.0e11, 1.0e11, 1.6e11, 4.0e10


def default_pace(target: str) -> MachinePace:
    """Round figures where nothing is measured."""
    rate = _NATIVE_RATE if BACKENDS[target].cpp else _TORCH_RATE
    return MachinePace(
        polynomial=Line(1e-4, rate),
        fused=Line(1e-4, _FUSED_RATE),
        blocks=Line(5e-4, _BLOCKS_RATE),
        target=cast("Target", target),
        machine="",
        threads=torch.get_num_threads(),
        kind="default",
    )


def machine_pace(target: str) -> MachinePace:
    """The pace of this machine for a target, measured once and kept in the cache of native kernels."""
    threads = torch.get_num_threads()
    described = describe_machine(threads)
    identity = {key: described[key] for key in ("cpu", "cores", "torch", "compiler", "fastgrad", "threads")}
    folder = cache_folder()
    name = hashlib.sha256(json.dumps([target, identity], sort_keys=True).encode()).hexdigest()[:16]
    path = None if folder is None else folder / f"pace-{name}.json"
    if path is not None and path.exists():
        with suppress(OSError, ValueError, RecursionError):  # a broken file is measured anew
            kept: MachinePace = built(MachinePace, json.loads(path.read_text(encoding="utf-8")))
            return kept
    pace = _measure(target, str(described["cpu"]), threads)
    if path is not None:
        with suppress(OSError):  # it is measured again another time
            write_atomically(path, to_json(pace))
    return pace


def _measure(target: str, machine: str, threads: int) -> MachinePace:
    served = Contender(HEADS, D, DV, DEGREE, target=target)
    contenders: dict[str, tuple[Attention, Callable[[int], int]]] = {
        "polynomial": (served.ready(), lambda n: served.flops(n).total),
        "fused": (Contender(HEADS, D, DV).ready(), _exact_flops),
        "blocks": (_blocks, _exact_flops),
    }
    attentions = {name: attention for name, (attention, _) in contenders.items()}
    short, long = (time_together(attentions, served.inputs(n), REPEATS, SECONDS) for n in LENGTHS)
    lines = {
        name: _fit(work(LENGTHS[0]), work(LENGTHS[1]), short[name].total, long[name].total)
        for name, (_, work) in contenders.items()
    }
    return MachinePace(
        **lines, target=cast("Target", target), machine=machine, threads=threads, kind="measured"
    )


def _exact_flops(n: int) -> int:
    return HEADS * flops(Shape(n=n, m=n, d=D, dv=DV)).total


def _blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return exact_attention(q, k, v, q, k, scale=1.0, causal=True, near=NEAR)


def _fit(short: int, long: int, fast: float, slow: float) -> Line:
    """The line through two calls; one that is far too steep or flat, from noise, is bounded by the longer call."""
    rate = (long - short) / (slow - fast) if slow > fast else long / slow
    rate = min(max(rate, LEAST_RATE_SHARE * long / slow), 1 / LEAST_RATE_SHARE * long / slow)
    return Line(max(0.0, fast - short / rate), rate)
