"""Results do not depend on how tensors lie in memory: keys that are a transpose, gradients that are one number."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.test_not_finite import PATHS, RUNS, Call, make

DOUBLE = 1e-12


def layouts(seed: int) -> Iterator[list[tuple[int, ...]]]:
    """Orders of the four dimensions in memory, for q, k, v and the upstream gradient: each alone, then mixtures."""
    orders = list(itertools.permutations(range(4)))
    usual = orders[0]
    for place in range(4):
        for order in ((0, 1, 3, 2), (3, 2, 1, 0), (0, 2, 1, 3)):
            yield [order if place == each else usual for each in range(4)]
    chosen = random.Random(seed)
    for _ in range(6):
        yield [chosen.choice(orders) for _ in range(4)]


def laid(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers, whose dimensions lie in memory in that order."""
    back = [order.index(place) for place in range(4)]
    return x.detach().permute(order).contiguous().permute(back)


@pytest.mark.sampled(16)
@pytest.mark.parametrize(("run", "sight"), PATHS)
@pytest.mark.parametrize("n", [1, 4, 37])
def test_any_order_in_memory(run: str, sight: str, n: int) -> None:
    call = make(sight, n, torch.float64)
    expected = run_of(run, call, [(0, 1, 2, 3)] * 4)
    for orders in layouts(n):
        for found, wanted in zip(run_of(run, call, orders), expected, strict=True):
            assert torch.allclose(found, wanted, rtol=DOUBLE, atol=DOUBLE), orders


def run_of(run: str, call: Call, orders: list[tuple[int, ...]]) -> list[Tensor]:
    *tensors, cotangent = (
        laid(x, order) for x, order in zip((*call.tensors, call.cotangent), orders, strict=True)
    )
    given = Call(tuple(x.requires_grad_() for x in tensors), cotangent, call.visible, call.options)
    return RUNS[run](given)


@pytest.mark.parametrize(("run", "sight"), PATHS)
def test_tensors_that_repeat_one_number(run: str, sight: str) -> None:
    """A sum has an upstream gradient of stride 0; values may be expanded, too."""
    call = make(sight, 21, torch.float64)
    q, k, v = call.tensors
    for place in range(4):
        small = [x[..., :1] if place == each else x for each, x in enumerate((q, k, v, call.cotangent))]
        results = []
        for copied in (True, False):
            *given, cotangent = (x.expand(*x.shape[:3], 3) for x in small)
            if copied:
                *given, cotangent = (x.contiguous() for x in (*given, cotangent))
            tensors = tuple(x.detach().requires_grad_() for x in given)
            results.append(RUNS[run](Call(tensors, cotangent, call.visible, call.options)))
        for found, wanted in zip(*results, strict=True):
            assert torch.allclose(found, wanted, rtol=DOUBLE, atol=DOUBLE)
