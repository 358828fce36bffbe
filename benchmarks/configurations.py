"""Choose the tiles, warps and stages of Triton kernels by compiling them ahead of time: makes the compiler's table.

python -m benchmarks.configurations [PART OF A KEY ...]: about an hour on two cores; with arguments only those rows.
python -m benchmarks.configurations --repair: smaller tiles for the rows whose kernels spill in the file that
benchmarks.resources makes, which is to be made anew then.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from benchmarks.ahead import Ahead, Job, Resources
from benchmarks.launches import jobs, write_kernels
from fastgrad_compiler.codegen.triton.configurations import (
    ARCHITECTURES,
    D_CLASSES,
    DEGREE_CLASSES,
    DV_CLASSES,
    FUSED_DV_CLASSES,
    FUSED_KERNELS,
    KERNELS,
    ROW_OF,
    TABLE,
    TYPES,
    Configuration,
    key,
)
from fastgrad_compiler.runtime.kernel_spec import KernelSpec

# Groups of one size of tile, the largest first: ROWS, KEYS, FEATURES, warps, stages.
CANDIDATES: tuple[tuple[Configuration, ...], ...] = (
    ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
    ((64, 64, 32, 4, 2), (64, 32, 32, 4, 1)),
    ((128, 32, 32, 8, 1),),
    ((32, 32, 32, 2, 1),),
    ((64, 16, 16, 4, 1), (16, 16, 16, 1, 1)),
    ((32, 16, 16, 4, 1), (16, 16, 16, 2, 1), (16, 16, 16, 4, 1)),
)
SINGLE_CANDIDATES: tuple[tuple[Configuration, ...], ...] = (
    ((64, 32, 32, 4, 1),),
    ((32, 32, 32, 2, 1),),
    ((32, 16, 16, 2, 1), (64, 16, 16, 4, 1)),
    ((16, 16, 16, 1, 1), (16, 16, 16, 2, 1)),
)
STATE_CANDIDATES: tuple[tuple[Configuration, ...], ...] = (
    ((64, 64, 64, 4, 3), (64, 64, 64, 4, 2)),
    ((64, 32, 64, 4, 1),),
    ((64, 32, 32, 2, 1), (64, 32, 32, 4, 1)),
    ((64, 16, 16, 1, 1), (64, 16, 16, 4, 1)),
)
FUSED_CANDIDATES: tuple[tuple[Configuration, ...], ...] = (
    ((64, 64, 64, 4, 2), (64, 64, 64, 4, 1)),
    ((32, 32, 64, 4, 2), (32, 32, 64, 4, 1)),
    ((32, 32, 64, 2, 1), (32, 32, 64, 8, 1)),
    ((16, 16, 64, 4, 1), (16, 16, 64, 1, 1), (16, 16, 64, 2, 1)),
)
TIGHT = range(249, 257)
COEFFICIENTS = (1.0, 1.0, 0.5, 0.2, 0.05)


def candidates(kernel: str, dtype: str) -> tuple[tuple[Configuration, ...], ...]:
    """What is tried for a kernel, group by group."""
    if kernel == "state_kernel":
        return STATE_CANDIDATES
    if kernel.startswith("fused"):
        return FUSED_CANDIDATES
    return SINGLE_CANDIDATES if dtype == "float32" else CANDIDATES


def classes() -> Iterator[tuple[KernelSpec, bool]]:
    """The hardest member of each class, and whether it is for the fused kernels."""
    for d in D_CLASSES:
        for dv in DV_CLASSES:
            for degree in DEGREE_CLASSES["bfloat16"]:
                plain = KernelSpec(d, dv, COEFFICIENTS[: degree + 1], causal=True, padding=True)
                yield plain, False
                yield replace(plain, near=24, near_d=min(d, 32)), False
    for dv in FUSED_DV_CLASSES:
        walked = KernelSpec(8, dv, COEFFICIENTS[:3], causal=True, padding=True)
        yield walked, True
        yield replace(walked, forget=True), True


def configured(job: Job, configuration: Configuration) -> Job:
    """The same launch with other tiles, warps and stages."""
    rows, keys, features, warps, stages = configuration
    tiles = {"ROWS": rows, "KEYS": keys, "TOKENS": keys, "FEATURES": features}
    constants = {n: tiles.get(n, value) for n, value in job.constants.items()}
    return replace(job, constants=constants, num_warps=warps, num_stages=stages)


def is_good(result: object) -> bool:
    """Whether a kernel can run without spilling, with matrix instructions for all of its products."""
    if not isinstance(result, Resources):
        return False
    return result.fits and not result.spills and not result.scalar_dots and result.matrix_instructions > 0


def is_tight(result: object) -> bool:
    """Whether nearly all of the 255 registers of a thread are taken: a relative of the kernel's class might spill."""
    return isinstance(result, Resources) and result.registers in TIGHT


