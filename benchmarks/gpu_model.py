"""The Triton kernels on paper, beside FlashAttention by the same rule: bytes, flops, roofline times. No measurement."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from benchmarks.settings import ROOT, Settings, heading, say
from fastgrad_compiler.planning import cost
from fastgrad_compiler.planning.roofline import Roofline, best, flash_time, shape_of, timed
from fastgrad_compiler.runtime.triton_schedule import (
    DEVICES,
    TILES,
    Device,
    Shape,
    Work,
    can_fuse,
    choose_chunk,
    kernel_time,
    works,
)

ARCHITECTURES = ("sm_80", "sm_90", "gfx942")
HEADS, DTYPE = 8, "bfloat16"
CASES = ((16, 64, 2), (8, 64, 2), (16, 64, 3), (32, 64, 2), (64, 64, 2), (64, 128, 2))
LENGTHS = (16_384, 65_536, 1_048_576)
KERNELS_AT = 65_536  # tokens, for the table of kernels
FUSED_AT = 16_384  # tokens, for the number of heads from which on a program a head is enough
MOST_HEADS = 1 << 14
RESOURCES = ROOT / "tests" / "golden" / "triton_resources.json"


def kernels(device: Device, shape: Shape, schedule: str, chunk: int) -> tuple[Work, ...]:
    """The launches of both passes, in order."""
    forward, backward = works(schedule, shape, chunk, TILES, device.cache)
    return forward + backward


def limit(work: Work, device: Device, dtype: str) -> str:
    """What a kernel waits for by the model: "memory", "matrix" or "vector" units."""
    only = {
        "memory": replace(work, pair_flops=0, feature_flops=0, vector_flops=0),
        "matrix": replace(work, bytes=0, vector_flops=0),
        "vector": replace(work, bytes=0, pair_flops=0, feature_flops=0),
    }
    return max(only, key=lambda unit: kernel_time(only[unit], device, dtype))


def measure(settings: Settings) -> dict[str, object]:
    """The section `gpu_model` of the JSON. It measures nothing; a quick run is no different."""
    say("the model of the GPU kernels")
    golden = json.loads(RESOURCES.read_text(encoding="utf-8")) if RESOURCES.exists() else {}
    cases = [shape_of(heads=HEADS, n=KERNELS_AT, d=d, dv=dv, degree=degree) for d, dv, degree in CASES]
    return {
        **heading(settings),
        "quick": False,
        "shape": {"batch": 1, "heads": HEADS, "dtype": DTYPE, "causal": True},
        "devices": [{"architecture": name, **asdict(DEVICES[name])} for name in ARCHITECTURES],
        "kernels": [row for shape in cases for row in _kernels(shape, golden)],
        "times": [row for shape in cases for row in _times(shape)],
        "break_even": [row for shape in cases for row in _break_even(shape)],
        "fused_from": [row for shape in cases if can_fuse(shape) for row in _fused_from(shape)],
    }


def resources(golden: Mapping[str, Any], architecture: str, shape: Shape, kernel: str) -> dict[str, object]:
    """Registers a thread and occupancy (0 to 1) of a compiled kernel; None each where they are not known.

    golden: by architecture, dtype, "d16 dv64 degree2" and kernel, as ahead-of-time compilation found them.
    """
    found: Any = golden
    for key in (architecture, shape.dtype, f"d{shape.d} dv{shape.dv} degree{shape.degree}", kernel):
        found = found.get(key, {})
    return {"registers": found.get("registers"), "occupancy": found.get("occupancy")}


def _sizes(shape: Shape) -> dict[str, object]:
    return {"d": shape.d, "dv": shape.dv, "degree": shape.degree, "rank": shape.rank}


def _kernels(shape: Shape, golden: Mapping[str, Any]) -> Iterator[dict[str, object]]:
    """Each kernel once; the chunk is the one that is chosen for an H100, the same on every device here."""
    chunk = choose_chunk(DEVICES["sm_90"], shape)
    for schedule in ("parallel", "fused") if can_fuse(shape) else ("parallel",):
        launches = kernels(DEVICES["sm_90"], shape, schedule, chunk)
        for part, work in _labelled(launches):
            yield {
                **_sizes(shape),
                "n": shape.n,
                "schedule": schedule,
                "chunk": chunk if schedule == "parallel" else None,
                "kernel": work.kernel,
                "of": part,
                "bytes": work.bytes,
                "matrix_flops": work.matrix_flops,
                "vector_flops": work.vector_flops,
                "programs": work.programs,
                "on": {
                    name: {
                        "seconds": kernel_time(work, DEVICES[name], shape.dtype),
                        "limit": limit(work, DEVICES[name], shape.dtype),
                        **resources(golden, name, shape, work.kernel),
                    }
                    for name in ARCHITECTURES
                },
            }


def _labelled(launches: tuple[Work, ...]) -> Iterator[tuple[str | None, Work]]:
    """Launches that differ, with whose states those of a kernel that runs more than once are."""
    names = [work.kernel for work in launches]
    seen: list[Work] = []
    for work in launches:
        if names.count(work.kernel) > 1:
            part = "queries" if "query_gradient_kernel" in names[: len(seen)] else "keys"
            repeated = any(work == other for other in seen)
            seen.append(work)
            if not repeated:
                yield part, work
        else:
            seen.append(work)
            yield None, work


def _times(shape: Shape) -> Iterator[dict[str, object]]:
    for name in ARCHITECTURES:
        device = DEVICES[name]
        for n in LENGTHS:
            longer = replace(shape, n=n, m=n)
            flash, ideal = flash_time(device, longer), flash_time(device, longer, ideal=True)
            chunk = choose_chunk(device, longer)
            parallel = timed(device, longer, "parallel", chunk)
            fused = timed(device, longer, "fused", chunk) if can_fuse(longer) else None
            yield {
                **_sizes(shape),
                "architecture": name,
                "n": n,
                "schedule": best(device, longer).schedule,
                "chunk": parallel.chunk,
                "parallel_forward_s": parallel.forward,
                "parallel_total_s": parallel.total,
                "fused_forward_s": None if fused is None else fused.forward,
                "fused_total_s": None if fused is None else fused.total,
                "flash_forward_s": flash[0],
                "flash_total_s": flash[1],
                "flash_ideal_total_s": ideal[1],
            }


def _break_even(shape: Shape) -> Iterator[dict[str, object]]:
    at, way = cost.Shape(n=shape.n, m=shape.m, d=shape.d, dv=shape.dv), cost.Way(shape.degree)
    for name in ARCHITECTURES:
        row = {**_sizes(shape), "architecture": name}
        for key, ideal in (("padded_n", False), ("ideal_n", True)):
            n = cost.break_even(Roofline(DEVICES[name], shape.heads, shape.dtype, ideal), at, way)
            row[key] = None if n == cost.NEVER else n
        yield row


def _fused_from(shape: Shape) -> Iterator[dict[str, object]]:
    for name in ARCHITECTURES:
        heads = _least_heads(DEVICES[name], replace(shape, n=FUSED_AT, m=FUSED_AT))
        yield {**_sizes(shape), "architecture": name, "n": FUSED_AT, "heads": heads}


def _least_heads(device: Device, shape: Shape) -> int | None:
    """The least power of two of heads times batch from which on the fused schedule is chosen."""
    least, heads = None, MOST_HEADS
    while heads and best(device, replace(shape, heads=heads, key_heads=heads)).schedule == "fused":
        least, heads = heads, heads // 2
    return least
