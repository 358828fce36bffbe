"""Choosing the configurations of Triton kernels by timing them on the GPU at hand: `fastgrad tune`.

From the row of a kernel's table the search goes to the fastest neighbour, one number changed, and on from there for a
few rounds. A candidate counts only if it gives the results of the table's row. What is found is kept in the user's
cache, where `runtime/triton_tuned.py` reads it; a launch never times anything by itself.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgrad_compiler.approximation.kernel_tiles import has_triton
from fastgrad_compiler.attention.table import attention_table
from fastgrad_compiler.codegen.attention_kernels import kernel_spec
from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.runtime.private_files import cache_folder
from fastgrad_compiler.runtime.triton_attention import Launches, TritonAttention, architecture
from fastgrad_compiler.runtime.triton_kernels import cannot_build, refusal
from fastgrad_compiler.runtime.triton_tables import TILE
from fastgrad_compiler.runtime.triton_tuned import FILE, Configuration, entry_name, read
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.quote import json_text

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}  # share of the largest entry: sums reordered
ROUNDS = 3
WARM_UPS, REPEATS = 3, 20
FLUSHED_BYTES = 256 * 2**20  # more than the cache of any GPU
LEAST_GAIN = 0.02  # a share of the table's time: less is noise

# name of each number in a kernel's signature, the least and the most; the last two are not in it
TILES = ((("ROWS",), 16, 128), (("KEYS", "TOKENS"), 16, 128), (("FEATURES",), 16, TILE))
WARPS, STAGES = (2, 8), (1, 4)

Timer = Callable[[Callable[[], None]], float]
"""Seconds of a run."""
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""q, k, v, near_q, near_k, log_gate and mask."""


@dataclass(frozen=True)
class Shape:
    """Attentions of a model that the same kernels serve: their paths, and how many heads q and k have."""

    paths: tuple[str, ...]
    spec: KernelSpec
    heads: int
    key_heads: int


@dataclass(frozen=True)
class Work:
    """What is timed: sequences of a batch, tokens of each, type of the inputs, the device they are on."""

    batch: int
    tokens: int
    dtype: str
    device: torch.device


@dataclass(frozen=True)
class Choice:
    """What was found for a kernel; `tried` counts candidates that gave the right results."""

    kernel: str
    name: str  # of its entry in the file
    table: Configuration
    found: Configuration
    table_seconds: float
    seconds: float
    tried: int


def shapes(program: Program) -> tuple[Shape, ...]:
    """The attentions of a compiled program that Triton kernels serve."""
    found: dict[tuple[KernelSpec, int, int], list[str]] = {}
    for entry in attention_table(program):
        if entry.node.op != "poly_attention":
            continue
        graph = program[entry.graph]
        heads = tuple(
            (shape[-3].constant if len(shape) > 2 else None) or 1
            for shape in (graph[name].tensor.shape for name in entry.node.inputs[:2])
        )
        spec = kernel_spec(graph, entry.node)
        if has_triton(spec):
            found.setdefault((spec, heads[0], heads[1]), []).append(entry.path)
    return tuple(Shape(tuple(paths), *key) for key, paths in found.items())


def tuning_device(dtype: str) -> torch.device:
    """The GPU, or the CPU for Triton's interpreter; TfgError FG424 where kernels cannot run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (reason := refusal(torch.empty(0, dtype=DTYPES[dtype], device=device))) is not None:
        help_ = ("`--dry-run` lists what would be timed",)
        raise TfgError.of("FG424", f"GPU kernels cannot be timed here: {reason}", *help_)
    return device


def listed(shape: Shape, dtype: str) -> tuple[str, dict[str, tuple[Configuration, ...]]]:
    """The architecture, and for each kernel the row of its table and the candidates of the first round.

    TfgError FG424 where the kernels cannot be imported.
    """
    row = architecture(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    kernels = _kernels(shape)
    table = kernels.CONFIGS[row][dtype]
    return row, {
        name: (config, *neighbours(getattr(kernels, name), config)) for name, config in table.items()
    }


def neighbours(kernel: Any, config: Configuration) -> Iterator[Configuration]:
    """Configurations that differ from one in a number that the kernel takes: a tile or the warps twice or half."""
    for position, (names, least, most) in enumerate(TILES):
        if any(name in kernel.arg_names for name in names):
            for size in (config[position] // 2, config[position] * 2):
                if least <= size <= most:
                    yield (*config[:position], size, *config[position + 1 :])
    *tiles, warps, stages = config
    yield from ((*tiles, w, stages) for w in (warps // 2, warps * 2) if WARPS[0] <= w <= WARPS[1])
    yield from ((*tiles, warps, s) for s in (stages - 1, stages + 1) if STAGES[0] <= s <= STAGES[1])


def tune(shape: Shape, work: Work, timer: Timer, tell: Callable[[str], None]) -> list[Choice]:
    """The fastest configuration of each kernel that a forward and a backward pass launch."""
    search = _Search(shape, work, timer)
    choices = []
    for kernel in search.kernels:
        tell(f"{kernel} of {shape.paths[0]}")
        choices.append(search.best(kernel))
    return choices


def store(choices: list[Choice]) -> Path | None:
    """Add to the user's cache what is faster than the table, and forget there what is not; None without a cache."""
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / FILE
    known = read(path)
    for choice in choices:
        known.pop(choice.name, None)
        if choice.found != choice.table:
            known[choice.name] = choice.found
    write_atomically(path, json_text(dict(sorted(known.items())), 2) + "\n")
    return path