def choose(
    ahead: Ahead, launches: list[Job], groups: tuple[tuple[Configuration, ...], ...]
) -> Configuration | None:
    """The best configuration with which all of the launches of a kernel are good; None if no candidate is.

    One that is tight is taken only where no other is good.
    """
    spare: Configuration | None = None
    for group in groups:
        tried = [(c, ahead.map([configured(job, c) for job in launches])) for c in group]
        good = [(c, results) for c, results in tried if all(map(is_good, results))]
        easy = [item for item in good if not any(map(is_tight, item[1]))]
        if easy:
            return max(easy, key=lambda item: (_occupancy(item[1]), item[0][0]))[0]
        spare = spare or (good[0][0] if good else None)
    return spare


def _occupancy(results: Sequence[object]) -> float:
    return min(result.occupancy for result in results if isinstance(result, Resources))


def main() -> None:
    """Fill the table, row by row; what is there of other rows stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="only rows whose key has all of these")
    parser.add_argument("--missing", action="store_true", help="only rows that the table lacks")
    parser.add_argument(
        "--repair", action="store_true", help="only rows with kernels that spill all the same"
    )
    arguments = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if arguments.repair:
        _repair(table)
        return
    with tempfile.TemporaryDirectory() as folder, Ahead(workers=2) as ahead:
        for row, launches in _rows(Path(folder)):
            if not all(part in row for part in arguments.parts) or (arguments.missing and row in table):
                continue
            chosen = choose(ahead, launches, candidates(launches[0].kernel, row.split()[1]))
            print(f"{row}: {chosen}", flush=True)
            if chosen is not None:
                table[row] = list(chosen)
                _write(table)


def _rows(folder: Path) -> Iterator[tuple[str, list[Job]]]:
    """The keys of the table, and the launches that decide each."""
    for number, (spec, fused) in enumerate(classes()):
        file = write_kernels(spec, folder, f"kernels_{number}")
        types = [t for t in TYPES if t not in ROW_OF and (fused or spec.degree in DEGREE_CLASSES[t])]
        for architecture, dtype in product(ARCHITECTURES, types):
            by_kernel: dict[str, list[Job]] = {}
            for job in jobs(spec, file, getattr(torch, dtype), architecture, fused).values():
                by_kernel.setdefault(job.kernel, []).append(job)
            for kernel, launches in by_kernel.items():
                if kernel in (KERNELS if not fused else FUSED_KERNELS):
                    yield key(architecture, dtype, kernel, spec), launches


def _repair(table: dict[str, list[int]]) -> None:
    """Give rows whose kernels spill the next smaller configuration with which none does."""
    from benchmarks.resources import spilling

    rows: dict[str, list[tuple[KernelSpec, str, str, str]]] = {}
    for case, launch in spilling():
        row = key(case.target, case.dtype, launch.split()[0], case.spec)
        rows.setdefault(row, []).append((case.spec, case.dtype, case.target, launch))
    with tempfile.TemporaryDirectory() as folder, Ahead(workers=2) as ahead:
        for row, members in rows.items():
            launches = []
            for spec, dtype, target, launch in members:
                file = write_kernels(spec, Path(folder), f"kernels_{len(list(Path(folder).iterdir()))}")
                launches.append(
                    jobs(spec, file, getattr(torch, dtype), target, launch.startswith("fused"))[launch]
                )
            kernel, dtype = launches[0].kernel, members[0][1]
            tried = table.get(row)
            groups = candidates(kernel, dtype)
            at = next((i for i, group in enumerate(groups) if tried and tuple(tried) in group), -1)
            chosen = choose(ahead, launches, groups[at + 1 :])
            print(f"{row}: {tried} -> {chosen}", flush=True)
            if chosen is not None:
                table[row] = list(chosen)
            elif kernel.startswith("fused"):
                table.pop(row, None)
            _write(table)


def _write(table: dict[str, list[int]]) -> None:
    lines = ",\n".join(f"  {json.dumps(row)}: {json.dumps(table[row])}" for row in sorted(table))
    TABLE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
