"""The launches of an attention's Triton kernels, recorded as jobs for compilation ahead of time.

They are those that the run-time code makes, on tensors without storage: what is compiled here is what a GPU runs.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.ahead import ELEMENTS, Argument, Constant, Job
from fastgrad_compiler.codegen.triton import emit_triton
from fastgrad_compiler.codegen.triton.configurations import FALLBACK, FUSED_KERNELS
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.runtime.triton_attention import Launches
from fastgrad_compiler.runtime.triton_kernels import DTYPES

BATCH, HEADS, TOKENS = 4, 16, 16384  # whose divisibility by 16 a kernel is compiled for
POINTERS = {getattr(torch, dtype): f"{name}*" for name, dtype in ELEMENTS.items()}


def write_kernels(spec: KernelSpec, folder: Path, name: str) -> Path:
    """The file of kernels that is emitted for a specification."""
    path = folder / f"{name}.py"
    path.write_text(emit_triton(spec), encoding="utf-8")
    return path


def load_kernels(path: Path) -> ModuleType:
    """A file of kernels as a module."""
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@dataclass
class Recorder:
    """Stands for the module of kernels: keeps what would be launched."""

    module: ModuleType
    file: Path
    target: str
    jobs: dict[str, Job] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return _Kernel(self, name, value) if name.endswith("_kernel") else value


class _Kernel:
    def __init__(self, recorder: Recorder, name: str, kernel: Any) -> None:
        self.recorder, self.name, self.kernel = recorder, name, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *arguments: object, **named: Any) -> None:
        """Record a launch; one of the same kernel with another constant is another job."""
        warps, stages = named.pop("num_warps", 4), named.pop("num_stages", 2)
        values = {n: _described(v) for n, v in zip(self.kernel.arg_names, arguments, strict=False)}
        constants: dict[str, Constant] = {n: _constant(v) for n, v in named.items()}
        label = self.name + (" of queries" if constants.get("UPSTREAM") else "")
        job = Job(self.recorder.file, self.name, values, constants, self.recorder.target, warps, stages)
        self.recorder.jobs.setdefault(label + (" near" if constants.get("MIXED") is False else ""), job)


def _described(value: object) -> Argument:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if value is None:
        return "none"
    assert isinstance(value, int)
    return value


def _constant(value: Any) -> Constant:
    if not hasattr(value, "name"):
        return value  # type: ignore[no-any-return]
    return f"tl.{value.name.replace('fp', 'float').replace('bf16', 'bfloat16')}"


def jobs(
    spec: KernelSpec, file: Path, dtype: torch.dtype, target: str, fused: bool = False
) -> dict[str, Job]:
    """The launches of a forward and a backward pass, by name.

    file: that `write_kernels` made. dtype: of the inputs. fused: the schedule that keeps the state in registers.
    """
    recorder = Recorder(load_kernels(file), file, target)
    if fused:  # also where the table has no row for them
        rows = recorder.module.CONFIGS[target][DTYPES[dtype]]
        rows |= {name: rows.get(name, FALLBACK) for name in FUSED_KERNELS}

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = tensor(BATCH, HEADS, TOKENS, spec.d), tensor(BATCH, HEADS, TOKENS, spec.d)
    v = tensor(BATCH, HEADS, TOKENS, spec.dv)
    near = [tensor(BATCH, HEADS, TOKENS, spec.near_d) if spec.near_d else None for _ in range(2)]
    mask = torch.empty((BATCH, TOKENS), dtype=torch.bool, device="meta") if spec.padding else None
    gates = torch.empty((BATCH, HEADS, TOKENS), device="meta") if spec.forget else None
    launches = Launches(recorder, spec, q, k, v, near[0], near[1], gates, mask, target)  # type: ignore[arg-type]
    launches.fused = fused
    out, denominator, maximum = launches.forward()
    launches.backward(torch.empty_like(out), out, denominator, maximum)
    return recorder.jobs
