"""No tensor of n * n or n * r elements is allocated, in either pass, at n = 2048, and nothing is gathered."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgrad_compiler.runtime.attention_op import FLOATS
from fastgrad_compiler.runtime.exact_attention import exact_backward, exact_forward
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_compiler.runtime.polynomial_attention import backward, forward
from fastgrad_compiler.runtime.tangent import polynomial_tangent
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs

N = 2048


class LargestStorage(TorchDispatchMode):
    """Records the most elements of any storage that an operation returns, inside custom operations too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operations = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        self.names.add(func._opname)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def largest(forward: Any, backward: Any, inputs: Inputs, *attributes: object) -> LargestStorage:
    """Both passes as plain functions: a mode does not see into a custom operation."""
    arguments = inputs.arguments
    with torch.no_grad(), LargestStorage() as record:
        saved = forward(*arguments, *attributes)
        backward(inputs.cotangent, *arguments, *saved, *attributes)
    return record


@pytest.mark.medium
@pytest.mark.parametrize(
    "spec",
    [
        KernelSpec(16, 64, COEFFICIENTS[2], causal=True),
        KernelSpec(16, 64, COEFFICIENTS[2], padding=True),
        KernelSpec(16, 64, COEFFICIENTS[2], causal=True, near=64, near_d=16),
        KernelSpec(16, 64, COEFFICIENTS[2], near=48, near_d=16),
        KernelSpec(16, 64, COEFFICIENTS[3], causal=True),
        KernelSpec(16, 64, COEFFICIENTS[2], causal=True, near=64, documents=True),
        KernelSpec(16, 64, COEFFICIENTS[2], documents=True),
        KernelSpec(16, 64, COEFFICIENTS[2], causal=True, near=64, forget=True),
    ],
    ids=[
        "causal",
        "padded",
        "causal near",
        "unmasked near",
        "degree 3",
        "causal documents",
        "documents",
        "forget",
    ],
)
def test_nothing_grows_with_length_times_rank(spec: KernelSpec) -> None:
    inputs = make_inputs(spec, N, batch=1, heads=1).to(torch.float32)

    record = largest(partial(forward, spec, ()), partial(backward, spec, ()), inputs, 0)
    assert record.operations > N / 256  # it saw inside the operation
    assert record.elements <= max(N * spec.dv, 2 * 256 * rank(spec.d, spec.degree))
    assert record.elements < min(N * N, N * rank(spec.d, spec.degree)) / 2
    assert {"bmm", "mul"} <= record.names
    assert not {name for name in record.names if re.search("gather|scatter|index|take|embedding", name)}


def test_nothing_of_exact_attention_is_quadratic() -> None:
    spec, n = KernelSpec(16, 64, COEFFICIENTS[2], causal=True, near=64, near_d=16), 2 * N
    inputs = make_inputs(spec, n, batch=1, heads=1).to(torch.float32)

    record = largest(exact_forward, exact_backward, inputs, 0.25, True, 64, 0)
    assert record.elements <= n * n / 8


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "spec",
    [
        KernelSpec(16, 64, COEFFICIENTS[2], causal=True),
        KernelSpec(16, 64, COEFFICIENTS[2], near=48, near_d=16),
        KernelSpec(16, 64, COEFFICIENTS[2], documents=True),
        KernelSpec(16, 64, COEFFICIENTS[2], causal=True, forget=True),
    ],
    ids=["causal", "unmasked near", "documents", "forget"],
)
def test_a_tangent_does_not_grow_either(spec: KernelSpec) -> None:
    n = N // 2
    inputs = make_inputs(spec, n, batch=1, heads=1).to(torch.float32)
    given = inputs.arguments
    tensors = given[:FLOATS]
    with torch.no_grad():
        saved = forward(spec, (), *given, 0)
        flag = torch.empty(0, dtype=torch.bool)
        with LargestStorage() as record:
            polynomial_tangent(spec)(*tensors, *given, *saved, flag, 0, "")
    assert record.operations > n / 256
    assert record.elements <= max(n * (spec.dv + 1), 256 * rank(spec.d, spec.degree))
    assert record.elements < min(n * n, n * rank(spec.d, spec.degree)) / 2
