"""What the emitted Triton kernels use on each architecture, compiled ahead of time: makes a golden file.

python -m benchmarks.resources [--missing]: an hour on two cores; with --missing only cases that the file lacks, and
those that it no longer needs are dropped. tests/gpu/test_resources.py compares with it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import fastgrad_dsl as fg
from benchmarks.ahead import Ahead, Job, Resources
from benchmarks.gpu_model import CASES, RESOURCES
from benchmarks.launches import jobs, write_kernels
from benchmarks.settings import ROOT
from fastgrad_compiler.approximation.kernel_tiles import has_triton, is_fused
from fastgrad_compiler.codegen.attention_kernels import kernel_spec
from fastgrad_compiler.codegen.triton.configurations import FUSED_KERNELS, configurations
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_dsl.storage.files import write_atomically

COEFFICIENTS = (1.0, 1.0, 0.5, 0.2, 0.05)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Wide heads, odd widths, padding, near fields and each type of inputs, on one architecture each.
GRID = (
    (KernelSpec(64, 128, COEFFICIENTS, causal=True), "float32", "sm_80"),
    (KernelSpec(12, 20, COEFFICIENTS[:4], near=24, near_d=20, padding=True), "float16", "sm_90"),
    (KernelSpec(32, 128, COEFFICIENTS[:4]), "bfloat16", "gfx942"),
    (KernelSpec(9, 33, COEFFICIENTS[:2], causal=True), "float32", "gfx942"),
    (KernelSpec(64, 24, COEFFICIENTS[:3], causal=True, near=128), "bfloat16", "sm_100"),
)

Entry = dict[str, object]
Golden = dict[str, dict[str, dict[str, dict[str, Entry]]]]


@dataclass(frozen=True)
class Case:
    """The kernels of a specification for one type of inputs on one architecture."""

    spec: KernelSpec
    dtype: str
    target: str

    @property
    def label(self) -> str:
        """What the golden file calls the specification."""
        s = self.spec
        parts = [f"d{s.d} dv{s.dv} degree{s.degree}", "" if s.causal else "unmasked", "padding" * s.padding]
        parts += [f"near{s.near}" if s.near else "", f"near_d{s.near_d}" if s.near_d else ""]
        parts += ["forget" * s.forget]
        return " ".join(filter(None, parts))


def cases() -> tuple[Case, ...]:
    """Those of the model's page on every architecture, of the examples on one, and a sample of others."""
    every = (
        *(
            Case(KernelSpec(d, dv, COEFFICIENTS[: degree + 1], causal=True), "bfloat16", target)
            for d, dv, degree in CASES
            for target in TARGETS
        ),
        *(Case(spec, "bfloat16", "sm_80") for spec in specifications_of_examples()),
        *(Case(*entry) for entry in GRID),
    )
    return tuple({(case.label, case.dtype, case.target): case for case in every}.values())


def specifications_of_examples() -> Iterator[KernelSpec]:
    """Of the kernels of all models in examples/."""
    for path in sorted((ROOT / "examples").glob("*.tfg")):
        for graph in fg.compile(path, target="triton").program.graphs:
            for node in graph.nodes:
                if node.op == "poly_attention" and has_triton(spec := kernel_spec(graph, node)):
                    yield spec


def compile_cases(selected: tuple[Case, ...], workers: int = 2) -> dict[Case, dict[str, Entry]]:
    """The entries of each case by kernel; RuntimeError where one does not compile."""
    with tempfile.TemporaryDirectory() as folder, Ahead(workers) as ahead:
        launches: list[tuple[Case, str, Job]] = []
        for number, case in enumerate(selected):
            file = write_kernels(case.spec, Path(folder), f"kernels_{number}")
            for fused in (False, True) if _walks(case) else (False,):
                found = jobs(case.spec, file, getattr(torch, case.dtype), case.target, fused)
                launches += [(case, name, job) for name, job in found.items() if not fused or "fused" in name]
        results = ahead.map([job for _, _, job in launches])
    entries: dict[Case, dict[str, Entry]] = {case: {} for case in selected}
    for (case, name, _), result in zip(launches, results, strict=True):
        if not isinstance(result, Resources):
            raise RuntimeError(f"{name} of {case} does not compile: {result.error}")
        entries[case][name] = entry(result)
    return entries


def _walks(case: Case) -> bool:
    """Whether the schedule of fused kernels is there to be chosen."""
    there = configurations(case.spec, is_fused(case.spec))[case.target][case.dtype]
    return FUSED_KERNELS[0] in there


def entry(result: Resources) -> Entry:
    """What the golden file keeps of a compiled kernel."""
    return {
        "registers": result.registers,
        "spills": result.spills,
        "shared": result.shared,
        "fits": result.fits,
        "occupancy": round(result.occupancy, 4),
        "dots": result.dots,
        "scalar_dots": result.scalar_dots,
        "matrix_instructions": result.matrix_instructions,
        "loads": {str(bits): n for bits, n in sorted(Counter(load.bits for load in result.loads).items())},
    }


def spilling() -> Iterator[tuple[Case, str]]:
    """The kernels of the golden file that spill, by case and name of the launch."""
    golden: Golden = json.loads(RESOURCES.read_text(encoding="utf-8"))
    for case in cases():
        for name, found in golden.get(case.target, {}).get(case.dtype, {}).get(case.label, {}).items():
            if found["spills"] or not found["fits"]:
                yield case, name


def main() -> None:
    """Write the golden file, or the cases that it lacks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--missing", action="store_true", help="only cases that the golden file lacks")
    old: Golden = json.loads(RESOURCES.read_text(encoding="utf-8")) if parser.parse_args().missing else {}
    golden: Golden = {}
    for case in sorted(
        cases(), key=lambda case: case.label not in old.get(case.target, {}).get(case.dtype, {})
    ):
        kernels = old.get(case.target, {}).get(case.dtype, {}).get(case.label) or compile_cases((case,))[case]
        for name, found in kernels.items():
            if found["spills"] or found["scalar_dots"] or not found["fits"]:
                print(f"{case.target} {case.dtype} {case.label} {name}: {found}", flush=True)
        golden.setdefault(case.target, {}).setdefault(case.dtype, {})[case.label] = kernels
        write_atomically(RESOURCES, json.dumps(golden, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
