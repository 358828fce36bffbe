"""The model of the kernels counts what they do: matrix flops and programs of every launch, in the interpreter."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from benchmarks.launches import load_kernels, write_kernels
from fastgrad_compiler.approximation.kernel_tiles import is_fused
from fastgrad_compiler.codegen.triton.configurations import FUSED_KERNELS, KERNELS
from fastgrad_compiler.runtime import triton_schedule as schedule
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.runtime.triton_attention import Launches
from fastgrad_compiler.runtime.triton_schedule import Shape, Tiles
from tests.gpu.interpreter import install, launches
from tests.grids import wide
from tests.kernels.inputs import COEFFICIENTS, make_inputs

install()

CHUNK, TILES = 64, Tiles(rows=32, keys=16, features=32)
CACHE = 1 << 30


class Flops:
    """Of the matrix products that the interpreter takes: 2 times rows, inner size and columns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total = 0
        product = interpreter.InterpreterBuilder.create_dot

        def counted(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
            self.total += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
            return product(builder, a, b, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)


def make_factors_once(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpret each factor of a tile of features once, as the compiler makes it: it drops repeated expressions."""
    made: dict[tuple[int, int, int], tuple[Any, Any]] = {}
    factor = kernels.factor

    def kept(x: Any, *rest: Any) -> Any:
        key = (id(x), _number(rest[6]), _number(rest[7]))  # tokens, first feature, p
        if key not in made:
            made[key] = (x, factor(x, *rest))  # x is kept too, so that no other has its id
        return made[key][1]

    def from_anew(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            made.clear()
            return function(*arguments)

        return call

    monkeypatch.setattr(kernels, "factor", kept)
    for name in ("add_state", "add_state_to_query", "add_state_to_key"):  # a loop of its own for each state
        monkeypatch.setattr(kernels, name, from_anew(getattr(kernels, name)))


def _number(value: Any) -> int:
    return int(value.handle.data.item() if hasattr(value, "handle") else value)


CASES = {
    "causal": (KernelSpec(16, 20, COEFFICIENTS[2], causal=True), 2, None, False),
    "cross": (KernelSpec(8, 16, COEFFICIENTS[3]), 1, 192, False),
    "near": (KernelSpec(8, 16, COEFFICIENTS[2], causal=True, near=32, near_d=20), 1, None, False),
    "near without a mask": (KernelSpec(8, 16, COEFFICIENTS[2], near=16), 1, None, False),
    "fused": (KernelSpec(8, 32, COEFFICIENTS[2], causal=True), 2, None, True),
    "gates": (KernelSpec(8, 16, COEFFICIENTS[2], causal=True, near=32, forget=True), 2, None, False),
    "gates, fused": (KernelSpec(8, 16, COEFFICIENTS[2], causal=True, forget=True), 1, None, True),
}


@pytest.mark.medium
@pytest.mark.parametrize("case", wide(CASES, few=["cross", "near", "gates, fused"]))
def test_flops_and_programs_are_those_of_the_launches(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, groups, m, fused = CASES[case]
    n = 128
    inputs = make_inputs(spec, n, m, groups=groups, heads=1, batch=1).to(torch.float32)
    kernels = load_kernels(write_kernels(spec, tmp_path, "kernels"))
    make_factors_once(kernels, monkeypatch)
    tiles = (TILES.rows, TILES.rows if fused else TILES.keys, TILES.features, 4, 1)
    for configurations in kernels.CONFIGS["sm_80"].values():
        configurations.update(dict.fromkeys((*KERNELS, *FUSED_KERNELS), tiles))
    assert not fused or is_fused(spec)
    *given, _ = (x if x is None else x.detach() for x in inputs.arguments)
    call = Launches(kernels, spec, *given)  # type: ignore[arg-type]
    call.fused, call.chunk = fused, CHUNK
    found = _counted(call, inputs.cotangent, Flops(monkeypatch), monkeypatch)

    shape = Shape(
        heads=groups,
        key_heads=1,
        n=n,
        m=m or n,
        d=spec.d,
        dv=spec.dv,
        degree=spec.degree,
        rank=kernels.RANK.value,
        dtype="float32",
        causal=spec.causal,
        near=spec.near or 0,
        near_d=spec.near_d or 0,
        forget=spec.forget,
    )
    works = schedule.works("fused" if fused else "parallel", shape, CHUNK, TILES, CACHE)
    expected = [(w.kernel, w.matrix_flops, w.programs) for w in (*works[0], *works[1])]
    assert found == expected


def _counted(
    call: Launches, cotangent: Tensor, flops: Flops, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, int, int]]:
    """Kernel, matrix flops and programs of each launch of both passes."""
    counts: list[int] = []
    run = interpreter.GridExecutor.__call__

    def recorded(*arguments: Any, **options: Any) -> None:
        before = flops.total
        run(*arguments, **options)
        counts.append(flops.total - before)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    with launches() as ran:
        saved = call.forward()
        call.backward(cotangent, *saved)
    return [(launch.kernel, count, launch.grid[0]) for launch, count in zip(ran, counts, strict=True)]
