"""The model of the GPU kernels: counts against loops that count each product, and what follows from them."""

from __future__ import annotations

import ast
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastgrad_compiler.planning import roofline
from fastgrad_compiler.planning.cost import EXACT, NEVER, Way, break_even
from fastgrad_compiler.planning.cost import Shape as Attention
from fastgrad_compiler.planning.roofline import Roofline, best, flash_time, shape_of
from fastgrad_compiler.runtime import triton_schedule as schedule
from fastgrad_compiler.runtime.triton_schedule import DEVICES, Device, Shape, Tiles, Work

A100, H100, MI300 = (DEVICES[name] for name in ("sm_80", "sm_90", "gfx942"))
UNLIMITED = 1 << 60


def test_a_last_chunk_ends_with_its_tokens() -> None:
    """72 tokens in chunks of 64: two tiles of 32 queries, then one that meets the 16 keys of one tile."""
    shape = shape_of(heads=1, n=72, d=16, dv=16, degree=2)
    pairs = schedule.dense_pairs(shape, 64, Tiles(rows=32, keys=16))
    assert pairs == 32 * 32 + 32 * 64 + 32 * 16


def test_tiles_are_summed_without_a_loop() -> None:
    """Of a near field that is longer than all sequences, too: `fastgrad check` hung on it."""
    draws = random.Random(0)
    for _ in range(2000):
        first, step, count, size = (draws.randint(least, 40) for least in (0, 1, 0, 1))
        expected = sum(-(-(first + i * step) // size) for i in range(count))
        assert schedule._tiles(first, step, count, size) == expected
    shape = shape_of(heads=1, n=1 << 40, d=16, dv=16, degree=2, near=1 << 62)
    pairs = schedule.dense_pairs(shape, 1 << 62, Tiles(rows=32, keys=16))
    assert (1 << 79) < pairs < (1 << 80)  # half of all


def test_bytes_counted_by_hand() -> None:
    """Two query heads on one key head, 256 tokens in two chunks, d = 16, dv = 32, rank 192, bfloat16."""
    shape = shape_of(heads=2, key_heads=1, n=256, d=16, dv=32, degree=2)
    state, scan, forward = schedule.parallel_forward(shape, 128, Tiles(), UNLIMITED)
    states = 2 * 192 * 33 * 4
    assert state.bytes == 256 * (16 + 32) * 2 + states
    assert scan.bytes == 2 * states
    assert forward.bytes == 2 * (256 * 48 * 2 + 256 * 48 * 2 + 256 * 4 + states)  # q, out; k, v; denominators
    delta, state, _, query, queries, _, key = schedule.parallel_backward(shape, 128, Tiles(), UNLIMITED)
    assert delta.bytes == 2 * 256 * (2 * 32 * 2 + 8)
    assert queries.bytes == 2 * 256 * (48 * 2 + 8) + states
    assert query.bytes == 2 * (256 * (48 * 2 + 8 + 16 * 2) + 256 * 48 * 2 + states)
    assert key.bytes == 256 * 48 * 2 * 2 + 2 * 256 * (48 * 2 + 8) + states
    assert state.vector_flops == 256 * 192 * 2


def test_what_does_not_fit_the_cache_is_read_by_each_tile() -> None:
    shape = shape_of(heads=1, n=256, d=16, dv=32, degree=2)
    fits = schedule.parallel_forward(shape, 128, Tiles(), shape.state_bytes)
    small = schedule.parallel_forward(shape, 128, Tiles(), shape.state_bytes - 1)
    states = 2 * shape.state_bytes
    assert small[2].bytes - fits[2].bytes == states  # two tiles of 64 queries in each chunk, not one reading
    tiny = schedule.parallel_forward(shape, 128, Tiles(), 128 * 48 * 2 - 1)
    assert tiny[0].bytes - fits[0].bytes == 2 * 256 * 48 * 2  # 192 features are three programs


def test_one_state_serves_all_queries_without_a_mask() -> None:
    shape = shape_of(heads=1, n=256, d=16, dv=32, degree=2, causal=False)
    _, scan, forward = schedule.parallel_forward(shape, 128, Tiles(), UNLIMITED)
    assert scan.bytes == 3 * shape.state_bytes
    assert forward.bytes == 256 * (48 * 2 + 4) + shape.state_bytes
    assert forward.pair_flops == 0


def test_time_is_that_of_the_slowest_unit_over_the_share_of_the_device() -> None:
    device = replace(H100, half=4.0, tf32=2.0, single=1.0, vector=8.0, bandwidth=16.0, multiprocessors=10)
    work = Work("a kernel", 32, 8, 4, 8, 10)
    assert schedule.kernel_time(work, device, "bfloat16") == 8 / 4 + 4 / 4
    assert schedule.kernel_time(work, device, "float16") == 8 / 4 + 4 / 2
    assert schedule.kernel_time(work, device, "float32") == 12
    assert schedule.kernel_time(replace(work, bytes=160), device, "bfloat16") == 10
    assert schedule.kernel_time(replace(work, vector_flops=80), device, "bfloat16") == 10
    assert schedule.kernel_time(replace(work, programs=5), device, "bfloat16") == 6
    assert schedule.kernel_time(replace(work, programs=50), device, "bfloat16") == 3


def test_the_chosen_chunk_takes_the_least_time() -> None:
    for heads, n in ((1, 4096), (64, 65_536)):
        shape = shape_of(heads=heads, n=n, d=16, dv=64, degree=2)
        chunk = schedule.choose_chunk(H100, shape)
        times = {c: schedule.modelled_time(H100, shape, "parallel", c) for c in schedule.CHUNKS}
        assert chunk == min(times, key=times.__getitem__)


def test_fused_is_for_many_heads_and_parallel_for_few() -> None:
    few = shape_of(heads=8, n=16_384, d=8, dv=64, degree=2)
    many = shape_of(heads=512, n=16_384, d=8, dv=64, degree=2)
    assert schedule.choose_schedule(H100, few) == "parallel"
    assert schedule.choose_schedule(H100, many) == "fused"
    for other in (
        replace(many, degree=3),
        replace(many, causal=False),
        replace(many, near=64),
        replace(many, rank=128),
    ):
        assert schedule.choose_schedule(H100, other) == "parallel"


def test_flash_attention_is_padded_to_its_width() -> None:
    shape = shape_of(heads=2, key_heads=1, n=1024, d=16, dv=64, degree=2)
    forward, _, backward = roofline.flash_works(shape)
    assert forward.matrix_flops == 4 * 2 * 1024**2 // 2 * 64
    assert backward.matrix_flops == 2.5 * forward.matrix_flops
    ideal = roofline.flash_works(shape, ideal=True)[0]
    assert ideal.matrix_flops / forward.matrix_flops == (16 + 64) / 128
    full = roofline.flash_works(replace(shape, causal=False))[0]
    assert full.matrix_flops == 2 * forward.matrix_flops
    assert forward.bytes == (2 + 1) * 1024 * 128 * 2 + 2 * 1024 * 4
    assert [roofline.flash_width(16, dv) for dv in (16, 48, 80, 100, 129)] == [32, 64, 96, 128, 192]
    with pytest.raises(ValueError, match="width of 300"):
        roofline.flash_width(300, 64)


def test_from_the_break_even_on_the_model_is_faster() -> None:
    for device in DEVICES.values():
        shape = shape_of(heads=16, n=64, d=16, dv=64, degree=3)
        n = break_even(Roofline(device, 16), Attention(n=1, m=1, d=16, dv=64), Way(3))
        assert 64 < n < NEVER
        assert n % 64 == 0

        def ratio(n: int, device: Device = device, shape: Shape = shape) -> float:
            at = replace(shape, n=n, m=n)
            return best(device, at).total / flash_time(device, at)[1]

        assert ratio(n) <= 1 < ratio(n - 64)
        assert all(ratio(n << power) < 1 for power in range(1, 6))


def test_break_even_is_never_where_the_features_cost_more_than_any_length() -> None:
    slow = Roofline(replace(H100, bandwidth=1.0), 1)
    assert break_even(slow, Attention(n=1, m=1, d=16, dv=64), Way(2)) == NEVER


def test_seconds_are_those_of_the_kernels_that_are_chosen() -> None:
    shape, ways = shape_of(heads=4, n=4096, d=16, dv=64, degree=3, near=64), (Way(3, 64), EXACT)
    found = [Roofline(H100, 4).seconds(Attention(n=4096, m=4096, d=16, dv=64), way) for way in ways]
    assert found == [best(H100, shape).total, flash_time(H100, shape)[1]]


def test_shapes_that_no_kernel_serves_are_refused() -> None:
    for sizes, message in (
        ({"key_heads": 3}, "divide"),
        ({"n": 0}, "at least 1"),
        ({"m": 32}, "as many keys"),
    ):
        with pytest.raises(ValueError, match=message):
            shape_of(**{"heads": 4, "n": 64, "d": 16, "dv": 64, "degree": 2, **sizes})  # type: ignore[arg-type]


def test_data_sheets_are_consistent() -> None:
    for name, device in DEVICES.items():
        assert device.half == pytest.approx(2 * device.tf32)
        assert device.single == pytest.approx(device.vector if name == "gfx942" else device.tf32 / 3)


def test_the_runtime_file_needs_the_standard_library_alone() -> None:
    """It is copied into generated folders."""
    tree = ast.parse(Path(schedule.__file__).read_text(encoding="utf-8"))
    modules = {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names
