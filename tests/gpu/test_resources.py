"""What the kernels of the examples and of a sampled grid use on four architectures, without a GPU.

tests/golden/triton_resources.json holds it, made by `python -m benchmarks.resources`; read its changes in the diff.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from benchmarks.gpu_model import RESOURCES
from benchmarks.resources import Case, cases, compile_cases

GOLDEN = json.loads(RESOURCES.read_text(encoding="utf-8"))
WITHOUT_PRODUCTS = ("scan_kernel", "delta_kernel")


def entries() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for target, types in GOLDEN.items():
        for dtype, labels in types.items():
            for label, kernels in labels.items():
                for kernel, entry in kernels.items():
                    yield f"{target} {dtype} {label} {kernel}", kernel, entry


# float32 by tf32x3 with wide heads: no candidate fits the registers of an A100; docs/targets.md says so.
SPILLING = [f"sm_80 float32 d64 dv128 degree4 {kernel}_gradient_kernel" for kernel in ("key", "query")]
# A few words since rows that are not finite are selected before products. Tiles without spills would be far smaller:
# which of the two is faster, a GPU has to say.
SPILLING_A_LITTLE = [
    "sm_100 bfloat16 d64 dv24 degree2 near128 query_gradient_kernel",
    "sm_100 bfloat16 d64 dv64 degree2 query_gradient_kernel",
    "sm_100 bfloat16 d8 dv64 degree2 fused_query_gradient_kernel",
    "sm_80 bfloat16 d64 dv128 degree2 forward_kernel",
    "sm_80 bfloat16 d64 dv64 degree2 key_gradient_kernel",
    "sm_90 bfloat16 d64 dv128 degree2 key_gradient_kernel",
    "sm_90 float16 d12 dv20 degree3 unmasked padding near24 near_d20 query_gradient_kernel",
]
LITTLE = 25  # words of four bytes a thread


def test_every_kernel_fits_and_all_but_those_named_spill_nothing() -> None:
    assert all(entry["fits"] for _, _, entry in entries())
    spills = {name: entry["spills"] for name, _, entry in entries() if entry["spills"]}
    assert sorted(spills) == sorted([*SPILLING, *SPILLING_A_LITTLE])
    assert max(spills[name] for name in SPILLING_A_LITTLE) <= LITTLE


def test_every_product_is_made_of_matrix_instructions() -> None:
    with_products = [(name, e) for name, kernel, e in entries() if kernel not in WITHOUT_PRODUCTS]
    assert [name for name, e in with_products if e["scalar_dots"] or not e["matrix_instructions"]] == []
    assert all(e["dots"] > 0 for _, e in with_products)


def test_main_operands_are_loaded_128_bits_at_a_time() -> None:
    """Where a thread's part of a tile of values or of a state is that large: bfloat16, values of 32 and more."""
    kernels = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")
    narrow = [
        name for name, kernel, e in entries() if kernel in kernels and _wide(name) and "128" not in e["loads"]
    ]
    assert narrow == []


def _wide(name: str) -> bool:
    _, dtype, _, dv, *_ = name.split()
    return dtype == "bfloat16" and int(dv.removeprefix("dv")) >= 32


Key = tuple[str, str, str]
"""The target, the type and the label of a case."""


@cache
def cases_by_key() -> dict[Key, Case]:
    return {(case.target, case.dtype, case.label): case for case in cases()}


KEYS: list[Key] = [
    (target, dtype, label) for target, of in GOLDEN.items() for dtype, ls in of.items() for label in ls
]
QUICK = ("sm_90", "bfloat16", "d8 dv64 degree2")


@pytest.mark.medium
def test_the_golden_file_is_of_these_cases() -> None:
    assert set(KEYS) == set(cases_by_key())


@pytest.mark.medium
@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=[] if key == QUICK else pytest.mark.slow, id=" ".join(key)) for key in KEYS],
)
def test_compiling_ahead_of_time_gives_the_golden_file(key: Key) -> None:
    target, dtype, label = key
    case = cases_by_key()[key]
    assert compile_cases((case,))[case] == GOLDEN[target][dtype][label]