def cuda_timer(run: Callable[[], None]) -> float:
    """Median seconds of a run on the GPU, by its own events; its cache holds nothing of the run before."""
    for _ in range(WARM_UPS):
        run()
    marks = []
    for _ in range(REPEATS):
        _flushed().zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    milliseconds: float = statistics.median(begin.elapsed_time(end) for begin, end in marks)
    return milliseconds / 1e3


@cache
def _flushed() -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")


# ---------------------------------------------------------------- the search


class _Trial(Launches):
    """The launches of a pass, by other configurations if need be, which can be made again one kernel at a time."""

    trial: dict[str, Configuration]
    again: dict[str, list[Callable[[], None]]]

    def configuration(self, kernel: str) -> Configuration:
        return self.trial.get(kernel) or self.row(kernel)

    def _launch(self, name: str, *arguments: Any, **constants: Any) -> None:
        def launch() -> None:
            Launches._launch(self, name, *arguments, **constants)

        self.again.setdefault(name, []).append(launch)
        launch()


class _Search:
    """Candidates of the kernels of one attention on one set of inputs."""

    def __init__(self, shape: Shape, work: Work, timer: Timer) -> None:
        self.work, self.timer = work, timer
        self.attention, self.module = _attention(shape), _kernels(shape)
        self.inputs, self.cotangent = _inputs(shape, work)
        launches, self.expected = self._run({})
        self.table = {name: launches.configuration(name) for name in launches.again}

    @property
    def kernels(self) -> tuple[str, ...]:
        """Those that are launched, and have a configuration."""
        return tuple(self.table)

    def best(self, kernel: str) -> Choice:
        """Go to the fastest neighbour as long as there is one that is faster."""
        table = best = self.table[kernel]
        known = {table: self._seconds(kernel, table)}
        for _ in range(ROUNDS):
            new = [c for c in neighbours(getattr(self.module, kernel), best) if c not in known]
            known.update({config: self._seconds(kernel, config) for config in new})
            fastest = min(known, key=known.__getitem__)
            if fastest == best:
                break
            best = fastest
        if known[best] > (1 - LEAST_GAIN) * known[table]:
            best = table
        name = entry_name(self.module, self.work.device, self.work.dtype, kernel)
        right = sum(seconds < float("inf") for seconds in known.values())
        return Choice(kernel, name, table, best, known[table], known[best], right)

    def _seconds(self, kernel: str, config: Configuration) -> float:
        """Of the launches of a kernel; infinite where it cannot be built or gives other results."""
        try:
            launches, results = self._run({kernel: config})
        except Exception as error:
            if not cannot_build(error):
                raise
            return float("inf")
        if not all(map(self._agrees, results, self.expected)):
            return float("inf")

        def run() -> None:
            for launch in launches.again[kernel]:
                launch()

        return self.timer(run)

    def _run(self, trial: dict[str, Configuration]) -> tuple[_Trial, tuple[Tensor, ...]]:
        launches = _Trial(self.module, self.attention.spec, *self.inputs)
        launches.trial, launches.again = trial, {}
        saved = launches.forward()
        return launches, (*saved, *launches.backward(self.cotangent, *saved))

    def _agrees(self, found: Tensor, expected: Tensor) -> bool:
        if not expected.numel():
            return True
        expected = expected.float()
        allowed = TOLERANCE[self.work.dtype] * (1 + expected.abs().max())
        return bool((found.float() - expected).abs().max() <= allowed)  # False for NaN


def _attention(shape: Shape) -> TritonAttention:
    function = load_kernel(shape.spec, BACKENDS["triton"])
    attention: TritonAttention = sys.modules[function.__module__].TRITON
    return attention


def _kernels(shape: Shape) -> ModuleType:
    try:
        return _attention(shape).kernels()
    except (ImportError, OSError) as error:
        raise TfgError.of("FG424", f"GPU kernels cannot be imported here: {error}") from None


def _inputs(shape: Shape, work: Work) -> tuple[Inputs, Tensor]:
    """Random numbers from a fixed seed, and the gradient of the output; no token is padding."""
    generator = torch.Generator(work.device).manual_seed(0)
    spec = shape.spec

    def random(heads: int, width: int) -> Tensor:
        size = (work.batch, heads, work.tokens, width)
        return torch.randn(size, generator=generator, device=work.device)

    def rows(heads: int, width: int) -> Tensor:
        return normalize(random(heads, width), dim=-1).to(DTYPES[work.dtype])

    near = [rows(heads, spec.near_d) if spec.near_d else None for heads in (shape.heads, shape.key_heads)]
    values, cotangent = (
        random(heads, spec.dv).to(DTYPES[work.dtype]) for heads in (shape.key_heads, shape.heads)
    )
    whole = torch.ones((work.batch, work.tokens), dtype=torch.bool, device=work.device)
    mask = whole if spec.padding else None
    q, k = rows(shape.heads, spec.d), rows(shape.key_heads, spec.d)
    # what a token leaves of the weights before it: 0.95 in the median
    gates = -torch.exp(random(shape.key_heads, 1).squeeze(-1) - 3.0) if spec.forget else None
    return (q, k, values, near[0], near[1], gates, mask), cotangent
