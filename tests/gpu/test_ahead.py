"""What ahead-of-time compilation reports of kernels whose virtues and faults are known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.ahead import ARCHITECTURES, Ahead, Argument, Constant, Failure, Job, Resources, Result
from benchmarks.machine_code import occupancy, scalar_dots

KERNELS = Path(__file__).with_name("kernels.py")
NVIDIA = [target for target, architecture in ARCHITECTURES.items() if architecture.backend == "cuda"]


@pytest.fixture(scope="module")
def ahead() -> Iterator[Ahead]:
    with Ahead(workers=1) as processes:
        yield processes


def dot(target: str, element: str, precision: str, size: int = 32) -> Job:
    pointers = {"a": element, "b": element, "out": "fp32*"}
    constants: dict[str, Constant] = {"SIZE": size, "INNER": size, "PRECISION": precision}
    return Job(KERNELS, "dot_kernel", pointers, constants, target, num_warps=2)


def add(target: str, n: int, width: int = 1024) -> Job:
    return Job(
        KERNELS, "add_kernel", {"x": "fp32*", "y": "fp32*", "out": "fp32*", "n": n}, {"WIDTH": width}, target
    )


def compiled(results: list[Result]) -> list[Resources]:
    assert all(isinstance(result, Resources) for result in results), results
    return [result for result in results if isinstance(result, Resources)]


@pytest.mark.medium
def test_products_of_halves_use_matrix_instructions(ahead: Ahead) -> None:
    for resources in compiled(ahead.map(dot(target, "bf16*", "ieee") for target in ARCHITECTURES)):
        assert resources.fits
        assert resources.spills == 0
        assert resources.dots >= 1
        assert resources.scalar_dots == 0
        assert resources.matrix_instructions > 0
        assert resources.shared > 0


@pytest.mark.medium
def test_exact_products_of_float32_are_scalar_on_nvidia(ahead: Ahead) -> None:
    for target, resources in zip(
        ARCHITECTURES, compiled(ahead.map(dot(t, "fp32*", "ieee") for t in ARCHITECTURES)), strict=True
    ):
        assert resources.scalar_dots == (target in NVIDIA)
        assert (resources.matrix_instructions == 0) == (target in NVIDIA)


@pytest.mark.medium
def test_split_products_are_as_many_matrix_products_as_their_parts(ahead: Ahead) -> None:
    jobs = [
        dot("sm_80", "fp32*", "tf32x3"),
        dot("sm_90", "fp32*", "bf16x6"),
        dot("gfx942", "fp32*", "bf16x3"),
    ]
    results = compiled(ahead.map(jobs))
    assert [(r.dots, r.scalar_dots) for r in results[:2]] == [(3, 0), (6, 0)]
    assert results[2].scalar_dots == 0
    assert results[2].matrix_instructions > 0


@pytest.mark.medium
def test_a_kernel_with_too_many_values_spills(ahead: Ahead) -> None:
    pointers: dict[str, Argument] = {"x": "fp32*", "out": "fp32*", "n": 4}
    jobs = [
        Job(KERNELS, "registers_kernel", pointers, {"SIZE": size}, "sm_90", num_warps=1) for size in (32, 128)
    ]
    small, large = compiled(ahead.map(jobs))
    assert small.spills == small.stack == 0
    assert large.spills > 0
    assert large.stack >= 4


@pytest.mark.medium
def test_width_of_loads(ahead: Ahead) -> None:
    """Four neighbours are one load where n is divisible by 16, so that a mask never parts them."""
    line = 1 + KERNELS.read_text().split("\n").index(
        "    total = tl.load(x + i, mask=i < n, other=0.0) + tl.load(y + i, mask=i < n, other=0.0)"
    )
    for target in ARCHITECTURES:
        wide, narrow = compiled(ahead.map([add(target, 4096), add(target, 4095)]))
        assert {(load.line, load.bits) for load in wide.loads} == {(line, 128)}
        assert len(narrow.loads) > len(wide.loads)
        assert all(load.bits < 128 for load in narrow.loads)


@pytest.mark.medium
def test_integers_and_absent_pointers_are_specialised_as_in_a_launch(ahead: Ahead) -> None:
    job = Job(
        KERNELS, "optional_kernel", {"x": "bf16*", "bias": "none", "out": "bf16*"}, {"WIDTH": 1024}, "sm_80"
    )
    without, with_bias = compiled(
        ahead.map([job, Job(**vars(job) | {"arguments": {**job.arguments, "bias": "fp32*"}})])
    )
    assert [load.bits for load in without.loads] == [128]
    assert len(with_bias.loads) > 1


@pytest.mark.medium
def test_a_kernel_that_does_not_compile_is_a_failure_and_the_next_one_compiles(ahead: Ahead) -> None:
    rejected, missing, accepted = ahead.map(
        [dot("gfx942", "fp32*", "tf32x3"), Job(KERNELS, "no_kernel", {}, {}, "sm_80"), add("sm_80", 64)]
    )
    assert isinstance(rejected, Failure)
    assert "input_precision must be one of" in rejected.error
    assert isinstance(missing, Failure)
    assert "no_kernel" in missing.error
    assert isinstance(accepted, Resources)


def test_a_job_that_takes_too_long_is_a_failure(tmp_path: Path) -> None:
    endless = tmp_path / "endless.py"
    endless.write_text("import time\ntime.sleep(60)\n")
    with Ahead(workers=1, limit=1) as processes:
        (result,) = processes.map([Job(endless, "kernel", {}, {}, "sm_80")])
    assert isinstance(result, Failure)
    assert "status -9" in result.error


@pytest.mark.medium
def test_a_job_that_ends_its_process_is_a_failure_and_the_next_one_compiles(tmp_path: Path) -> None:
    ends = tmp_path / "ends.py"
    ends.write_text("import os\nprint('a last word', flush=True)\nos._exit(3)\n")
    job = Job(ends, "kernel", {}, {}, "sm_80")
    with Ahead(workers=1) as processes:
        failure, after = processes.map([job, add("sm_80", 4096)])
    assert failure == Failure("the compiler ended with status 3: a last word\n")
    assert isinstance(after, Resources)


def test_workers_compile_although_the_tests_interpret(ahead: Ahead) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    compiled(ahead.map([add("sm_80", 4096)]))


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "columns", "expected"),
    [
        ("sm_80", 32, 0, 4, 0, 1.0),
        ("sm_80", 255, 0, 8, 0, 8 / 64),  # 65536 registers are 256 for each of 256 threads
        ("sm_80", 128, 0, 4, 0, 16 / 64),
        ("sm_80", 129, 0, 4, 0, 12 / 64),  # 136 are given out: 3 warps in each quarter
        ("sm_80", 32, 0, 1, 0, 32 / 64),  # 32 blocks at most
        ("sm_80", 32, 163 << 10, 4, 0, 4 / 64),
        ("sm_80", 32, 81 << 10, 4, 0, 8 / 64),  # with 1 KiB of the system's, two are all of 164 KiB
        ("sm_90", 32, 81 << 10, 4, 0, 8 / 64),
        ("sm_90", 32, 75 << 10, 4, 0, 12 / 64),
        ("sm_100", 32, 0, 4, 200, 8 / 64),  # 256 of 512 columns
        ("gfx942", 128, 0, 4, 0, 16 / 32),
        (
            "gfx942",
            147,
            0,
            4,
            0,
            12 / 32,
        ),  # what LLVM notes beside such a kernel: an occupancy of 3 waves a unit
        ("gfx942", 512, 0, 4, 0, 4 / 32),
        ("gfx942", 32, 32 << 10, 4, 0, 8 / 32),
    ],
)
def test_occupancy(
    target: str, registers: int, shared: int, warps: int, columns: int, expected: float
) -> None:
    assert occupancy(ARCHITECTURES[target], registers, shared, warps, columns) == expected


def test_scalar_dots_are_those_in_a_blocked_layout() -> None:
    program = """
#blocked = #ttg.blocked<{sizePerThread = [1, 4], order = [1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0}>
  %4 = tt.dot %a, %b, %c : tensor<4xf32, #ttg.dot_op<{opIdx = 0, parent = #mma}>> * tensor<4xf32> -> tensor<4xf32,
  #mma> %5 = tt.dot %a, %b, %c : tensor<4xf32, #ttg.dot_op<{opIdx = 0}>> * tensor<4xf32> -> tensor<4xf32, #blocked>
  loc(#1)
"""
    assert scalar_dots(program) == 1
