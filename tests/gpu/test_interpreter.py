"""The interpreter computes as a GPU does, and finds what a GPU would not forgive."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gpu import arithmetic, kernels
from tests.gpu.interpreter import Atomic, Launch, OutOfBounds, Race, install, launches

install()

HALVES = [torch.float16, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


# Arithmetic


def special_numbers() -> Tensor:
    """Ties, subnormal numbers, numbers near the largest, infinity, and all sizes between."""
    ties = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 2**-133, -(2**-134), 3.3961e38, torch.inf, -0.0]
    )
    return torch.cat([ties, normal(5000) * torch.exp(30 * normal(5000, seed=1))])


def test_rounding_to_bfloat16_is_torchs() -> None:
    numbers = special_numbers()
    assert np.array_equal(arithmetic.bfloat16(numbers.numpy()), numbers.bfloat16().float().numpy())
    assert np.isnan(arithmetic.bfloat16(np.array([np.nan], np.float32))).all()


def test_rounding_to_tf32_is_to_the_nearest_of_eleven_bits() -> None:
    numbers = special_numbers().double().numpy()
    numbers = numbers[np.isfinite(numbers) & (np.abs(numbers) > 2.0**-126) & (np.abs(numbers) < 3e38)]
    mantissa, exponent = np.frexp(numbers)  # mantissa in [1/2, 1): eleven bits are whole numbers of 2^-11
    away = np.sign(mantissa) * np.floor(np.abs(mantissa) * 2**11 + 0.5) / 2**11
    toward = np.trunc(mantissa * 2**11) / 2**11
    assert np.array_equal(arithmetic.tf32_rounded(numbers.astype(np.float32)), np.ldexp(away, exponent))
    assert np.array_equal(arithmetic.tf32_truncated(numbers.astype(np.float32)), np.ldexp(toward, exponent))


def test_rounding_to_tf32_keeps_what_is_not_finite() -> None:
    numbers = np.array([np.inf, -np.inf], np.float32)
    assert np.array_equal(arithmetic.tf32_rounded(numbers), numbers)
    assert np.isnan(arithmetic.tf32_rounded(np.array([np.nan], np.float32))).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_each_operation_rounds_as_torchs_does(dtype: torch.dtype) -> None:
    x, y = normal(1024, dtype=dtype) + 3, normal(1024, dtype=dtype, seed=1)
    out = nothing(1024, dtype=dtype)
    kernels.chain_kernel[(1,)](x, y, out, WIDTH=1024)
    value = (2 * x * y + y) / x - 0.5 * x
    assert torch.equal(out, torch.where(value < y, torch.maximum(x, y), value))


def test_sums_of_bfloat16_are_rounded_once() -> None:
    x = normal(8, 32, dtype=torch.bfloat16)
    sums, largest, running = (nothing(*shape, dtype=torch.bfloat16) for shape in ((8,), (8,), (8, 32)))
    kernels.reduce_kernel[(1,)](x, sums, largest, running, ROWS=8, COLUMNS=32)
    torch.testing.assert_close(sums, x.float().sum(1).bfloat16(), rtol=2**-8, atol=1e-6)
    assert torch.equal(largest, x.max(1).values)
    torch.testing.assert_close(running, x.float().cumsum(1).bfloat16(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_products_of_halves_are_summed_in_float32(dtype: torch.dtype) -> None:
    a, b, out = normal(32, 64, dtype=dtype), normal(64, 32, dtype=dtype, seed=1), nothing(32, 32)
    kernels.dot_kernel[(1,)](a, b, out, SIZE=32, INNER=64, PRECISION="ieee")
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=0, atol=1e-5)


def product_error(precision: str) -> float:
    """Largest error of a product of 32 x 64 and 64 x 32 normal numbers, over the sum of the sizes of its terms."""
    a, b, out = normal(32, 64), normal(64, 32, seed=1), nothing(32, 32)
    kernels.dot_kernel[(1,)](a, b, out, SIZE=32, INNER=64, PRECISION=precision)
    terms = a.double().abs() @ b.double().abs()
    return float(((out.double() - a.double() @ b.double()).abs() / terms).max())


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [
        # The unit roundoffs: a factor of 2^-10 lost by truncation, 2^-22 after two of eleven bits, 2^-16 and 2^-24
        # after two and three of eight; errors of the terms average out, so that the largest seen lies below.
        ("tf32", 2**-14, 2**-9),
        ("tf32x3", 2**-30, 2**-20),
        ("bf16x3", 2**-22, 2**-15),
        ("bf16x6", 2**-30, 2**-20),
        ("ieee", 2**-30, 2**-21),
    ],
)
def test_input_precision_has_the_error_of_its_split(precision: str, least: float, most: float) -> None:
    assert least < product_error(precision) < most


def test_products_of_factors_that_tf32_holds_are_exact() -> None:
    a, b = normal(16, 16, dtype=torch.float16).float(), normal(16, 16, dtype=torch.float16, seed=1).float()
    out, exact = nothing(16, 16), nothing(16, 16)
    kernels.dot_kernel[(1,)](a, b, out, SIZE=16, INNER=16, PRECISION="tf32")
    kernels.dot_kernel[(1,)](a, b, exact, SIZE=16, INNER=16, PRECISION="ieee")
    assert torch.equal(out, exact)


@pytest.mark.parametrize("precision", ["tf32x3", "bf16x3", "bf16x6"])
def test_splits_keep_infinity(precision: str) -> None:
    a, b, out = torch.ones(16, 16), torch.ones(16, 16), nothing(16, 16)
    a[0, 0] = torch.inf
    kernels.dot_kernel[(1,)](a, b, out, SIZE=16, INNER=16, PRECISION=precision)
    assert torch.isposinf(out[0]).all()
    assert torch.equal(out[1:], torch.full((15, 16), 16.0))


def test_a_product_too_short_for_the_compiler_is_refused() -> None:
    with pytest.raises(Exception, match="K >= 16"):
        kernels.dot_kernel[(1,)](
            normal(16, 8), normal(8, 16), nothing(16, 16), SIZE=16, INNER=8, PRECISION="ieee"
        )


# The record


def test_launches_are_recorded() -> None:
    x, out = normal(40), nothing(40)
    with launches() as outer:
        kernels.add_kernel[(3,)](x, x, out, 40, WIDTH=16)
        with launches() as inner:
            kernels.shifted_kernel[lambda arguments: (1, 1)](x, out, 8, SHIFT=0, WIDTH=16)
    assert torch.equal(out[8:], 2 * x[8:])
    assert inner == [Launch("shifted_kernel", (1, 1, 1))]
    assert outer == [Launch("add_kernel", (3, 1, 1)), *inner]


# The sanitizer


@pytest.mark.parametrize("shift", [-1, 1])
def test_access_outside_a_tensor(shift: int) -> None:
    with pytest.raises(OutOfBounds, match=r"load of 1 of 64 lanes is outside x of shape \(64,\)"):
        kernels.shifted_kernel[(1,)](normal(64), nothing(64), 64, SHIFT=shift, WIDTH=64)


def test_access_between_the_elements_of_a_view() -> None:
    x = normal(4, 4)
    kernels.shifted_kernel[(1,)](x[:, :2], nothing(64), 2, SHIFT=4, WIDTH=4)
    with pytest.raises(OutOfBounds):
        kernels.shifted_kernel[(1,)](x[:, :2], nothing(64), 2, SHIFT=1, WIDTH=4)


def test_access_to_one_argument_through_another() -> None:
    both = normal(2, 64)
    with pytest.raises(OutOfBounds, match="outside x"):
        kernels.shifted_kernel[(1,)](both[0], both[1], 64, SHIFT=32, WIDTH=64)


def test_store_outside_a_tensor() -> None:
    with pytest.raises(OutOfBounds, match="store"):
        kernels.same_place_kernel[(4,)](nothing(3), STRIDE=1)


def test_masked_lanes_may_point_anywhere() -> None:
    x, out = normal(40), nothing(40)
    kernels.add_kernel[(3,)](x, x, out, 40, WIDTH=16)
    assert torch.equal(out, 2 * x)


def test_programs_that_write_one_element() -> None:
    kernels.same_place_kernel[(3,)](nothing(3), STRIDE=1)
    with pytest.raises(
        Race, match=r"program \(1, 0, 0\) writes what was written by \(0, 0, 0\): 1 elements of out"
    ):
        kernels.same_place_kernel[(3,)](nothing(3), STRIDE=0)


def test_program_that_reads_what_another_writes() -> None:
    x = torch.zeros(6)
    kernels.neighbour_kernel[(4,)](x, 0, SHIFT=0)
    assert x.tolist() == [1, 1, 1, 1, 0, 0]
    with pytest.raises(Race, match=r"program \(1, 0, 0\) writes what was read by \(0, 0, 0\)"):
        kernels.neighbour_kernel[(2,)](x, 0, SHIFT=1)
    with pytest.raises(Race, match=r"program \(1, 0, 0\) reads what was written by \(0, 0, 0\)"):
        kernels.neighbour_kernel[(2,)](x, 1, SHIFT=-1)


def test_program_that_writes_what_several_have_read() -> None:
    with pytest.raises(Race, match="writes what was read by several"):
        kernels.last_kernel[(3,)](torch.zeros(1))


def test_lanes_that_write_one_element() -> None:
    with pytest.raises(Race, match="lanes of one store"):
        kernels.lanes_kernel[(1,)](nothing(8), WIDTH=16)


def test_program_that_reads_what_it_wrote() -> None:
    x, out = normal(16), nothing(16)
    kernels.reread_kernel[(1,)](x, out, BARRIER=True, WIDTH=16)
    assert torch.equal(out, 2 * x.flip(0))
    with pytest.raises(Race, match="no barrier"):
        kernels.reread_kernel[(1,)](x, out, BARRIER=False, WIDTH=16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_lanes_that_were_never_loaded(dtype: torch.dtype) -> None:
    x, out = torch.ones(16, dtype=dtype), torch.zeros(2, dtype=dtype)
    kernels.masked_kernel[(1,)](x, out, 9, FILL=True, WIDTH=16)
    assert out.tolist() == [9, 1]
    kernels.masked_kernel[(1,)](x, out, 9, FILL=False, WIDTH=16)
    assert out.isnan().all()


def test_indices_that_were_never_loaded() -> None:
    index = torch.arange(16, dtype=torch.int32)
    kernels.masked_index_kernel[(1,)](normal(16), index, nothing(16), 16, WIDTH=16)
    with pytest.raises(OutOfBounds):
        kernels.masked_index_kernel[(1,)](normal(16), index, nothing(16), 15, WIDTH=16)


@pytest.mark.parametrize("kernel", [kernels.atomic_kernel, kernels.nested_atomic_kernel])
def test_atomic_operations(kernel: Any) -> None:
    with pytest.raises(Atomic):
        kernel[(2,)](normal(2), torch.zeros(1))


@pytest.mark.medium
def test_a_process_that_compiles_is_refused() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = "from tests.gpu.interpreter import install; install()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "TRITON_INTERPRET=1 must be set before" in done.stderr
