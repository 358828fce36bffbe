"""What 1, 2 and 4 processes of this machine send and take in a training step, to hold the model against.

Each runs examples/gpt.tfg, small, on its piece of a sequence, with the weights in parts on all of them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fastgrad_dsl as fg
from benchmarks.scaling.sizes import Decoder
from benchmarks.settings import ROOT
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.bench.memory import STATUS, peak_of, resident
from fastgrad_dsl.distributed import context_parallel, shard_model, shard_sequence
from fastgrad_dsl.distributed.traffic import Traffic, counted

SMALL = Decoder(layers=2, width=64, heads=4, hidden=256, vocab=256, near=16)
PINGED, PINGS = 1 << 22, 21  # bytes, and how often


@dataclass(frozen=True)
class Taken:
    """Of one process: tokens of the sequence; seconds of a step, and the share of them in collectives; what it sent.

    by: bytes by the name of the collective, of which there are so many calls. base: bytes of the process when the model
    is there; peak: by how many the first step raises that, None where it is not known.
    """

    rank: int
    n: int
    seconds: float
    waiting: float
    by: dict[str, float]
    calls: int
    base: int
    peak: int | None


@dataclass(frozen=True)
class Request:
    """What the processes are to run: sizes, lengths of sequences, and steps at each of them after one to warm up.

    Without such steps the first one counts.
    """

    decoder: Decoder
    lengths: Sequence[int]
    steps: int


def compiled_of(decoder: Decoder) -> Compiled:
    """The model of these sizes. ValueError where examples/gpt.tfg has no such one."""
    if (decoder.hidden, decoder.vocab, decoder.d) != (4 * decoder.width, 256, 16):
        raise ValueError("gpt.tfg has a hidden width of 4 times its width, 256 bytes and keys of 16")
    params = {
        "depth": decoder.layers,
        "d_model": decoder.width,
        "heads": decoder.heads,
        "near": decoder.near,
    }
    return fg.compile(ROOT / "examples" / "gpt.tfg", params=params, target="torch", validate=False)


@dataclass(frozen=True)
class Wire:
    """From one process to another: seconds of a collective that sends next to nothing, and bytes a second."""

    latency: float = 0.0
    bandwidth: float = float("inf")


def taken(ranks: int, request: Request) -> tuple[list[Taken], Wire]:
    """What each of so many processes took and sent at each length, and what is between them."""
    with tempfile.TemporaryDirectory() as folder:
        begin: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]  # exported without saying so
        begin(_begin, (ranks, request, folder), nprocs=ranks)
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
    return [each for one, _ in found for each in one], found[0][1]


def _begin(rank: int, ranks: int, request: Request, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("context",))
    compiled = compiled_of(request.decoder)
    model = shard_model(compiled.module(seed=0), mesh)
    found = [_steps(compiled, model, mesh, n, request, rank) for n in request.lengths]
    torch.save((found, _wire(rank, ranks)), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _steps(compiled: Compiled, model: nn.Module, mesh: Any, n: int, request: Request, rank: int) -> Taken:
    shape = (request.decoder.batch, n + 1)
    text = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(n))
    pieces = shard_sequence((text[:, :-1], text[:, 1:]), mesh)
    found: list[tuple[float, Traffic]] = []

    def step() -> None:
        model.zero_grad()
        dist.barrier()
        started = time.perf_counter()
        with context_parallel(mesh), counted() as traffic:
            assert compiled.loss is not None
            compiled.loss(model(pieces[0]), pieces[1]).backward()
        found.append((time.perf_counter() - started, traffic))

    base = resident() if STATUS.exists() else 0
    peak = peak_of(step)
    for _ in range(request.steps):
        step()
    steps = found[1:] or found
    seconds = median(each for each, _ in steps)
    waiting = median(traffic.seconds / each for each, traffic in steps)
    return Taken(rank, n, seconds, waiting, steps[-1][1].bytes, steps[-1][1].calls, base, peak)


def _wire(rank: int, ranks: int) -> Wire:
    """Measured between the first process and the second, while the others take part; nothing where there is one."""
    if ranks == 1:
        return Wire()
    short, long = (_sending(rank, ranks, size) for size in (1, PINGED))
    return Wire(short / 2, PINGED / max(long - short, 1e-9))


def _sending(rank: int, ranks: int, size: int) -> float:
    """The median of the seconds of two collectives: one that sends so many bytes, and one that says they are there."""
    sent, given = [0] * ranks, [0] * ranks
    if rank == 0:
        sent[1] = size
    if rank == 1:
        given[0] = size
    x, out = torch.zeros(sum(sent), dtype=torch.uint8), torch.zeros(sum(given), dtype=torch.uint8)
    nothing = torch.zeros(1)
    times = []
    for _ in range(PINGS):
        dist.all_reduce(nothing)
        started = time.perf_counter()
        dist.all_to_all_single(out, x, given, sent)
        dist.all_reduce(nothing)
        times.append(time.perf_counter() - started)
    return median(times)
